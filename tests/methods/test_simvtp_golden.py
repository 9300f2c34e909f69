"""SimVTP held to the authors' released model: losses, outputs and gradients, 1e-9 relative in fp64.

The numbers in tests/golden come from the authors' code (mirror wufeim/SimVTP @558d24e) in fp64 with
dropout off. Neither weights nor inputs are stored: a rule makes them from tensor names and seeds.
They go through `python -m vtp_jax.parity`, so that the entry is tested too. `simvtp_tiny` has the
released widths; `simvtp_small` differs in every size (8 frames that are not square, one head in
the decoder, another MLP ratio and vocabulary, negatives that are no shift), so that no constant of
the first can hide in the code.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.parity import (
    FILES,
    GOLDEN,
    TOLERANCE,
    check_output,
    check_probe,
    close,
    make_tensor,
    run_entry,
)

CLS, SEP, MASK, PAD = 101, 102, 103, 0
CUBE, PATCH = (2, 16, 16), 3 * 2 * 16 * 16
OUTPUTS = ("target", "pixel_pred", "mlm_logits", "vtm_logits", "text_feat", "video_feat")
TABLES = ("word", "position", "token_type")
LOSSES = ("loss_v", "loss_t", "loss_vtc", "loss_vtm", "loss")
# What the tiny golden takes for granted: ViT-B's widths with two and one blocks.
RELEASED = dict(
    encoder=dict(width=768, depth=2, mlp=3072),
    decoder=dict(width=384, depth=1, mlp=1536),
    frames=16,
    vocab=30522,
    positions=512,
    ids=[1000, 30000],
)


def describe(golden: dict[str, Any]) -> dict[str, Any]:
    """The golden with all that its rule takes for granted spelt out."""
    case = RELEASED | golden
    if isinstance(case["size"], int):
        case["size"] = [case["size"]] * 2
    case.setdefault("negatives", [(i + 1) % case["batch"] for i in range(case["batch"])])
    return case


def name_tensors(case: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every parameter of the released model at this size."""
    width, narrow = case["encoder"]["width"], case["decoder"]["width"]
    shapes: dict[str, tuple[int, ...]] = {"mask_token": (1, 1, narrow)}

    def linear(name: str, outs: int, ins: int) -> None:
        shapes.update({f"{name}.weight": (outs, ins), f"{name}.bias": (outs,)})

    def norm(name: str, d: int) -> None:
        shapes.update({f"{name}.weight": (d,), f"{name}.bias": (d,)})

    shapes["encoder.patch_embed.proj.weight"] = (width, 3, *CUBE)
    shapes["encoder.patch_embed.proj.bias"] = (width,)
    for part in ("encoder", "decoder"):
        d, mlp = case[part]["width"], case[part]["mlp"]
        for i in range(case[part]["depth"]):
            block = f"{part}.blocks.{i}"
            norm(f"{block}.norm1", d)
            norm(f"{block}.norm2", d)
            shapes[f"{block}.attn.qkv.weight"] = (3 * d, d)
            shapes[f"{block}.attn.q_bias"] = shapes[f"{block}.attn.v_bias"] = (d,)
            linear(f"{block}.attn.proj", d, d)
            linear(f"{block}.mlp.fc1", mlp, d)
            linear(f"{block}.mlp.fc2", d, mlp)
        norm(f"{part}.norm", d)
    linear("decoder.head", PATCH, narrow)
    shapes["encoder_to_decoder.weight"] = (narrow, width)
    for table, rows in zip(TABLES, (case["vocab"], case["positions"], 2), strict=True):
        shapes[f"text_embeddings.{table}_embeddings.weight"] = (rows, width)
    norm("text_embeddings.LayerNorm", width)
    linear("text_cls", case["vocab"], width)
    linear("vtm_head", 2, width)
    return shapes


def make_inputs(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """A batch by the rule of the golden, as the parity entry takes it."""
    b, length, (height, width) = case["batch"], case["text_len"], case["size"]
    slots, places = case["frames"] // CUBE[0], (height // CUBE[1]) * (width // CUBE[2])
    video = np.random.RandomState(1).standard_normal((b, 3, case["frames"], height, width))
    low, high = case["ids"]
    ids = np.random.RandomState(2).randint(low, high, (b, length))
    mask = np.zeros((b, slots, places), bool)
    for row, words in enumerate(case["lens"]):
        ids[row, 0], ids[row, words - 1], ids[row, words:] = CLS, SEP, PAD
        order = np.random.RandomState(10 + row).permutation(places)
        mask[row][:, order[: case["masked_per_frame"]]] = True
    asked = (np.random.RandomState(3).uniform(size=(b, length)) < 0.75) & (ids >= low)
    return dict(
        video=video.astype(np.float32),
        mask=mask.reshape(b, -1),
        ids=np.where(asked, MASK, ids),
        labels=np.where(asked, ids, -100),
        attention_mask=(np.arange(length) < np.array(case["lens"])[:, None]).astype(np.int64),
        negatives=np.array(case["negatives"]),
    )


class Result(NamedTuple):
    golden: dict[str, Any]
    inputs: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    folder: Path
    out: dict[str, np.ndarray]


def run_case(name: str, folder: Path) -> Result:
    (golden,) = json.loads((GOLDEN / f"{name}.json").read_text()).values()
    case = describe(golden)
    shapes, inputs = name_tensors(case), make_inputs(case)
    weights = {tensor: make_tensor(tensor, shape) for tensor, shape in shapes.items()}
    # Files written with the libraries of 2022 hold this buffer too.
    weights["text_embeddings.position_ids"] = np.arange(case["positions"])[None]
    np.savez(folder / FILES["weights"], **weights)
    np.savez(folder / FILES["inputs"], **inputs)
    return Result(golden, inputs, shapes, folder, run_entry("simvtp", folder, "--grads"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Result:
    return run_case("simvtp_small", tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("tiny")
    yield run_case("simvtp_tiny", folder)
    shutil.rmtree(folder)  # its word tables weigh 750 MB


@pytest.fixture(scope="module", params=["small", "tiny"])
def result(request) -> Result:
    return request.getfixturevalue(request.param)


def test_the_rule_masks_the_words_that_the_golden_counted(result):
    assert (result.inputs["labels"] != -100).sum() == result.golden["n_masked_words"]


def test_everything_is_there_in_fp64(result):
    wanted = {*OUTPUTS, *LOSSES, *(f"grad/{name}" for name in result.shapes)}
    assert set(result.out) == wanted
    assert {k: x.dtype for k, x in result.out.items() if x.dtype != np.float64} == {}
    wrong = {n for n, shape in result.shapes.items() if result.out[f"grad/{n}"].shape != shape}
    assert wrong == set()


@pytest.mark.parametrize("name", LOSSES)
def test_losses(result, name):
    assert result.out[name].shape == ()
    assert float(result.out[name]) == close(result.golden[name])


@pytest.mark.parametrize("name", [n for n in OUTPUTS if n != "vtm_logits"])
def test_outputs(result, name):
    check_output(result.out[name], result.golden[name])


def test_matching_logits_right_pairs_first(result):
    golden = np.array(result.golden["vtm_logits"])
    assert result.out["vtm_logits"].shape == golden.shape
    np.testing.assert_allclose(result.out["vtm_logits"], golden, rtol=TOLERANCE)


def test_gradient_norms(result):
    golden = result.golden["grad_norms"]
    ours = {name: float(np.linalg.norm(result.out[f"grad/{name}"])) for name in golden}
    assert ours == close(golden)
    square = sum(float(np.sum(x**2)) for k, x in result.out.items() if k.startswith("grad/"))
    assert square**0.5 == close(result.golden["global_grad_norm"])


def test_gradients_where_nothing_flows_are_exactly_zero(result):
    """The reference's [PAD] row is cut off; the rest was not looked up."""
    gradient = {n: result.out[f"grad/text_embeddings.{n}_embeddings.weight"] for n in TABLES}
    words = np.unique(result.inputs["ids"])
    used = np.flatnonzero(np.any(gradient["word"] != 0, axis=1))
    assert used.tolist() == words[words != PAD].tolist()
    assert PAD in words  # or the row would prove nothing
    assert not gradient["position"][result.inputs["ids"].shape[1] :].any()
    assert not gradient["token_type"][1].any()


def test_gradients_entry_by_entry(small):
    probes = small.golden["grad_probes"]
    assert set(probes) == set(small.shapes)
    for name, golden in probes.items():
        check_probe(small.out[f"grad/{name}"], golden)


def test_without_grads_only_the_gradients_are_missing(small):
    out = run_entry("simvtp", small.folder)
    assert set(out) == {*OUTPUTS, *LOSSES}
    assert {name: float(out[name]) for name in LOSSES} == close(
        {name: small.golden[name] for name in LOSSES}
    )
