"""The dual tower against the authors' fine-tuning model: embeddings, cosines, loss and gradients.

As tests/methods/test_simvtp_golden.py: the numbers come from the authors' code (mirror
wufeim/SimVTP @558d24e), and ours from the entry `vtp parity`. Once it runs as users run it, in a
process of its own that is compiled with XLA's usual passes.
"""

import re
import shutil

import numpy as np
import pytest

from tests import goldens
from tests.goldens import Golden, check_output, close
from tests.parity import run_entry
from vtp_jax.types import UserError

OUTPUTS = {"video", "text", "sim", "loss"}


def used(name: str) -> bool:
    return not re.search("video_encoder.text_embeddings|text_encoder.patch_embed", name)


def check_outputs(out: dict[str, np.ndarray], golden: Golden) -> None:
    check_output(out["video"], golden.case["video"])
    check_output(out["text"], golden.case["text"])
    np.testing.assert_allclose(out["sim"], golden.case["sim"], rtol=1e-9, atol=1e-11)
    assert out["loss"].shape == () and float(out["loss"]) == close(golden.losses["loss"])
    assert {x.dtype for x in out.values()} == {np.dtype(np.float64)}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return goldens.simvtp_finetune("small")


def test_a_process_computes_the_official_embeddings_cosines_and_loss(golden, tmp_path):
    out = run_entry("simvtp_finetune", tmp_path, golden.weights, golden.inputs, process=True)
    assert set(out) == OUTPUTS  # no gradient, which was not asked for
    check_outputs(out, golden)


def test_every_gradient_is_the_official_one(golden, tmp_path):
    """From everything that a released file holds."""
    position_ids = np.arange(golden.case["positions"])[None]
    towers = ("video_encoder", "text_encoder")
    buffers = {f"{tower}.text_embeddings.position_ids": position_ids for tower in towers}
    weights = {**golden.weights, **buffers}
    small = run_entry("simvtp_finetune", tmp_path, weights, golden.inputs, "--grads")
    check_outputs(small, golden)
    assert set(small) == OUTPUTS | {f"grad/{name}" for name in golden.weights}
    assert golden.norms.keys() == golden.probes.keys() == golden.weights.keys()
    goldens.check_gradients(golden, small)
    for name, x in golden.weights.items():
        gradient = small[f"grad/{name}"]
        assert gradient.shape == x.shape, name
        assert gradient.any() == used(name), name


@pytest.mark.slow(reason="the same step at released widths")
def test_released_widths_from_a_file_that_holds_only_what_is_used(tmp_path):
    golden = goldens.simvtp_finetune("released")
    weights = {name: x for name, x in golden.weights.items() if used(name)}
    out = run_entry("simvtp_finetune", tmp_path, weights, golden.inputs)
    shutil.rmtree(tmp_path)  # its word table takes 94 MB
    assert set(out) == OUTPUTS
    check_outputs(out, golden)


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


@pytest.mark.parametrize("text", WRONG)
def test_inputs_that_do_not_fit_together_are_reported_in_one_line(golden, text):
    weights, inputs = dict(golden.weights), dict(golden.inputs)
    WRONG[text](weights, inputs)
    with pytest.raises(UserError) as error:
        golden._replace(weights=weights, inputs=inputs).run(grads=False)
    assert text in str(error.value) and "\n" not in str(error.value)
