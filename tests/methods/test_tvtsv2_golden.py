"""TVTSv2 held to the official code: embeddings, turns, losses and every gradient, 1e-9 relative in
fp64. Neither weights nor inputs are stored: the golden says the rule that makes them."""

import functools
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
from vtp_jax.methods import tvtsv2

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/tvtsv2_tiny.json").read_text("utf-8"))
CASE = GOLDEN["case"]
NAMES = rules.tvtsv2(*(CASE[x] for x in ("heads", "sorter_heads", "text_heads")))


def close(value: Any, scale: float = 0.0) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-9 * scale)


def make_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    draw = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    module = name.split(".")[-2] if "." in name else ""
    if name.endswith(".weight") and module.startswith(("ln_", "norm", "text_ln_")):
        value = 1 + 0.1 * draw
    elif len(shape) == 1:
        value = 0.05 * draw
    else:
        value = draw / np.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32).astype(np.float64)


def inputs() -> tuple[dict[str, Any], Any]:
    """The batch, and the mask with the places that are kept."""
    b, t, side, k, n = (CASE[x] for x in ("batch", "frames", "size", "turns", "length"))
    video = np.random.RandomState(1).standard_normal((b, t, 3, side, side)).astype(np.float32)
    ids = np.random.RandomState(2).randint(1, 48, (b, k, n))
    ends = np.random.RandomState(3).randint(3, n, (b, k, 1))
    ids = np.where(np.arange(n) < ends, ids, np.where(np.arange(n) == ends, 49, 0))
    places = (side // CASE["patch"]) ** 2
    dropped = np.ones((b, t, places), bool)
    for i, row in enumerate(dropped):
        row[:, np.random.RandomState(10 + i).permutation(places)[: CASE["kept"]]] = False
    mask = masking.of_dropped(jnp.asarray(dropped.reshape(b, -1)), t * (places - CASE["kept"]))
    batch = dict(
        video=jnp.asarray(np.float64(video).transpose(0, 1, 3, 4, 2)),
        text=jnp.asarray(ids, jnp.int32),
        valid=jnp.ones(b, bool),
    )
    return batch, mask


def check(x: Any, told: dict[str, Any]) -> None:
    x = np.asarray(x)
    assert list(x.shape) == told["shape"] and float(x.std()) == close(told["std"])
    assert float(x.mean()) == close(told["mean"], told["std"])
    assert x.ravel()[:4].tolist() == close(told["first"], told["std"])
    assert x.ravel()[-4:].tolist() == close(told["last"], told["std"])


def build(batch: dict[str, Any], **options: Any) -> tuple[tvtsv2.TVTSv2, tvtsv2.Recipe, Any]:
    """The net at the golden's sizes, its recipe and its parameters."""
    net, recipe = tvtsv2.build(
        size=[CASE[x] for x in ("width", "depth", "heads", "mlp")],
        text_size=[CASE[f"text_{x}"] for x in ("width", "depth", "heads", "mlp")],
        features=CASE["features"], side=CASE["size"], patch=CASE["patch"],
        frames=CASE["table"], turns=CASE["turns"], vocab_size=CASE["vocab"],
        text_length=CASE["length"], dtype="float64", mean=(0.0,) * 3, std=(1.0,) * 3, **options,
    )  # fmt: skip
    spec = jax.eval_shape(lambda: batch)
    shapes = jax.eval_shape(lambda key: tvtsv2.init(net, recipe, key, spec), jax.random.key(0))
    empty = rules.to_theirs(NAMES, jax.tree.map(lambda s: np.empty(s.shape), shapes))
    theirs = {name: make_tensor(name, x.shape) for name, x in empty.items()}
    return net, recipe, jax.tree.map(jnp.asarray, rules.to_ours(NAMES, theirs))


def test_a_step_is_the_official_codes():
    told = GOLDEN["four"]
    with jax.enable_x64(True):
        batch, mask = inputs()
        net, recipe, params = build(batch)

        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def run(params):
            out = tvtsv2.forward(net, params, batch, mask)
            found = tvtsv2.losses(recipe, out, batch["valid"])
            vtc, sort = (found[f"loss_{x}"].value() for x in ("vtc", "sort"))
            return vtc + 2 * sort, (out, vtc, sort)

        (value, (out, vtc, sort)), grads = run(params)
        assert float(vtc) == close(told["loss_vtc"]) and float(value) == close(told["loss"])
        assert 2 * float(sort) == close(told["loss_sort_times_two"])
        check(out.video[:, 0], told["video"])
        check(out.texts.mean(axis=1), told["text"])
        check(out.turns, told["turns"])
        theirs = rules.to_theirs(NAMES, jax.device_get(grads))
        assert theirs.keys() == told["grad_norms"].keys()
        for name, x in theirs.items():
            norm = float(np.linalg.norm(x))
            assert norm == close(told["grad_norms"][name]), name
            probe = float(x.ravel() @ np.random.RandomState(4).standard_normal(x.size))
            assert probe == close(told["grad_probes"][name], norm), name
        total = math.sqrt(sum(float((x**2).sum()) for x in theirs.values()))
        assert total == close(told["global_grad_norm"])


@pytest.mark.parametrize(
    "kind, options",
    [
        ("one", {}),  # WebVid's rows: a caption, and nothing to sort
        ("patches", dict(sorted_by="patches", act="gelu")),  # H/14's code
    ],
)
def test_other_outputs_are_the_official_codes(kind, options):
    told = GOLDEN[kind]
    with jax.enable_x64(True):
        batch, mask = inputs()
        net, recipe, params = build(batch, **options)
        if kind == "one":
            batch["text"] = batch["text"][:, 0]
        out = jax.jit(lambda p: tvtsv2.forward(net, p, batch, mask))(params)
        found = {k: float(x.value()) for k, x in tvtsv2.losses(recipe, out, batch["valid"]).items()}
        assert found["loss_vtc"] == close(told["loss_vtc"])
        assert found["loss_vtc"] + 2 * found["loss_sort"] == close(told["loss"])
        check(out.video[:, 0], told["video"])
        check(out.texts.mean(axis=1), told["text"])
        assert (out.turns is None) == ("turns" not in told)
        if out.turns is not None:
            check(out.turns, told["turns"])
