"""Holds a method against its reference implementation, number for number, in fp64.

    python -m vtp_jax.parity simvtp --weights W.npz --inputs I.npz --out O.npz [--grads]

Weights come in the reference's own names; every size is read off the arrays. All that is random in
training is given as input, dropout is off, and the reference's quirks are on.
"""

from __future__ import annotations

import argparse
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vtp_jax import cli, masking, tree
from vtp_jax.convert import rules
from vtp_jax.methods import simvtp as method
from vtp_jax.nn import embed
from vtp_jax.nn.sizes import Size
from vtp_jax.types import UserError

HEAD = 64  # every published size of SimVTP and of VideoMAE up to L has heads of this width
MEAN, STD = (
    [float(np.float32(x)) for x in v] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)
QUIRKS: dict[str, Any] = dict(
    contrast_text="masked", match_text="masked", pool_padding=True, sum_directions=True
)  # fmt: skip
INPUTS = ("video", "mask", "ids", "labels", "attention_mask", "negatives")


def size_of(weights: Mapping[str, np.ndarray], prefix: str) -> Size:
    """The size of the blocks `prefix.{i}.`, from their tensors."""
    layers = rules.depth(weights, f"{prefix}.blocks")
    if f"{prefix}.blocks.0.mlp.fc1.weight" not in weights:
        raise UserError(
            f"weights have no '{prefix}.blocks.0.mlp.fc1.weight'; names must be official"
        )
    mlp, width = weights[f"{prefix}.blocks.0.mlp.fc1.weight"].shape
    if width % HEAD:
        raise UserError(f"{prefix}: width {width} is no multiple of {HEAD}, the width of a head")
    return Size(width, layers, width // HEAD, mlp)


def simvtp(
    weights: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray], grads: bool
) -> dict[str, np.ndarray]:
    """SimVTP pretraining as released (wufeim/SimVTP @558d24e).

    weights: official tensor names (227 for ViT-B). inputs: video (B, 3, T, H, W) normalised with
    ImageNet's statistics; mask (B, N), True = hidden; ids (B, L), hidden words already replaced;
    labels (B, L), -100 where nothing is asked; attention_mask (B, L); negatives (B,).
    Returns target, pixel_pred, mlm_logits, vtm_logits, text_feat, video_feat, loss_v, loss_t,
    loss_vtc, loss_vtm, loss, and with `grads` grad/<official name>; all fp64.
    """
    if missing := [name for name in INPUTS if name not in inputs]:
        raise UserError(f"inputs have no '{missing[0]}'; needed: {', '.join(INPUTS)}")
    weights = {k: v for k, v in weights.items() if not k.endswith("position_ids")}
    encoder, decoder = size_of(weights, "encoder"), size_of(weights, "decoder")
    table = rules.simvtp(encoder.heads, decoder.heads)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), rules.to_ours(table, weights))
    net = method.SimVTP(
        encoder,
        decoder,
        cube=params["patch_embed"]["kernel"].shape[:3],
        vocab_size=params["text_embed"]["word"].shape[0],
        text_length=params["text_embed"]["position"].shape[0],
        dropout=0.0,
        dtype="float64",
        mean=tuple(MEAN),
        std=tuple(STD),
        remat="nothing_saveable",
        **QUIRKS,
    )

    check_shapes(method_shapes(net, inputs["video"].shape), params)
    check_inputs(inputs, net)
    hidden = np.asarray(inputs["mask"], bool)
    counts = hidden.sum(axis=1)
    asked = np.asarray(inputs["labels"]) != -100
    ids = np.asarray(inputs["ids"], np.int32)
    rows = len(ids)
    pixels = np.asarray(inputs["video"], np.float64).transpose(0, 2, 3, 4, 1) * STD + MEAN
    batch = dict(
        valid=jnp.ones(rows, bool),
        video=jnp.asarray(pixels),
        text=jnp.asarray(np.where(asked, inputs["labels"], ids), jnp.int32),
        text_mask=jnp.asarray(np.asarray(inputs["attention_mask"], bool)),
    )
    draws = method.Draws(
        masking.of_dropped(jnp.asarray(hidden), int(counts[0])),
        jnp.asarray(asked),
        jnp.asarray(ids),
        jnp.asarray(inputs["negatives"], jnp.int32),
    )

    def compare(params: Any) -> Any:
        out = method.forward(net, params, batch, draws)
        found = method.terms(net, out, batch, draws)
        return method.total(net, found), (out, found)

    if grads:
        run = jax.jit(jax.value_and_grad(compare, has_aux=True))
        (loss, (out, found)), gradient = run(params)
    else:
        loss, (out, found) = jax.jit(compare)(params)
        gradient = None
    result = dict(
        target=out.target, pixel_pred=out.pixels, mlm_logits=out.words, vtm_logits=out.match,
        text_feat=out.text, video_feat=out.video, loss=loss,
        loss_v=found["loss_video"].value(), loss_t=found["loss_text"].value(),
        loss_vtc=found["loss_vtc"].value(), loss_vtm=found["loss_vtm"].value(),
    )  # fmt: skip
    if gradient is not None:
        theirs = rules.to_theirs(table, gradient)
        result.update({f"grad/{name}": g for name, g in theirs.items()})
    return {name: np.asarray(x) for name, x in result.items()}


def method_shapes(net: method.SimVTP, video: tuple[int, ...]) -> Any:
    """The shapes of the net's parameters, for a video (B, C, T, H, W)."""
    b, c, t, h, w = video
    spec = dict(
        video=jax.ShapeDtypeStruct((b, t, h, w, c), np.uint8),
        text=jax.ShapeDtypeStruct((b, 1), np.int32),
    )
    return jax.eval_shape(lambda key: method.init(net, key, spec), jax.random.key(0))


def check_shapes(expected: Any, params: Any) -> None:
    """Raises UserError naming every tensor whose shape the others do not allow."""
    want, got = tree.flatten(expected), tree.flatten(params)
    wrong = [
        f"{name} is {got[name].shape}, not {want[name].shape}"
        for name in want
        if name in got and got[name].shape != want[name].shape
    ]
    if wrong:
        raise UserError(f"weights do not fit together: {'; '.join(wrong)}")


def check_inputs(inputs: Mapping[str, np.ndarray], net: method.SimVTP) -> None:
    """Raises UserError on inputs that would give numbers without a meaning."""
    b, _, *sides = inputs["video"].shape
    n = math.prod(embed.grid_of((b, *sides, 3), net.cube))
    length = inputs["ids"].shape[-1]
    shapes = dict(
        mask=(b, n), ids=(b, length), labels=(b, length), attention_mask=(b, length), negatives=(b,)
    )
    for name, shape in shapes.items():
        if inputs[name].shape != shape:
            raise UserError(f"inputs['{name}'] is {inputs[name].shape}; it must be {shape}")
    hidden = np.asarray(inputs["mask"], bool).sum(axis=1)
    if (hidden != hidden[0]).any():
        raise UserError("inputs['mask'] hides different numbers of tokens in different rows")
    negatives = np.asarray(inputs["negatives"])
    if ((negatives < 0) | (negatives >= b) | (negatives == np.arange(b))).any():
        raise UserError(f"inputs['negatives'] must name another of the {b} rows for each row")
    for name, least in (("ids", 0), ("labels", -100)):
        ids = np.asarray(inputs[name])
        if ((ids < least) | (ids >= net.vocab_size)).any():
            raise UserError(f"inputs['{name}'] has ids beyond the vocabulary of {net.vocab_size}")


METHODS = dict(simvtp=simvtp)


def read(path: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; pickled objects are refused."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} as .npz: {error}") from None


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="vtp_jax.parity", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--weights", required=True, help=".npz, official tensor names")
    parser.add_argument("--inputs", required=True, help=".npz")
    parser.add_argument("--out", required=True, help=".npz to write")
    parser.add_argument("--grads", action="store_true", help="gradients of the loss too")
    args, overrides = cli.parse(parser, argv)
    if overrides:
        raise UserError("parity takes no config: every size is read off the weights")
    jax.config.update("jax_enable_x64", True)
    result = METHODS[args.method](read(args.weights), read(args.inputs), args.grads)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.out, **result)  # pyright: ignore[reportArgumentType]
    for name in (n for n in result if n.startswith("loss")):
        print(f"{name:9s} {float(result[name]):.12f}")


if __name__ == "__main__":
    cli.run(main)
