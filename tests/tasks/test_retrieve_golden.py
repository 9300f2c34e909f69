"""The dual tower held to the authors' fine-tuning model: embeddings, cosines, loss and gradients.

As tests/methods/test_simvtp_golden.py: the numbers come from the authors' code (mirror
wufeim/SimVTP @558d24e) in fp64, weights and inputs from a rule, through the parity entry.
"""

import json
import re
import shutil
from typing import Any

import numpy as np
import pytest

from tests.parity import FILES, GOLDEN, check_output, check_probe, close, make_tensor, run_entry
from vtp_jax import parity
from vtp_jax.types import UserError

CASES = json.loads((GOLDEN / "simvtp_finetune_tiny.json").read_text(encoding="utf-8"))["cases"]
CLS, SEP, PAD, CUBE = 101, 102, 0, (2, 16, 16)
OUTPUTS = {"video", "text", "sim", "loss"}


def name_tensors(case: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every parameter, those that no tower uses among them."""
    d, mlp = case["width"], case["mlp"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outs: int, ins: int) -> None:
        shapes.update({f"{name}.weight": (outs, ins), f"{name}.bias": (outs,)})

    for tower in ("video_encoder", "text_encoder"):
        shapes[f"{tower}.patch_embed.proj.weight"] = (d, 3, *CUBE)
        shapes[f"{tower}.patch_embed.proj.bias"] = (d,)
        norms = [f"{tower}.fc_norm", f"{tower}.text_embeddings.LayerNorm"]
        for i in range(case["depth"]):
            block = f"{tower}.blocks.{i}"
            norms += [f"{block}.norm1", f"{block}.norm2"]
            shapes[f"{block}.attn.qkv.weight"] = (3 * d, d)
            shapes[f"{block}.attn.q_bias"] = shapes[f"{block}.attn.v_bias"] = (d,)
            linear(f"{block}.attn.proj", d, d)
            linear(f"{block}.mlp.fc1", mlp, d)
            linear(f"{block}.mlp.fc2", d, mlp)
        shapes.update({f"{n}.{x}": (d,) for n in norms for x in ("weight", "bias")})
        tables = dict(word=case["vocab"], position=case["positions"], token_type=2)
        for table, rows in tables.items():
            shapes[f"{tower}.text_embeddings.{table}_embeddings.weight"] = (rows, d)
    return shapes


def make_inputs(case: dict[str, Any]) -> dict[str, np.ndarray]:
    b, length = case["batch"], case["text_len"]
    video = np.random.RandomState(1).standard_normal((b, 3, case["frames"], *case["size"]))
    ids = np.random.RandomState(2).randint(*case["ids"], (b, length))
    for row, words in enumerate(case["lens"]):
        ids[row, 0], ids[row, words - 1], ids[row, words:] = CLS, SEP, PAD
    mask = (np.arange(length) < np.array(case["lens"])[:, None]).astype(np.int64)
    return dict(video=video.astype(np.float32), ids=ids, attention_mask=mask)


def make_weights(case: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: make_tensor(name, shape) for name, shape in name_tensors(case).items()}


def used(name: str) -> bool:
    return not re.search("video_encoder.text_embeddings|text_encoder.patch_embed", name)


def check_outputs(out: dict[str, np.ndarray], golden: dict[str, Any]) -> None:
    check_output(out["video"], golden["video"])
    check_output(out["text"], golden["text"])
    np.testing.assert_allclose(out["sim"], golden["sim"], rtol=1e-9, atol=1e-11)
    assert out["loss"].shape == () and float(out["loss"]) == close(golden["loss"])
    assert {x.dtype for x in out.values()} == {np.dtype(np.float64)}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, np.ndarray]:
    """With everything that a released file holds."""
    folder, case = tmp_path_factory.mktemp("small"), CASES["small"]
    buffers = {
        f"{tower}.text_embeddings.position_ids": np.arange(case["positions"])[None]
        for tower in ("video_encoder", "text_encoder")
    }
    np.savez(folder / FILES["weights"], **make_weights(case), **buffers)
    np.savez(folder / FILES["inputs"], **make_inputs(case))
    return run_entry("simvtp_finetune", folder, "--grads")


def test_embeddings_cosines_and_loss(small):
    check_outputs(small, CASES["small"])


def test_every_gradient(small):
    golden, shapes = CASES["small"], name_tensors(CASES["small"])
    assert set(small) == OUTPUTS | {f"grad/{name}" for name in shapes}
    assert golden["grad_norms"].keys() == golden["grad_probes"].keys() == shapes.keys()
    for name, shape in shapes.items():
        gradient = small[f"grad/{name}"]
        assert gradient.shape == shape, name
        assert float(np.linalg.norm(gradient)) == close(golden["grad_norms"][name]), name
        check_probe(gradient, golden["grad_probes"][name])
        assert gradient.any() == used(name), name
    square = sum(float(np.sum(x**2)) for k, x in small.items() if k.startswith("grad/"))
    assert square**0.5 == close(golden["global_grad_norm"])


@pytest.mark.slow(reason="a process of its own, at released widths")
def test_released_widths_from_a_file_that_holds_only_what_is_used(tmp_path):
    case = CASES["released"]
    weights = {name: x for name, x in make_weights(case).items() if used(name)}
    np.savez(tmp_path / FILES["weights"], **weights)
    np.savez(tmp_path / FILES["inputs"], **make_inputs(case))
    out = run_entry("simvtp_finetune", tmp_path)
    shutil.rmtree(tmp_path)  # its word table weighs 94 MB
    assert set(out) == OUTPUTS
    check_outputs(out, case)


WRONG = {
    "inputs have no 'attention_mask'": lambda w, i: i.pop("attention_mask"),
    "must be (B, 3, T, H, W)": lambda w, i: i.update(video=i["video"][:, :2]),
    "ids beyond the vocabulary of 1200": lambda w, i: i.update(ids=i["ids"] + 1200),
    "inputs['attention_mask'] is (4, 8); it must be (4, 9)": lambda w, i: i.update(
        attention_mask=i["attention_mask"][:, 1:]
    ),
    "missing ['text_encoder.fc_norm.bias'], unexpected none": lambda w, i: w.pop(
        "text_encoder.fc_norm.bias"
    ),
    "unexpected ['video_encoder.norm.bias']": lambda w, i: w.update(
        {"video_encoder.norm.bias": np.zeros(128)}
    ),
    "not of one size: video (128, 3, 2, 384), text (128, 2, 2, 384)": lambda w, i: [
        w.pop(name) for name in list(w) if name.startswith("text_encoder.blocks.2")
    ],
    "video_norm/scale is (64,), not (128,)": lambda w, i: w.update(
        {f"video_encoder.fc_norm.{x}": np.ones(64) for x in ("weight", "bias")}
    ),
}


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")  # the entry turns it on
@pytest.mark.parametrize("told", WRONG)
def test_what_does_not_fit_together_is_told_in_one_line(told):
    weights, inputs = make_weights(CASES["small"]), make_inputs(CASES["small"])
    WRONG[told](weights, inputs)
    with pytest.raises(UserError) as error:
        parity.simvtp_finetune(weights, inputs, grads=False)
    assert told in str(error.value) and "\n" not in str(error.value)
