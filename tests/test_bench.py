"""`vtp bench`: on synthetic input, without TensorFlow, with one line for each run."""

import json
import sys

import jax
import pytest

from benchmarks import step_cpu
from tests.configs import ROOT
from vtp_jax import bench
from vtp_jax.data import outline
from vtp_jax.measure import flops, synthetic, timing
from vtp_jax.methods import simvtp
from vtp_jax.nn import sizes
from vtp_jax.setup import config
from vtp_jax.types import UserError, check_batch

CONFIG = str(ROOT / "configs/videomae/pretrain_k400.py:tiny")


@pytest.mark.slow(reason="a process that compiles a step")
def test_a_step_is_measured_without_tensorflow_and_leaves_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setattr(timing, "SQUARE", dict(cpu=(64, 2)))
    out, trace = tmp_path / "step.jsonl", tmp_path / "trace"
    options = ["--steps", "1", "--batch", "8", "--out", str(out), "--profile", str(trace)]
    bench.main(["step", "--config", CONFIG, *options])
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["batch"] == 8 and line["config"] == CONFIG and "mfu" in capsys.readouterr().out
    assert all(line[k] > 0 for k in ("step_ms", "clips_per_s", "mfu", "memory_gib", "model_tflop"))
    assert list(trace.rglob("*.xplane.pb"))


def test_synthetic_batches_are_within_the_outline():
    cfg = config.load(str(ROOT / "configs/simvtp/pretrain_webvid.py:tiny"))
    spec, facts = outline.describe(cfg.data, 4)
    batch = synthetic.fill(spec, facts)
    check_batch(batch)
    assert {k: v.shape for k, v in batch.items()} == {k: v.shape for k, v in spec.items()}
    assert batch["valid"].all() and batch["text"].max() < facts["vocab_size"]


def test_simvtps_program_computes_what_the_method_must():
    """To 0.3 %, which packing video and words into one pass costs."""
    spec, facts = outline.describe(step_cpu.DATA, 2)
    words = {k: facts[k] for k in ("vocab_size", "pad_id", "mask_id")}
    method = simvtp.make(size="B", dtype="float32", **words)
    params = jax.eval_shape(lambda: method.init(jax.random.key(0), spec))
    counted = flops.forward(method, params, {}, spec) / 2 / 1e9
    parts = step_cpu.must_compute(sizes.ENCODERS["B"], sizes.DECODERS["B"])
    assert 1 <= counted / sum(parts.values()) < 1.003


@pytest.mark.parametrize("argv, message", [([], "which command"), (["stop"], "mean 'step'")])
def test_an_absent_or_unknown_command_is_rejected(argv, message):
    with pytest.raises(UserError, match=message):
        bench.main(argv)
