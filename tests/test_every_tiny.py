"""Tiny configs train, evaluate and write their files through the real `main`, on one device:
VideoMAE's in the fast suite, the others in `make test-all`. test_train.py and test_demo.py run the
demo's on eight."""

import jax
import pytest

from tests.configs import ROOT, config_files, slow_unless, switches
from vtp_jax import train
from vtp_jax.run import metrics, sharding
from vtp_jax.setup import config

QUICK = ["configs/videomae/pretrain_k400.py:tiny"]


@pytest.mark.parametrize("path", config_files())
def test_every_config_has_a_switch_tiny(path):
    lacking = f'{path}: no switch tiny; name it in a literal call: parse_arg(arg, "tiny", ...)'
    assert "tiny" in switches(path), lacking


@pytest.mark.parametrize("path", slow_unless(QUICK, "a minute of compiling"))
def test_a_tiny_config_trains_evaluates_and_writes_its_files(path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    one = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda **axes: one)
    train.main(["--config", path, "--workdir", str(tmp_path)])
    lines = metrics.read(tmp_path / "metrics.jsonl")
    cfg = config.load(str(tmp_path / "config.json"))
    assert lines[-1]["step"] == cfg.steps
    losses = [x["train/loss"] for x in lines if "train/loss" in x]
    assert losses[-1] < losses[0]
    assert any(k.startswith("eval/") for x in lines for k in x)
    assert (tmp_path / "checkpoints" / str(cfg.steps)).is_dir()
    assert (tmp_path / "parameters.txt").read_text()
    out = capsys.readouterr().out
    assert f"step {cfg.steps}/{cfg.steps}" in out and "\x1b" not in out and "\r" not in out
