"""Holds a method against its reference implementation, number for number, in fp64.

    python -m vtp_jax.parity simvtp --weights W.npz --inputs I.npz --out O.npz [--grads]
    python -m vtp_jax.parity simvtp_finetune --weights W.npz --inputs I.npz --out O.npz [--grads]

Weights come in the reference's own names; every size is read off the arrays. All that is random in
training is given as input, dropout is off, and the reference's quirks are on.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vtp_jax import masking, tree
from vtp_jax.convert import rules
from vtp_jax.methods import simvtp as method
from vtp_jax.nn import embed
from vtp_jax.nn.sizes import Size
from vtp_jax.objectives import contrastive
from vtp_jax.setup import cli
from vtp_jax.tasks import retrieve
from vtp_jax.types import Spec, UserError

HEAD = 64  # every published size of SimVTP and of VideoMAE up to L has heads of this width
MEAN, STD = (
    [float(np.float32(x)) for x in v] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)
# Of both SimVTP models. Dropout is off; what a pass keeps for the gradient would not fit otherwise.
NET: dict[str, Any] = dict(
    dropout=0.0, dtype="float64", mean=tuple(MEAN), std=tuple(STD), remat="nothing_saveable"
)
QUIRKS: dict[str, Any] = dict(pool_padding=True, sum_directions=True)
INPUTS = ("video", "mask", "ids", "labels", "attention_mask", "negatives")
# What the fine-tuned towers have and never use: each has both kinds of embeddings.
UNUSED = r"video_encoder\.text_embeddings\..*|text_encoder\.patch_embed\..*"
POSITION_IDS = r".*position_ids"  # a buffer that files of 2022 hold too

Arrays = Mapping[str, np.ndarray]


def size_of(weights: Arrays, prefix: str) -> Size:
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


def simvtp(weights: Arrays, inputs: Arrays, grads: bool) -> dict[str, Any]:
    """SimVTP pretraining as released (wufeim/SimVTP @558d24e).

    weights: official tensor names (227 for ViT-B). inputs: video (B, 3, T, H, W) normalised with
    ImageNet's statistics; mask (B, N), True = hidden; ids (B, L), hidden words already replaced;
    labels (B, L), -100 where nothing is asked; attention_mask (B, L); negatives (B,).
    Returns target, pixel_pred, mlm_logits, vtm_logits, text_feat, video_feat, loss_v, loss_t,
    loss_vtc, loss_vtm, loss, and with `grads` grad/<official name>; all fp64.
    """
    need(inputs, INPUTS)
    encoder, decoder = size_of(weights, "encoder"), size_of(weights, "decoder")
    table = rules.simvtp(encoder.heads, decoder.heads)
    params = fp64(rules.to_ours(table, without(weights, POSITION_IDS)))
    net = method.SimVTP(
        encoder,
        decoder,
        **sizes_of(params["patch_embed"], params["text_embed"]),
        **NET,
        **QUIRKS,
        contrast_text="masked",
        match_text="masked",
    )
    check_shapes(lambda key: method.init(net, key, spec_of(inputs)), params)
    check_inputs(inputs, net.cube, net.vocab_size)
    check_draws(inputs, net)
    hidden = np.asarray(inputs["mask"], bool)
    asked = np.asarray(inputs["labels"]) != -100
    batch = batch_of({**inputs, "ids": np.where(asked, inputs["labels"], inputs["ids"])})
    draws = method.Draws(
        masking.of_dropped(jnp.asarray(hidden), int(hidden[0].sum())),
        jnp.asarray(asked),
        jnp.asarray(inputs["ids"], jnp.int32),
        jnp.asarray(inputs["negatives"], jnp.int32),
    )

    def compare(params: Any) -> Any:
        out = method.forward(net, params, batch, draws)
        found = method.terms(net, out, batch, draws)
        return method.total(net, found), (out, found)

    (loss, (out, found)), gradient = differentiate(compare, params, table, grads)
    return dict(
        target=out.target, pixel_pred=out.pixels, mlm_logits=out.words, vtm_logits=out.match,
        text_feat=out.text, video_feat=out.video, loss=loss,
        loss_v=found["loss_video"].value(), loss_t=found["loss_text"].value(),
        loss_vtc=found["loss_vtc"].value(), loss_vtm=found["loss_vtm"].value(),
        **gradient,
    )  # fmt: skip


def simvtp_finetune(weights: Arrays, inputs: Arrays, grads: bool) -> dict[str, Any]:
    """SimVTP's retrieval fine-tuning as released: two towers (wufeim/SimVTP @558d24e).

    weights: official tensor names (330 for ViT-B), with or without the tensors that a tower does
    not use. inputs: video (B, 3, T, H, W) normalised with ImageNet's statistics; ids (B, L), the
    captions as they are; attention_mask (B, L).
    Returns video and text (B, d), the embeddings before the cosine; sim (B, B), the cosines, rows
    text, not divided by the temperature; loss, the sum of both directions' cross-entropies of
    sim / 0.05; with `grads` grad/<official name>, zeros for tensors that are not used; all fp64.
    """
    need(inputs, ("video", "ids", "attention_mask"))
    size, other = (size_of(weights, f"{kind}_encoder") for kind in retrieve.KINDS)
    if size != other:
        raise UserError(f"the towers are not of one size: video {tuple(size)}, text {tuple(other)}")
    table = rules.simvtp_finetune(size.heads)
    params = fp64(rules.to_ours(table, without(weights, f"{UNUSED}|{POSITION_IDS}")))
    found = sizes_of(params["video"]["patch_embed"], params["text"]["text_embed"])
    task = retrieve.make(base=method.make(size=size, **found, **NET), **QUIRKS)
    check_shapes(lambda key: task.init(key, spec_of(inputs)), params)
    check_inputs(inputs, found["cube"], found["vocab_size"])
    batch = batch_of(inputs)
    extra, nothing = {kind: {} for kind in retrieve.KINDS}, jnp.zeros((), jnp.int32)

    @jax.jit
    def encode(params: Any) -> list[Any]:
        return [task.encode[kind](params, extra, batch)["embedding"] for kind in retrieve.KINDS]

    video, text = encode(params)
    (loss, _), gradient = differentiate(
        lambda params: task.loss(params, extra, batch, jax.random.key(0), nothing),
        params,
        table,
        grads,
    )
    if grads:
        unused = {n: w for n, w in weights.items() if re.fullmatch(UNUSED, n)}
        unused = without(unused, POSITION_IDS)
        gradient.update({f"grad/{n}": np.zeros(w.shape) for n, w in unused.items()})
    sim = contrastive.normalise(text) @ contrastive.normalise(video).T
    return dict(video=video, text=text, sim=sim, loss=loss, **gradient)


def without(weights: Arrays, names: str) -> dict[str, np.ndarray]:
    """The tensors whose names a regex does not match."""
    return {name: w for name, w in weights.items() if not re.fullmatch(names, name)}


def fp64(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)


def sizes_of(patch_embed: Mapping[str, Any], text_embed: Mapping[str, Any]) -> dict[str, Any]:
    """What of a net is read off its embeddings."""
    return dict(
        cube=patch_embed["kernel"].shape[:3],
        vocab_size=text_embed["word"].shape[0],
        text_length=text_embed["position"].shape[0],
    )


def batch_of(inputs: Arrays) -> dict[str, Any]:
    """The batch that a method takes, with pixels in [0, 1] as they were before normalising."""
    pixels = np.asarray(inputs["video"], np.float64).transpose(0, 2, 3, 4, 1) * STD + MEAN
    return dict(
        valid=jnp.ones(len(pixels), bool),
        video=jnp.asarray(pixels),
        text=jnp.asarray(inputs["ids"], jnp.int32),
        text_mask=jnp.asarray(np.asarray(inputs["attention_mask"], bool)),
    )


def differentiate(
    compare: Callable[[Any], Any], params: Any, table: Sequence[rules.Rule], grads: bool
) -> tuple[Any, dict[str, Any]]:
    """compare(params), which gives (loss, rest), and where asked for {grad/<their name>: ...}."""
    if not grads:
        return jax.jit(compare)(params), {}
    found, gradient = jax.jit(jax.value_and_grad(compare, has_aux=True))(params)
    theirs = rules.to_theirs(table, gradient)
    return found, {f"grad/{name}": g for name, g in theirs.items()}


def spec_of(inputs: Arrays) -> Spec:
    """Shapes that the net's parameters depend on."""
    if inputs["video"].ndim != 5 or inputs["video"].shape[1] != len(MEAN):
        raise UserError(
            f"inputs['video'] is {inputs['video'].shape}; it must be (B, {len(MEAN)}, T, H, W)"
        )
    b, c, t, h, w = inputs["video"].shape
    return dict(
        video=jax.ShapeDtypeStruct((b, t, h, w, c), np.uint8),
        text=jax.ShapeDtypeStruct((b, 1), np.int32),
        text_mask=jax.ShapeDtypeStruct((b, 1), np.bool_),
    )


def check_shapes(init: Callable[[Any], Any], params: Any) -> None:
    """Raises UserError naming every tensor whose shape the others do not allow."""
    want, got = tree.flatten(jax.eval_shape(init, jax.random.key(0))), tree.flatten(params)
    wrong = [
        f"{name} is {got[name].shape}, not {want[name].shape}"
        for name in want
        if name in got and got[name].shape != want[name].shape
    ]
    if wrong:
        raise UserError(f"weights do not fit together: {'; '.join(wrong)}")


def need(inputs: Arrays, names: Sequence[str]) -> None:
    if missing := [name for name in names if name not in inputs]:
        raise UserError(f"inputs have no '{missing[0]}'; needed: {', '.join(names)}")


def check_inputs(inputs: Arrays, cube: embed.Triple, vocab_size: int) -> None:
    """Raises UserError on videos and captions that would give numbers without a meaning."""
    b, _, *sides = inputs["video"].shape
    n = math.prod(embed.grid_of((b, *sides, 3), cube))
    length = inputs["ids"].shape[-1]
    shapes = dict(
        mask=(b, n), ids=(b, length), labels=(b, length), attention_mask=(b, length), negatives=(b,)
    )
    for name, shape in shapes.items():
        if name in inputs and inputs[name].shape != shape:
            raise UserError(f"inputs['{name}'] is {inputs[name].shape}; it must be {shape}")
    for name, least in (("ids", 0), ("labels", -100)):
        ids = np.asarray(inputs.get(name, 0))
        if ((ids < least) | (ids >= vocab_size)).any():
            raise UserError(f"inputs['{name}'] has ids beyond the vocabulary of {vocab_size}")


def check_draws(inputs: Arrays, net: method.SimVTP) -> None:
    """Raises UserError on masks and negatives that the method cannot have drawn."""
    b = len(inputs["video"])
    hidden = np.asarray(inputs["mask"], bool).sum(axis=1)
    if (hidden != hidden[0]).any():
        raise UserError("inputs['mask'] hides different numbers of tokens in different rows")
    negatives = np.asarray(inputs["negatives"])
    if ((negatives < 0) | (negatives >= b) | (negatives == np.arange(b))).any():
        raise UserError(f"inputs['negatives'] must name another of the {b} rows for each row")


METHODS = dict(simvtp=simvtp, simvtp_finetune=simvtp_finetune)


def read(path: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; pickled objects are refused."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} as .npz: {error}") from None


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("parity", __doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--weights", required=True, help=".npz, official tensor names")
    parser.add_argument("--inputs", required=True, help=".npz")
    parser.add_argument("--out", required=True, help=".npz to write")
    parser.add_argument("--grads", action="store_true", help="gradients of the loss too")
    args = cli.parse_alone(parser, argv)
    jax.config.update("jax_enable_x64", True)
    result = METHODS[args.method](read(args.weights), read(args.inputs), args.grads)
    result = {name: np.asarray(x) for name, x in result.items()}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.out, **result)  # pyright: ignore[reportArgumentType]
    for name in (n for n in result if n.startswith("loss")):
        print(f"{name:9s} {float(result[name]):.12f}")


if __name__ == "__main__":
    cli.run(main)
