"""The demo, shrunk: every stage, the summary's keys, the report; and that it goes on."""

import json

import pytest

from tests.configs import ROOT
from vtp_jax import demo
from vtp_jax.data import shapes


@pytest.mark.parametrize("ablation", [None, "no_contrast", "no_masking"])
def test_demo_from_nothing_to_a_report(ablation, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo.shapes, "Plan", lambda: PLAN)
    corpus, workdir = tmp_path / "shapes", tmp_path / "run"
    changes = dict(
        steps=4, batch=16, data__train__root=corpus, data__train__captions=corpus / "train.csv",
        data__evals__val__root=corpus, data__evals__val__captions=corpus / "val.csv",
        data__text__path=corpus / "tokenizer.model", log__every=2, checkpoint__every=2,
        optim__lr__steps=4, optim__lr__warmup=1, evals__retrieval__every=2,
    )  # fmt: skip
    argv = [f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()]
    argv += ["--workdir", str(workdir), "--started", "0"]
    demo.main([*argv, "--ablation", ablation] if ablation else argv)
    summary = json.loads((workdir / "summary.json").read_text())
    assert 0 <= summary["t2v_r1"] <= 1 and 0 <= summary["v2t_r1"] <= 1
    missing = {None: (), "no_contrast": ("vtc", "vtm"), "no_masking": ("video", "text")}[ablation]
    for name in ("video", "text", "vtc", "vtm"):
        assert (summary[f"loss_{name}"] is None) == (name in missing)
    stages = {"environment", "corpus", "tokenizer", "training", "evaluation", "pictures", "report"}
    assert set(summary["seconds"]) == stages
    assert abs(summary["seconds_total"] - sum(summary["seconds"].values())) < 1e-6
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") >= 6 and "http://" not in page.replace("http://www.w3.org", "")
    assert (ablation or "SimVTP") in page
    assert "report.html" in capsys.readouterr().out


PLAN = shapes.Plan(train=40, val=12)
