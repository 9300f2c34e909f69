"""The demo at a small size: every stage, the summary's keys, the report; and losses that ablations
leave out."""

import json

import jax
import pytest

from tests.configs import ROOT
from vtp_jax import demo
from vtp_jax.data import shapes
from vtp_jax.run import sharding, stop
from vtp_jax.setup import config

LOSSES = ("video", "text", "vtc", "vtm")


def test_the_demo_runs_from_no_data_to_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo.shapes, "Plan", lambda: PLAN)
    one = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda **axes: one)
    corpus, workdir = tmp_path / "scenes", tmp_path / "run"
    changes = dict(
        steps=4, batch=16, data__train__root=corpus, data__train__list=corpus / "train.csv",
        data__evals__val__root=corpus, data__evals__val__list=corpus / "val.csv",
        data__text__path=corpus / "tokenizer.model", log__every=2, checkpoint__every=2,
        optim__lr__steps=4, optim__lr__warmup=1, method__unroll=1,
        **{f"evals__{name}__every": 2 for name in ("retrieval", "restoration", "losses")},
        method__size=(32, 1, 2, 64), method__decoder=(32, 1, 1, 64),
    )  # fmt: skip
    argv = [f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()]
    demo.main([*argv, "--workdir", str(workdir), "--started", "0"])
    summary = json.loads((workdir / "summary.json").read_text())
    for name in ("t2v_r1", "v2t_r1", "match_accuracy", "words_right", "words_right_without_video"):
        assert 0 <= summary[name] <= 1
    for name in ("restored_db", "interpolated_db", "restored_db_without_caption"):
        assert 0 < summary[name] < 40
    assert summary["steps_done"] == summary["steps"] == 4
    assert all(summary[f"loss_{name}"] > 0 for name in LOSSES)
    stages = {"environment", "corpus", "tokenizer", "training", "evaluation", "pictures", "report"}
    assert set(summary["seconds"]) == stages
    assert summary["seconds_total"] == pytest.approx(sum(summary["seconds"].values()))
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") >= 6
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    "ablation, left_out", [("no_contrast", ("vtc", "vtm")), ("no_masking", ("video", "text"))]
)
def test_losses_left_out_by_an_ablation_are_none(ablation, left_out, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = config.load(f"configs/demo.py:{ablation}")
    computed = [name for name in LOSSES if cfg.method["weights"][name]]
    line = {"step": 2, "train/loss": 1.0} | {f"train/loss_{name}": 0.5 for name in computed}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    numbers = {"retrieval/t2v_r1": 0.1, "retrieval/v2t_r1": 0.2}
    stages = demo.Stages(tmp_path / "stages.json")
    summary = demo.summarise(tmp_path, 4, 2, numbers, stages)
    assert (summary["steps_done"], summary["steps"], summary["t2v_r1"]) == (2, 4, 0.1)
    assert summary["match_accuracy"] is None
    for name in LOSSES:
        assert summary[f"loss_{name}"] == (None if name in left_out else 0.5)


def test_a_demo_that_was_stopped_says_how_far_it_came(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)

    def stopped(cfg, workdir):
        line = {"step": 960, "time": 0.0, "train/loss": 1.0}
        (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (workdir / "config.json").write_text(json.dumps(cfg._asdict()))
        raise stop.Stopped(960, cfg.steps, stop.Exit.INTERRUPTED)

    monkeypatch.setattr(demo, "prepare", lambda *_: None)
    monkeypatch.setattr(demo, "train", stopped)
    with pytest.raises(stop.Stopped):  # whose exit status is not 0
        demo.main(["--workdir", str(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps_done"], summary["steps"], summary["t2v_r1"]) == (960, 2000, None)
    assert "960 of 2000" in capsys.readouterr().out
    assert "960 of 2,000 steps" in (tmp_path / "report.html").read_text("utf-8")


PLAN = shapes.Plan(train=40, val=12)
