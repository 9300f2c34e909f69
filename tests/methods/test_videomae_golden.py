"""VideoMAE, V2 and the classifier on them held to the official code: predictions, losses, logits
and every gradient, 1e-9 relative in fp64.

The numbers come from MCG-NJU/VideoMAE @14ef8d8 and OpenGVLab/VideoMAEv2 @29eab1e. Neither weights
nor inputs are stored: each golden says the rule that makes them from tensor names and seeds.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax import masking
from vtp_jax.convert import rules
from vtp_jax.methods import videomae
from vtp_jax.objectives import classification, reconstruction
from vtp_jax.tasks import classify

GOLDEN = Path(__file__).parents[1] / "golden"
EXTRA = {"base": {}}
NAMES = ("videomae", "videomae_v2")


def load(name: str, part: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}_steps.json").read_text(encoding="utf-8"))[part]


def close(value: Any, scale: float = 0.0) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-9 * scale)


def make_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    draw = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    module = name.rpartition(".")[0]
    if name.endswith(".weight") and "norm" in module:
        value = 1 + 0.1 * draw
    elif len(shape) == 1 or name == "mask_token":
        value = 0.05 * draw
    else:
        value = draw / np.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32).astype(np.float64)


def build(case: dict[str, Any]):
    """The method at the case's sizes, and its batch. Goldens without a decoder get any."""
    parts = [case["encoder"], case.get("decoder", case["encoder"])]
    size, decoder = (
        (x["width"], x["depth"], x["heads"], int(x["width"] * case["mlp_ratio"])) for x in parts
    )
    method = videomae.make(
        size=size, decoder=decoder, cube=case["cube"], dtype="float64",
        decoder_ratio=case.get("decoder_ratio", 0.0),
    )  # fmt: skip
    shape = (case["batch"], case["frames"], *case["size"], 3)
    video = np.random.RandomState(1).randint(0, 256, shape) / 255
    return method, dict(video=jnp.asarray(video), valid=jnp.ones(case["batch"], bool))


def weights(table: list[rules.Rule], method: Any, batch: Any) -> dict[str, Any]:
    """Our parameters by the golden's rule: from the official names and shapes."""
    spec = jax.eval_shape(lambda: batch)
    shapes = jax.eval_shape(lambda key: method.init(key, spec), jax.random.key(0))
    empty = jax.tree.map(lambda s: np.empty(s.shape), shapes)
    theirs = {k: make_tensor(k, v.shape) for k, v in rules.to_theirs(table, empty).items()}
    return jax.tree.map(jnp.asarray, rules.to_ours(table, theirs))


def check_gradients(golden: dict[str, Any], table: list[rules.Rule], grads: Any) -> None:
    """Norms, and products with a fixed draw, which see reordered and transposed tensors too."""
    theirs = rules.to_theirs(table, grads)
    assert theirs.keys() == golden["grad_norms"].keys()
    for name, x in theirs.items():
        norm = float(np.linalg.norm(x))
        assert norm == close(golden["grad_norms"][name]), name
        probe = float(x.ravel() @ np.random.RandomState(4).standard_normal(x.size))
        assert probe == close(golden["grad_probes"][name], norm), name
    total = math.sqrt(sum(float((x**2).sum()) for x in theirs.values()))
    assert total == close(golden["global_grad_norm"])


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_pretraining(name):
    golden = load(name, "pretrain")
    with jax.enable_x64(True):
        method, batch = build(golden)
        net = method.loss.args[0]
        table = rules.videomae(golden["encoder"]["heads"], golden["decoder"]["heads"])
        params = weights(table, method, batch)
        draws = draws_of(golden, net)

        def loss(params):
            predicted, target = videomae.forward(net, params, batch, draws)
            return reconstruction.squared_error(predicted, target, draws.scored).value(), (
                predicted,
                target,
            )

        (value, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        assert int(draws.scored.sum()) == golden.get("scored", draws.scored.size)
        assert float(value) == close(golden["loss"])
        for key, x in zip(("pixel_pred", "target"), outputs, strict=True):
            told = golden[key]
            assert list(x.shape) == told["shape"] and float(x.std()) == close(told["std"])
            assert float(x.mean()) == close(told["mean"], told["std"])
            assert np.ravel(x)[:4].tolist() == close(told["first"])
            assert np.ravel(x)[-4:].tolist() == close(told["last"])
        check_gradients(golden, table, jax.device_get(grads))


def draws_of(golden: dict[str, Any], net: videomae.VideoMAE) -> videomae.Draws:
    sides = (golden["frames"], *golden["size"])
    t, h, w = (a // b for a, b in zip(sides, golden["cube"], strict=True))
    hidden, dropped = golden["masked_per_frame"], np.zeros((golden["batch"], t, h * w), bool)
    for b, row in enumerate(dropped):
        row[:, np.random.RandomState(10 + b).permutation(h * w)[:hidden]] = True
    mask = masking.of_dropped(jnp.asarray(dropped.reshape(len(dropped), -1)), t * hidden)
    if not net.decoder_ratio:
        return videomae.Draws(mask, mask.drop, jnp.ones(mask.drop.shape, bool))
    # The phases that the golden names, among those of the rows of a large draw.
    many = masking.running_cells(jax.random.key(0), 64, (t, h, w), net.decoder_ratio)
    ask = jnp.stack([many.keep[row_of_phase(many, p)] for p in golden["phases"]])
    return videomae.Draws(mask, ask, masking.take(mask.dropped, ask))


def row_of_phase(many: masking.TokenMask, phase: int) -> int:
    """In frame 0 of phase p, place i of a cell is dropped if (p + 1 + i) % 4 < 2 (ratio .5)."""
    first = np.asarray(many.dropped[:, :2])
    wanted = [(phase + 1 + i) % 4 < 2 for i in (0, 1)]
    return int(np.flatnonzero((first == wanted).all(axis=1))[0])


def test_running_cells_are_the_official_ones():
    for told in load("videomae_v2", "running_cells"):
        drawn = masking.running_cells(jax.random.key(0), 64, tuple(told["grid"]), told["ratio"])
        maps = {"".join(str(int(x)) for x in row) for row in np.asarray(drawn.dropped)}
        assert maps == set(told["maps"])


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("giant_patch14", dict(size="g", cube=(2, 14, 14))),
        ("huge_patch16", dict(size="H", decoder=(512, 4, 8, 2048))),
        ("base_patch16", dict(size="B")),
    ],
)
def test_parameters_of_the_published_models(name, recipe):
    spec = dict(video=jax.ShapeDtypeStruct((2, 16, 224, 224, 3), np.uint8))
    shapes = jax.eval_shape(lambda k: videomae.make(**recipe).init(k, spec), jax.random.key(0))
    found = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert found == load("videomae_v2", "parameters")[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_the_classifier(name):
    golden = load(name, "finetune")
    with jax.enable_x64(True):
        base, batch = build(golden)
        task = classify.make(
            base=base,
            classes=golden["classes"],
            drop=["decoder.*", "encoder_to_decoder.*", "mask_token", "encoder_norm.*"],
        )
        table = rules.videomae_finetune(golden["encoder"]["heads"])
        params = weights(table, task, {**batch, "label": jnp.zeros(golden["batch"], jnp.int32)})
        share, classify_video = golden["share"], jax.jit(task.encode["classes"])
        logits = classify_video(params, EXTRA, batch)["classes"]
        np.testing.assert_allclose(logits, golden["logits"], rtol=1e-9, atol=1e-9)
        target = classification.smooth(
            jnp.asarray(golden["labels"]), golden["classes"], golden["smoothing"]
        )
        video, target = (share * x + (1 - share) * x[::-1] for x in (batch["video"], target))

        def loss(params):
            logits = task.encode["classes"](params, EXTRA, {**batch, "video": video})["classes"]
            return classification.soft_cross_entropy(logits, target, batch["valid"]).value(), logits

        (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        np.testing.assert_allclose(logits, golden["mixed_logits"], rtol=1e-9, atol=1e-9)
        assert float(value) == close(golden["loss"])
        check_gradients(golden, table, jax.device_get(grads))
