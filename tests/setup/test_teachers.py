"""Teachers: nets in `extra` that come from a warm start. No step changes them, and a run's
checkpoints hold their source instead of their arrays."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.configs import ROOT
from vtp_jax import train, tree
from vtp_jax.run import checkpoint, sharding
from vtp_jax.setup import build, config, warm_start
from vtp_jax.types import Mean, Method, Out, State, UserError, is_teacher

TEACHER = np.arange(8, dtype=np.float32)


def toy():
    """Pulls one weight towards the teacher's sum. Its loss returns a changed teacher, wrongly."""

    def init(rng, spec):
        return {"w": jnp.zeros(())}

    def start(rng, spec, params):
        return {"teacher": {"w": jnp.zeros(8)}, "count": jnp.zeros(())}

    def loss(params, extra, batch, rng, step):
        value = jnp.square(params["w"] - extra["teacher"]["w"].sum())
        changed = {"w": extra["teacher"]["w"] + 1}
        new = {"teacher": changed, "count": extra["count"] + 1}
        return value, Out({"loss_pull": Mean(value, jnp.ones(()))}, new)

    return Method(init, loss, {}, start)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    with checkpoint.Checkpoints(path, every=1) as saved:
        saved.save(3, State(jnp.int32(3), {"w": TEACHER}, {}, {}))
    return path


@pytest.fixture
def go(monkeypatch, source):
    """Trains the toy in a folder for some steps, its teacher from `source` unless it is None."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(build, "method", lambda *_: toy())

    def run(workdir, steps, source=source):
        cfg = config.load("configs/demo.py:tiny", [f"--config.steps={steps}"])
        rules = [(str(source), "params/w", "extra/teacher/w")] if source else []
        optim = dict(lr=0.1, weight_decay=0.0, rules=[(".*", {})])
        cfg = cfg._replace(warm_start=rules, fresh=["params/w"] if source else [], optim=optim)
        return train.train(cfg._replace(evals={}, sharding=[(".*", ())]), workdir)

    return run


def test_teachers_are_recognised_by_their_names():
    names = ["extra/teacher/w", "extra/base/teacher/blocks/w"]
    others = ["extra/teacher", "params/teacher/w", "extra/twin/w", "extra/teachers/w", "step"]
    assert [is_teacher(name) for name in names + others] == [True] * 2 + [False] * 5


def test_a_run_resumes_with_the_teacher_that_its_checkpoints_do_not_hold(go, source, tmp_path):
    go(tmp_path / "whole", 4)
    go(tmp_path / "parts", 2)
    meta = checkpoint.read_meta(tmp_path / "parts", 2)
    assert "extra/count" in meta.table and "extra/teacher/w" not in meta.table
    (one,) = meta.teachers
    assert (
        one.path == str(source) and one.step == 3 and one.names == {"extra/teacher/w": "params/w"}
    )
    with checkpoint.Checkpoints(source, every=1) as saved:  # a step that the run did not load
        saved.save(9, State(jnp.int32(9), {"w": 0 * TEACHER}, {}, {}))
    go(tmp_path / "parts", 4)
    whole, parts = (build.restore(tmp_path / name).state for name in ("whole", "parts"))
    np.testing.assert_array_equal(parts.extra["teacher"]["w"], TEACHER)
    assert parts.extra["count"] == 4 and parts.params["w"] != 0
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_a_missing_or_changed_teacher_is_reported_in_one_line(go, source, tmp_path):
    go(tmp_path / "run", 1)
    shutil.rmtree(source)
    with pytest.raises(UserError, match=f"checkpoint 3 of {source}, is gone; put it back"):
        go(tmp_path / "run", 2)
    with checkpoint.Checkpoints(source, every=1) as saved:
        saved.save(3, State(jnp.int32(3), {"w": TEACHER + 1}, {}, {}))
    with pytest.raises(UserError, match="is not the one that the run began with"):
        go(tmp_path / "run", 2)


def test_a_teacher_that_was_not_loaded_is_saved_like_everything_else(go, tmp_path):
    go(tmp_path / "run", 1, source=None)
    meta = checkpoint.read_meta(tmp_path / "run", 1)
    assert "extra/teacher/w" in meta.table and not meta.teachers
    assert not build.restore(tmp_path / "run").state.extra["teacher"]["w"].any()


def test_teachers_have_the_shardings_of_the_state(source):
    mesh = sharding.make_mesh(data=8)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    wanted = {"extra": {"teacher": {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=split)}}}
    rows = [
        warm_start.Filled("extra/teacher/w", "", "loaded", (str(source), 3, "params/w")),
        warm_start.Filled("params/w", "", "loaded", (str(source), 3, "params/w")),
    ]
    found = tree.flatten(build.with_teachers(wanted, warm_start.teachers(rows)))
    assert found["extra/teacher/w"].sharding == split
    np.testing.assert_array_equal(found["extra/teacher/w"], TEACHER)
