"""Plans: of the devices at hand against what they hold and send, and of TPUs by the TPU compiler.

`make plan` compiles every config for a pod and compares with its golden; `make plan-golden` writes
the goldens that have moved.
"""

import importlib.util
import json
import math

import jax
import pytest

from tests import plans
from tests.configs import ROOT, config_files
from vtp_jax import plan, train
from vtp_jax.measure import forecast, pods
from vtp_jax.run import sharding
from vtp_jax.setup import config
from vtp_jax.types import UserError

TINY = "configs/videomae/pretrain_k400.py:tiny"
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (Linux, x86-64)"
)


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def as_users_compile():
    """The suite skips XLA's expensive passes; a TPU's program is planned with all of them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def load(path=TINY, *overrides):
    return config.load(path, overrides)


def smallest(*overrides):
    """A config that compiles in seconds."""
    cfg = load(TINY, *overrides)
    cfg.method.update(size=[32, 2, 2, 64], decoder=[32, 1, 2, 64])
    return cfg


@pytest.fixture(scope="module")
def split():
    """The plan of a config with parameters over four devices, and its step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        cfg, pod = smallest("--config.mesh.fsdp=4"), pods.find_pod("cpu:8")
        step = forecast.lower(cfg, pod)
        return step, forecast.compile_plan(step, cfg, pod)


def test_memory_is_what_the_devices_hold(split):
    step, made = split
    for name in ("params", "opt"):
        leaves = jax.tree.leaves(getattr(step.state, name))
        shards = [math.prod(x.sharding.shard_shape(x.shape)) for x in leaves]
        assert made.memory[name] == sum(4 * n for n in shards)
        assert made.memory[name] < 0.4 * sum(4 * x.size for x in leaves), "not split over fsdp=4"
    assert made.memory["batch"] >= 16 // 8 * 8 * 32 * 32 * 3
    held = sum(made.memory.values())
    assert held == pytest.approx(made.need, rel=0.02)
    assert made.fits and made.have is None


def test_split_parameters_are_gathered_and_gradients_summed(split):
    _, made = split
    assert made.traffic is not None and made.traffic["all-gather"] > 0.5 * made.memory["params"]
    assert made.flops > 0 and made.again == 0


def test_remat_computes_again_and_that_is_no_work(split):
    cfg = smallest("--config.mesh.fsdp=4")
    cfg.method["remat"] = "nothing_saveable"
    once, again = forecast.work(cfg)
    assert once == split[1].flops and 0.1 < again / once < 0.4


def test_the_complaint_of_a_compiler_that_has_no_room_is_read():
    """Both of its ways to say it, as it says them."""
    told = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.5G of 15.75G hbm."
    assert forecast._overflow(told, 1000) == int(23.5 * 2**30)
    told = "the total memory required for HLO temporaries (78.91G) exceeds available HBM (15.75G)"
    assert forecast._overflow(told, 1000) == int(78.91 * 2**30) + 1000


@pytest.mark.parametrize(
    "topology, overrides, told",
    [
        ("v5e", [], "no topology 'v5e'; write CHIP:AxB"),
        ("v9:4x4", [], "no topology 'v9:4x4'"),
        ("v5e:3x5", [], "knows no v5e:3x5"),
        ("cpu:4096", [], "this process has 8 CPU devices"),
        ("cpu:8", ["--config.mesh.fsdp=3"], "does not fit 8 devices"),
        ("cpu:8", ["--config.batch=12"], "config.batch=12 does not divide over 8 devices"),
    ],
)
def test_mistakes_are_told_in_a_line_before_anything_compiles(
    topology, overrides, told, monkeypatch
):
    if topology.startswith("v5e:"):
        pytest.importorskip("libtpu")
    monkeypatch.setattr(jax.stages.Traced, "lower", lambda *_: pytest.fail("lowered"))
    with pytest.raises(UserError, match=told) as error:
        plan.main(["--config", TINY, "--topology", topology, *overrides])
    assert "\n" not in str(error.value)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'"):
        pods.find_pod("v5e:4x4")


def test_a_misspelt_axis_a_mesh_and_batches_that_do_not_divide(tmp_path, monkeypatch):
    """What training says of them, in one line, before anything is compiled or written."""
    monkeypatch.setattr(jax.stages.Traced, "lower", lambda *_: pytest.fail("lowered"))
    images = dict(train=dict(clips=8), batch=12)
    for change, told in [
        (dict(mesh=dict(data=-1, fdsp=2)), "config.mesh: unknown key 'fdsp'; did you mean 'fsdp'"),
        (dict(mesh=dict(data=3)), "data=3, fsdp=1, sequence=1, tensor=1 does not fit 8 devices"),
        (dict(sharding=[[".*", ["fsdpp"]]]), "'fsdpp' for .* is no axis of the mesh"),
        (dict(batch=12), "config.batch=12 does not divide over 8 devices"),
        (dict(data=dict(eval_batch=4)), "config.data.eval_batch=4 does not divide"),
        (dict(data=dict(also=dict(images=images))), "data.also.images.batch=12 does not divide"),
    ]:
        cfg = load()
        change = {k: {**cfg.data, **v} if k == "data" else v for k, v in change.items()}
        cfg = cfg._replace(**change)
        with pytest.raises(UserError, match=told) as error:
            train.train(cfg, tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run/config.json").exists()


def test_a_sweep_tries_less_where_more_fits():
    cfg = load()
    tried = list(forecast.candidates(cfg, 16))
    meshes = {tuple(t["mesh"].values()) for t, _ in tried}
    assert {(16, 1, 1, 1), (1, 16, 1, 1)} <= meshes and any(t == 2 for *_, t in meshes)
    for t, configs in tried:
        assert math.prod(t["mesh"].values()) == 16
        assert t["batch"] % (t["mesh"]["data"] * t["mesh"]["fsdp"]) == 0
        assert [c.method["remat"] for c in configs] == list(forecast.REMAT)


def test_loose_is_loose_in_numbers_and_strict_in_words():
    golden = "fits: yes, 10.00 GiB\nwork: 1"
    assert not plans.differences("fits: yes, 10.90 GiB\nwork: 1", golden)
    assert plans.differences("fits: yes, 12.90 GiB\nwork: 1", golden)
    assert plans.differences("fits: NO, 10.00 GiB\nwork: 1", golden)
    assert plans.differences("fits: yes, 10.00 GiB", golden)


@needs_compiler
def test_a_tpu_that_is_not_here(capsys, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(smallest()._asdict()), encoding="utf-8")
    plan.main(["--config", str(tmp_path / "c.json"), "--topology", "v5e:2x2", "--quick"])
    told = capsys.readouterr().out
    assert "4 chips, data=4 fsdp=1 sequence=1 tensor=1, batch 16" in told
    assert "fits                          yes" in told and "of 16.0 GiB a chip" in told
    assert "at least" in told and "chip-hours" in told and "all-reduce" in told
    assert "estimated" not in told  # a quick compiler's products take ten times as long


@needs_compiler
def test_slices_are_one_mesh_with_rows_over_the_slices():
    pod = pods.find_pod("v5e:2x2", slices=2)
    mesh = sharding.make_mesh(data=-1, fsdp=4, devices=pod.devices)
    assert [len({d.slice_index for d in row}) for row in mesh.devices.reshape(2, 4)] == [1, 1]
    with pytest.raises(UserError, match="data=1 does not divide over 2 slices"):
        sharding.make_mesh(data=1, fsdp=8, devices=pod.devices)


@pytest.mark.plan
@needs_compiler
@pytest.mark.parametrize("path", config_files())
def test_the_plan_of_a_config_is_near_its_golden(path, as_users_compile):
    file = plans.golden(path)
    assert file.exists(), f"no {file.name}; write it: make plan-golden"
    text = plans.written(path)
    assert not plans.differences(text, file.read_text(encoding="utf-8")), text
