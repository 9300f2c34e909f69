"""Workdirs other than a plain folder: in a bucket, as file://, with a colon in the name."""

import json
import os
import signal

import pytest

from tests import buckets
from tests.configs import ROOT
from tests.test_train import load, one_weight, tripped, with_one_weight
from vtp_jax import evaluate, report, train
from vtp_jax.run import boards, checkpoint, evaluations, goodput, metrics, paths
from vtp_jax.run.stop import Stopped
from vtp_jax.setup import build, config
from vtp_jax.types import UserError


@pytest.fixture
def cfg(monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = with_one_weight(load(), monkeypatch, one_weight())
    cfg.checkpoint.update(every=2, keep=2)
    return cfg._replace(steps=6, log=dict(every=1))


def stop_at(monkeypatch, step):
    left = iter([False] * (step - 1) + [True] + [False] * 99)
    tripping = tripped(metrics.merge, lambda: next(left), signal.SIGTERM)
    monkeypatch.setattr(metrics, "merge", tripping)


def tour(workdir, cfg, monkeypatch):
    """A run that is stopped, resumed, evaluated and reported; returns its curve."""
    stop_at(monkeypatch, 3)
    with pytest.raises(Stopped):
        train.train(cfg, workdir)
    last = train.train(cfg, workdir)
    evaluate.main(["--workdir", workdir])
    report.main(["--workdir", workdir])
    folder = paths.path(workdir)
    *_, trained, evaluated = evaluations.read(workdir)
    assert (trained.by, evaluated.by) == ("training", "vtp evaluate")
    assert trained.numbers == pytest.approx(evaluated.numbers, rel=1e-5, nan_ok=True)
    assert trained.checkpoint == "checkpoints/6" and last["train/loss"]
    assert "between processes" in (folder / "report.html").read_text()
    assert checkpoint.find_step(workdir) == 6
    spent = goodput.read(workdir)
    assert spent.lives == 2 and spent.parts["lost"] == 0 < spent.goodput < 1
    assert all(seconds > 0 for part, seconds in spent.parts.items() if part != "lost")
    lines = [x for x in metrics.read(folder / "metrics.jsonl") if "train/loss" in x]
    assert [x["step"] for x in lines] == [1, 2, 3, 4, 5, 6]
    return [x["train/loss"] for x in lines]


def test_a_run_in_a_bucket_is_the_one_in_a_folder(tmp_path, cfg, monkeypatch, capsys):
    buckets.install(monkeypatch, tmp_path / "buckets")
    monkeypatch.setattr(boards, "tensorboard", lambda *_: None)  # TensorFlow has its own gs://
    monkeypatch.chdir(ROOT)
    in_bucket = tour("gs://mine/2026-01-31_10:30/run", cfg, monkeypatch)
    in_folder = tour(f"file://{tmp_path}/2026-01-31_10:30", cfg, monkeypatch)
    assert in_bucket == in_folder
    assert (tmp_path / "2026-01-31_10:30/checkpoints/6").is_dir()
    assert not any(":" in p.name and "gs" in p.name for p in ROOT.iterdir())


def test_a_save_in_a_bucket_counts_once_it_is_committed(tmp_path, monkeypatch, caplog):
    from tests.run.test_checkpoint import SHAPES, assert_state, make_state

    buckets.install(monkeypatch, tmp_path)
    workdir = "gs://mine/run"
    with checkpoint.Checkpoints(workdir, every=1, keep=9) as saved:
        for step in (1, 2, 3):
            saved.save(step, make_state(step))
    folder = tmp_path / "mine/run/checkpoints"
    (folder / "3/commit_success.txt").unlink()  # a kill while 3 was written
    (folder / "2/meta.json").write_text("{")
    assert checkpoint.steps(workdir) == [1, 2] and checkpoint.find_step(workdir) == 1
    (tmp_path / "mine/run/lock").write_text("process 7 on there")
    with checkpoint.Checkpoints(workdir, every=1, keep=9) as saved:
        assert "process 7 on there has not ended in order" in caplog.text
        assert_state(saved.restore_latest(SHAPES), 1)
        assert (folder / "broken-2/meta.json").exists() and not (folder / "2").exists()
        saved.save(3, make_state(3))
        assert_state(saved.restore_latest(SHAPES), 3)
    assert not (tmp_path / "mine/run/lock").exists()


def test_lines_in_a_bucket_are_uploaded_now_and_then(tmp_path, monkeypatch):
    buckets.install(monkeypatch, tmp_path)
    now, path = [0.0], paths.path("gs://mine/lines")
    lines = paths.Lines(path, ["old"], every=30.0, clock=lambda: now[0])

    def added(text, at):
        now[0] = at
        lines.add(text)
        return path.read_text().split()

    assert added("a", 10) == ["old"]
    assert added("b", 30) == ["old", "a", "b"]
    assert added("c", 31) == ["old", "a", "b"]
    lines.close()
    assert path.read_text() == "old\na\nb\nc\n"


def test_an_unknown_file_system_is_named():
    with pytest.raises(UserError, match="no file system for 's3://'.* gs://"):
        paths.path("s3://bucket/run")


def test_a_config_may_have_colons_in_its_path(tmp_path):
    folder = tmp_path / "10:30"
    folder.mkdir()
    source = (ROOT / "configs/demo.py").read_text()
    (folder / "a.py").write_text(source)
    (folder / "b:c.py").write_text(source)
    tiny = config.load("demo:tiny")
    assert config.load(f"{folder}/a.py:tiny") == config.load(f"{folder}/b:c.py:tiny") == tiny
    (folder / "config.json").write_text(json.dumps(tiny._asdict()))
    assert config.load(f"{folder}/config.json").data == tiny.data
    assert config.load(f"{folder}/a.py") == config.load(os.fspath(ROOT / "configs/demo.py"))
    with pytest.raises(UserError, match="no run in"):
        build.restore(folder / "nothing:here")
