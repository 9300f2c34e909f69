"""The entry `vtp plan`, its one-line errors, and the goldens of plans.

`make plan` compiles every config for a pod and compares with its golden; `make plan-golden`
rewrites the goldens that differ.
"""

import importlib.util
import json

import jax
import pytest

from tests import plans
from tests.configs import ROOT
from vtp_jax import plan, train
from vtp_jax.measure import forecast, pods
from vtp_jax.setup import config
from vtp_jax.types import UserError

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


@pytest.mark.parametrize(
    "topology, overrides, message",
    [
        ("v5e", [], "no topology 'v5e'; write CHIP:AxB"),
        ("v9:4x4", [], "no topology 'v9:4x4'"),
        ("v5e:3x5", [], "rejects v5e:3x5"),
        ("cpu:0", [], "no topology 'cpu:0'; write CHIP:AxB.*cpu:N"),
        ("cpu:4096", [], "this process has 8 CPU devices"),
        ("cpu:8", ["--config.mesh.fsdp=3"], "does not fit 8 devices"),
        ("cpu:8", ["--config.batch=12"], "config.batch=12 does not divide over 8 devices"),
    ],
)
def test_mistakes_are_reported_in_one_line_before_anything_compiles(
    topology, overrides, message, monkeypatch
):
    jax.devices()  # their number is fixed from here on
    if topology.startswith("v5e:"):
        pytest.importorskip("libtpu")
    monkeypatch.setattr(jax.stages.Traced, "lower", lambda *_: pytest.fail("lowered"))
    with pytest.raises(UserError, match=message) as error:
        plan.main(["--config", plans.TINY, "--topology", topology, *overrides])
    assert "\n" not in str(error.value)


GIB = pods.GIB
NONE, DOTS, NOTHING = forecast.REMAT


def planned(need, shape, have=16 * GIB, batch=64):
    """A plan of which a GiB is parameters."""
    return forecast.Plan(
        shape=shape, batch=batch, steps=1, memory=dict(params=GIB), need=need, have=have, flops=1,
        again=0, traffic={}, seconds=None, best=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "needs, compiled, flags",
    [
        # GiB by (remat, fsdp); what is compiled until one fits; the first remedy
        ({(DOTS, 1): 12}, [(DOTS, 1)], f"--config.method.remat={DOTS}"),
        (
            {(DOTS, 1): 18, (NOTHING, 1): 9},
            [(DOTS, 1), (NOTHING, 1)],
            f"--config.method.remat={NOTHING}",
        ),
        (
            {(DOTS, 1): 18, (NOTHING, 1): 17, (NOTHING, 4): 16},
            [(DOTS, 1), (NOTHING, 1), (NOTHING, 4)],
            f"--config.method.remat={NOTHING} --config.mesh.data=1 --config.mesh.fsdp=4",
        ),
        # None does: 61 GiB, of which one stays when the batch is divided by 4 or more.
        (
            {(DOTS, 1): 80, (NOTHING, 1): 70, (NOTHING, 4): 61},
            [(DOTS, 1), (NOTHING, 1), (NOTHING, 4)],
            "--config.batch=16",
        ),
    ],
)
def test_a_plan_that_does_not_fit_says_what_would(needs, compiled, flags, monkeypatch, capsys):
    tried = []

    def make_plan(cfg, pod, quick):
        key = cfg.method["remat"], cfg.mesh["fsdp"]
        tried.append(key)
        return planned(needs[key] * GIB, dict(cfg.mesh))

    monkeypatch.setattr(forecast, "make_plan", make_plan)
    shape = dict(data=4, fsdp=1, sequence=1, tensor=1)
    pod = pods.Pod("v5e:2x2", range(4), pods.CHIPS["v5e"])
    first = planned(100 * GIB, shape)
    found = list(forecast.remedies(plans.smallest(), first, pod, plan.stage))
    assert tried == compiled and found[0].flags == flags
    assert all(one.need <= 16 * GIB for one in found)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 * len(compiled) and told[0].startswith("try --config.method.remat=")
    assert f"{found[0].need / GIB:.2f} GiB a chip" in list(plan.advice(found, pod))[0][1]


def test_arithmetic_keeps_batches_that_the_devices_divide():
    shape = dict(data=8, fsdp=1, sequence=1, tensor=1)
    for batch in (8, 16, 24, 32, 64, 512):
        for gib in (20, 40, 300):
            plan = planned(gib * GIB, shape, batch=batch)
            for one in forecast.by_arithmetic(plan, 8):
                assert one.need <= plan.have
                if one.flags.startswith("--config.batch="):
                    left = int(one.flags.partition("=")[2])
                    assert left % 8 == 0 and GIB + (gib - 1) * GIB * left / batch <= plan.have
                else:
                    devices = int(one.flags.split()[0])
                    assert batch % devices == 0 and gib * GIB * 8 / devices <= plan.have
    assert not list(forecast.by_arithmetic(planned(300 * GIB, shape, have=None), 8))


@needs_compiler
def test_chips_of_two_devices_are_counted_once():
    pod = pods.find_pod("tpu7x:2x2x1")
    assert len(pod.devices) == 8
    shape = dict(data=8, fsdp=1, sequence=1, tensor=1)
    one = planned(GIB, shape)._replace(best=3600.0)
    assert "4 chips, 8 devices" in plan.title("c", one, pod)
    shown = dict(plan.rows(one, pod))
    assert shown["the run"].endswith("4 chip-hours") and "GiB a device" in shown["fits"]


def test_meshes_and_batches_that_do_not_fit_are_rejected(tmp_path, monkeypatch):
    """Training reports each mistake in one line before anything is compiled or written."""
    monkeypatch.setattr(jax.stages.Traced, "lower", lambda *_: pytest.fail("lowered"))
    images = dict(train=dict(clips=8), batch=12)
    for change, message in [
        (dict(mesh=dict(data=-1, fdsp=2)), "config.mesh: unknown key 'fdsp'; did you mean 'fsdp'"),
        (dict(mesh=dict(data=3)), "data=3, fsdp=1, sequence=1, tensor=1 does not fit 8 devices"),
        (dict(sharding=[[".*", ["fsdpp"]]]), "'fsdpp' for .* is not an axis of the mesh"),
        (dict(batch=12), "config.batch=12 does not divide over 8 devices"),
        (dict(data=dict(eval_batch=4)), "config.data.eval_batch=4 does not divide"),
        (dict(data=dict(also=dict(images=images))), "data.also.images.batch=12 does not divide"),
    ]:
        cfg = config.load(plans.TINY)
        change = {k: {**cfg.data, **v} if k == "data" else v for k, v in change.items()}
        cfg = cfg._replace(**change)
        with pytest.raises(UserError, match=message) as error:
            train.train(cfg, tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run/config.json").exists()


def test_plans_are_compared_loosely_in_numbers_and_exactly_in_words():
    golden = "fits: yes, 10.00 GiB\nwork: 1"
    assert not plans.differences("fits: yes, 10.90 GiB\nwork: 1", golden)
    assert plans.differences("fits: yes, 12.90 GiB\nwork: 1", golden)
    assert plans.differences("fits: NO, 10.00 GiB\nwork: 1", golden)
    assert plans.differences("fits: yes, 10.00 GiB", golden)


@needs_compiler
def test_a_config_is_planned_for_an_absent_tpu(capsys, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(plans.smallest()._asdict()), encoding="utf-8")
    plan.main(["--config", str(tmp_path / "c.json"), "--topology", "v5e:2x2", "--quick"])
    shown = capsys.readouterr().out
    assert "4 chips, data=4 fsdp=1 sequence=1 tensor=1, batch 16" in shown
    assert "fits                          yes" in shown and "of 16.0 GiB a chip" in shown
    assert "at least" in shown and "chip-hours" in shown and "all-reduce" in shown
    assert "estimated" not in shown  # with --quick, products take ten times as long


@pytest.mark.plan
@needs_compiler
@pytest.mark.parametrize("path", plans.planned())
def test_the_plan_of_a_config_is_near_its_golden(path, as_users_compile):
    text = plans.written(path)
    assert not plans.differences(text, plans.golden(path).read_text(encoding="utf-8")), text
