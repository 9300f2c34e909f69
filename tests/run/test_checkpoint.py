"""Checkpoints: what is restored is what was saved, or the fault is reported."""

import json
import logging as std_logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vtp_jax import tree
from vtp_jax.run import checkpoint, sharding, stop
from vtp_jax.run.checkpoint import Checkpoints
from vtp_jax.types import State, UserError


def make_state(step: int) -> State:
    """A state that is a function of its step, with an optimizer of optax's own classes."""
    params = {
        "encoder": {
            "kernel": jnp.arange(48.0).reshape(8, 6) + step,
            "bias": jnp.full((6,), float(step)),
        },
        "head": {"kernel": jnp.full((6, 2), 0.5 * step)},
    }
    opt = optax.adam(1e-3).init(params)
    return State(jnp.int32(step), params, opt, {"queue": jnp.full((4,), step, jnp.int8)})


SHAPES = jax.eval_shape(lambda: make_state(0))


def assert_state(state: State, step: int) -> None:
    wanted = make_state(step)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for name, x in tree.flatten(wanted).items():
        got = tree.flatten(state)[name]
        assert got.dtype == x.dtype, name
        np.testing.assert_array_equal(np.asarray(got), np.asarray(x), err_msg=name)


def written(workdir: Path, steps: list[int]) -> Path:
    with Checkpoints(workdir, every=1, keep=10, config={"lr": 1.0}) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step))
    return workdir / "checkpoints"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A working directory with the steps 1 and 2; tests copy it."""
    workdir = tmp_path_factory.mktemp("two")
    written(workdir, [1, 2])
    return workdir


@pytest.fixture
def copy(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    return tmp_path / "run"


def test_an_empty_workdir_restores_nothing(tmp_path):
    with Checkpoints(tmp_path, every=1) as checkpoints:
        assert checkpoints.restore_latest(SHAPES) is None


def test_the_newest_checkpoint_is_restored_completely(copy):
    with Checkpoints(copy, every=1) as checkpoints:
        state = checkpoints.restore_latest(SHAPES)
        assert_state(state, 2)
        checkpoints.save(2, make_state(7))  # saved already: left alone
        assert_state(checkpoints.restore_latest(SHAPES), 2)
    meta = checkpoint.read_meta(copy, 2)
    assert meta.config == {"lr": 1.0}
    assert meta.table["params/encoder/kernel"] == ((8, 6), "float32")


def test_another_mesh_restores_the_same_state(copy):
    """Written from one device; read onto three meshes, split as asked."""
    for sizes in (dict(fsdp=8, data=1), dict(fsdp=2, tensor=2), dict(data=8)):
        mesh = sharding.make_mesh(**sizes)
        rules = [(".*kernel", ("fsdp", "tensor")), (".*", ())]
        shardings = sharding.state_shardings(SHAPES, mesh, rules, note=lambda _: None)
        shapes = sharding.with_shardings(SHAPES, shardings)
        with Checkpoints(copy, every=1) as checkpoints:
            state = checkpoints.restore_latest(shapes)
        assert_state(state, 2)
        assert jax.tree.map(lambda x: x.sharding, state) == shardings


def test_a_sharded_state_is_saved_from_eight_devices(tmp_path):
    mesh = sharding.make_mesh(fsdp=8, data=1)
    state = make_state(3)
    kernel = jax.device_put(state.params["encoder"]["kernel"], NamedSharding(mesh, P("fsdp", None)))
    params = {**state.params, "encoder": {**state.params["encoder"], "kernel": kernel}}
    with Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(3, state._replace(params=params))
        assert_state(checkpoints.restore_latest(SHAPES), 3)


def test_arrays_may_be_donated_after_save(tmp_path):
    """The next step overwrites the buffers while the save is being written."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((512, 512))
    shapes = State(jax.ShapeDtypeStruct((), jnp.int32), {"x": jax.eval_shape(lambda: x)}, {}, {})
    with Checkpoints(tmp_path, every=1, keep=10) as checkpoints:
        for i in range(4):
            checkpoints.save(i, State(jnp.int32(i), {"x": x}, {}, {}))
            for _ in range(3):
                x = step(x)
    for i in range(4):
        saved = checkpoint.restore_part(tmp_path, i, {"params": shapes.params})
        assert (saved["params"]["x"] == 3 * i).all()


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def files_of(folder: Path) -> list[str]:
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    return sorted(n for n in names if n not in ("_CHECKPOINT_METADATA", "commit_success.txt"))


@pytest.mark.parametrize("how", ["flipped", "truncated", "deleted"])
def test_damage_to_any_file_is_detected(two, tmp_path, how):
    names = files_of(two / "checkpoints" / "2")
    assert {"meta.json", "sha256.json"} < set(names) and len(names) > 6
    for i, name in enumerate(names):
        folder = shutil.copytree(two / "checkpoints" / "2", tmp_path / str(i))
        assert checkpoint.fault(checkpoint.epath.Path(folder)) is None
        if (folder / name).stat().st_size == 0 and how != "deleted":
            continue
        damage(folder / name, how)
        what = checkpoint.fault(checkpoint.epath.Path(folder))
        assert what is not None, name
        if name != "sha256.json":
            assert name in what


@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "meta.json", "sha256.json"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_restored(copy, caplog, name):
    damage(copy / "checkpoints" / "2" / name, "truncated")
    with Checkpoints(copy, every=1) as checkpoints:
        with caplog.at_level(std_logging.ERROR, logger="absl"):
            assert_state(checkpoints.restore_latest(SHAPES), 1)
        assert len(caplog.records) == 1 and name in caplog.text and "checkpoints/2" in caplog.text
        checkpoints.save(2, make_state(2))  # its place is free again
        assert_state(checkpoints.restore_latest(SHAPES), 2)
    assert (copy / "checkpoints" / "broken-2").is_dir()


def test_the_files_that_orbax_writes_last_are_not_needed(copy):
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        (copy / "checkpoints" / "2" / name).write_bytes(b"\x00{")
    with Checkpoints(copy, every=1) as checkpoints:
        assert_state(checkpoints.restore_latest(SHAPES), 2)


def test_a_foreign_file_is_reported_and_harmless(copy, caplog):
    (copy / "checkpoints" / "2" / "state" / ".DS_Store").write_bytes(b"x")
    caplog.set_level(std_logging.WARNING, logger="absl")
    with Checkpoints(copy, every=1) as checkpoints:
        assert_state(checkpoints.restore_latest(SHAPES), 2)
    assert "state/.DS_Store" in caplog.text


def test_if_all_are_damaged_the_run_does_not_start_over(copy):
    for step in "12":
        damage(copy / "checkpoints" / step / "meta.json", "deleted")
    with Checkpoints(copy, every=1) as checkpoints, pytest.raises(UserError, match="usable"):
        checkpoints.restore_latest(SHAPES)
    assert (copy / "checkpoints" / "2").is_dir()


def test_another_net_is_an_error_and_nothing_is_moved(copy):
    other = SHAPES._replace(
        params={
            "encoder": {
                "kernel": jax.ShapeDtypeStruct((8, 7), jnp.float32),
                "scale": jax.ShapeDtypeStruct((6,), jnp.float32),
                "bias": jax.ShapeDtypeStruct((6,), jnp.bfloat16),
            },
            "head": SHAPES.params["head"],
        }
    )
    with Checkpoints(copy, every=1) as checkpoints, pytest.raises(UserError) as raised:
        checkpoints.restore_latest(other)
    message = str(raised.value)
    assert "\n" not in message
    assert "lacks 1 arrays (params/encoder/scale)" in message
    assert "2 have another shape or dtype" in message
    assert "params/encoder/bias: float32[6] there, bfloat16[6] here" in message
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["1", "2"]


def test_an_error_while_writing_is_raised_and_damages_nothing(tmp_path, monkeypatch):
    """A full disk, for instance: the error is raised, and the previous checkpoint stays valid."""
    checkpoints = Checkpoints(tmp_path, every=1, keep=1)
    checkpoints.save(1, make_state(1))
    checkpoints.wait()
    with monkeypatch.context() as patched:

        def full(path):
            raise OSError(28, "No space left on device")

        patched.setattr(checkpoint, "_sha256", full)
        checkpoints.save(2, make_state(2))
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
    checkpoints.close()
    with Checkpoints(tmp_path, every=1, keep=1) as checkpoints:
        assert_state(checkpoints.restore_latest(SHAPES), 1)
        checkpoints.save(2, make_state(2))
        checkpoints.wait()
        assert_state(checkpoints.restore_latest(SHAPES), 2)


@pytest.mark.parametrize("saves", [True, False])
def test_an_error_knows_whether_a_checkpoint_was_written_before_it(tmp_path, saves):
    with (
        pytest.raises(KeyError) as raised,
        Checkpoints(tmp_path, every=1, config={}) as checkpoints,
    ):
        if saves:
            checkpoints.save(1, make_state(1))
        raise KeyError("a bug")
    assert stop.progressed(raised.value) == saves


def test_the_newest_and_the_best_are_kept_over_restarts(tmp_path):
    """Scores 1 9 3 | 4 5: after a restart, the previous best is still known and kept."""

    def run(scores: dict[int, float | None]) -> set[str]:
        best = ("t2v_r1", "max")
        with Checkpoints(tmp_path, every=1, keep=2, best=best) as checkpoints:
            checkpoints.restore_latest(SHAPES)
            for step, score in scores.items():
                checkpoints.save(step, make_state(step))
                if score is not None:
                    checkpoints.rank(step, {"t2v_r1": score, "loss": -score})
        return {p.name for p in (tmp_path / "checkpoints").iterdir()}

    assert run({1: 1.0, 2: 9.0, 3: 3.0}) == {"2", "3"}
    assert run({4: 4.0, 5: float("nan"), 6: None}) == {"2", "5", "6"}
    assert checkpoint.find_step(tmp_path, "best") == 2
    assert checkpoint.find_step(tmp_path) == 6
    assert run({7: 10.0, 8: None, 9: None}) == {"7", "8", "9"}


def test_a_kill_between_a_save_and_its_numbers_leaves_a_valid_checkpoint(copy):
    """The checkpoint is complete, but not ranked."""
    with Checkpoints(copy, every=1, keep=5) as checkpoints:
        checkpoints.save(3, make_state(3))
        assert not checkpoints.ranked(3)
        checkpoints.rank(3, {"t2v_r1": 0.5, "loss": float("nan")})
        checkpoints.rank(9, {"t2v_r1": 0.5})  # a step that was not saved
        assert checkpoints.ranked(3) and not checkpoints.ranked(2) and not checkpoints.ranked(9)
    assert checkpoint.read_meta(copy, 3).metrics == {"t2v_r1": 0.5}
    damage(copy / "checkpoints" / "3" / "metrics.json", "truncated")
    with Checkpoints(copy, every=1, keep=5) as checkpoints:
        assert_state(checkpoints.restore_latest(SHAPES), 3)
        assert not checkpoints.ranked(3)


def test_evaluation_reads_a_valid_step_and_moves_nothing(copy):
    params = checkpoint.restore_params(copy)
    np.testing.assert_array_equal(params["head"]["kernel"], np.full((6, 2), 1.0))
    assert isinstance(params["head"]["kernel"], np.ndarray)
    part = checkpoint.restore_part(copy, 1, {"params": SHAPES.params, "extra": SHAPES.extra})
    assert (part["extra"]["queue"] == 1).all()
    with pytest.raises(UserError, match="there are 1, 2"):
        checkpoint.find_step(copy, 5)
    with pytest.raises(UserError, match="checkpoint.best"):
        checkpoint.find_step(copy, "best")
    damage(copy / "checkpoints" / "2" / "meta.json", "flipped")
    with pytest.raises(UserError, match="meta.json has changed"):
        checkpoint.find_step(copy, 2)
    assert checkpoint.find_step(copy) == 1
    assert (copy / "checkpoints" / "2").is_dir()  # reading moves nothing


def test_bad_settings_are_errors(tmp_path):
    for settings in (dict(every=0), dict(every=1, keep=0), dict(every=1, best=("r1", "most"))):
        with pytest.raises(UserError):
            Checkpoints(tmp_path, **settings)


# The child saves step 1, then is killed at a named point of saving step 2.
CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_checkpoint as t
from vtp_jax.run import checkpoint

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

with checkpoint.Checkpoints({workdir!r}, every=1, keep=1) as c:
    print("open", flush=True)
    point = {point!r}
    if point == "wait":
        sys.stdin.read()
    c.save(1, t.make_state(1)); c.wait()
    if point == "sealing":
        checkpoint._sha256 = die
    elif point == "deleting the old one":
        c._manager._checkpoint_deleter.delete_steps = die
    c.save(2, t.make_state(2))
    if point == "writing":
        die()
    c.wait()
"""


def child(workdir: Path, point: str) -> subprocess.Popen:
    code = CHILD.format(tests=str(Path(__file__).parent), workdir=str(workdir), point=point)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.parametrize(
    "point, steps", [("writing", (1, 2)), ("sealing", (1,)), ("deleting the old one", (2,))]
)
def test_a_kill_inside_a_save_leaves_a_good_checkpoint(tmp_path, point, steps):
    process = child(tmp_path, point)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    with Checkpoints(tmp_path, every=1, keep=1) as checkpoints:
        state = checkpoints.restore_latest(SHAPES)
        step = int(state.step)
        assert step in steps
        assert_state(state, step)
        checkpoints.save(3, make_state(3))
        assert_state(checkpoints.restore_latest(SHAPES), 3)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


SAVING = """
import sys
sys.path.insert(0, {tests!r})
import test_checkpoint as t
from vtp_jax.run import checkpoint

with checkpoint.Checkpoints({workdir!r}, every=1, keep=2) as c:
    state = c.restore_latest(t.SHAPES)
    step = 0 if state is None else int(state.step)
    if state is not None:
        t.assert_state(state, step)
    while True:
        step += 1
        c.save(step, t.make_state(step))
        print(step, flush=True)
"""


@pytest.mark.slow(reason="20 processes")
def test_kills_at_random_instants_lose_no_saved_step(tmp_path):
    """Each process is killed up to half a second into saving without a pause. A step whose save has
    ended (the one before the step being saved) is never lost."""
    code = SAVING.format(tests=str(Path(__file__).parent), workdir=str(tmp_path))
    rng = np.random.default_rng(0)
    done = 0
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        assert int(process.stdout.readline()) > done
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        printed = process.communicate()[0].split()
        done = int(printed[-1]) - 1 if printed else done
        with Checkpoints(tmp_path, every=1, keep=2) as checkpoints:
            state = checkpoints.restore_latest(SHAPES)
        assert int(state.step) >= done
        assert_state(state, int(state.step))
        done = int(state.step)
    assert not list((tmp_path / "checkpoints").glob("broken-*"))


def test_two_runs_do_not_share_a_workdir(tmp_path):
    process = child(tmp_path, "wait")
    try:
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on"):
            Checkpoints(tmp_path, every=1)
    finally:
        process.kill()
        process.communicate()
    Checkpoints(tmp_path, every=1).close()  # a killed run holds no lock


def test_restoring_needs_no_tensorflow(two):
    """Restoring must work where TensorFlow is not installed."""
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from vtp_jax.run import checkpoint\n"
        f"print(checkpoint.restore_params({str(two)!r})['head']['kernel'].sum())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert result.stdout.strip() == "12.0", result.stderr


def test_the_hashes_are_of_the_files(two):
    folder = two / "checkpoints" / "2"
    hashes = json.loads((folder / "sha256.json").read_text())
    assert sorted([*hashes, "sha256.json"]) == files_of(folder)
