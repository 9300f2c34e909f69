"""Our nets on the inputs that a conversion is tried on, with all sizes read off the parameters.

Parameters come in fp64, and everything is computed so. Nothing is hidden from the outputs: pixels
are taken as they are given, dropout is off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vtp_jax import masking
from vtp_jax.methods import simvtp as simvtps
from vtp_jax.methods import tvtsv2 as tvtsv2s
from vtp_jax.methods import videomae as videomaes
from vtp_jax.nn import embed, sizes
from vtp_jax.nn import text as texts
from vtp_jax.nn import vit as vits
from vtp_jax.nn.transformer import VIT, Style
from vtp_jax.tasks import classify, retrieve
from vtp_jax.types import Params

Arrays = Mapping[str, Any]
Heads = Mapping[str, int]

ROWS, WORDS = 2, 6  # of the inputs
PLAIN: dict[str, Any] = dict(mean=(0.0,) * 3, std=(1.0,) * 3, dtype="float64")  # pixels as given


class Net(NamedTuple):
    """Our net for some parameters. init: key -> parameters of its own, for their shapes."""

    init: Callable[[Any], Any]
    run: Callable[[], Mapping[str, Any]]


def size(blocks: Params, heads: int) -> sizes.Size:
    """The size of stacked blocks."""
    depth, width, mlp = blocks["mlp"]["fc1"]["kernel"].shape
    return sizes.Size(width, depth, heads, mlp)


def batch_of(inputs: Arrays) -> dict[str, Any]:
    batch: dict[str, Any] = dict(valid=jnp.ones(ROWS, bool))
    if "video" in inputs:
        batch["video"] = jnp.asarray(
            np.asarray(inputs["video"], np.float64).transpose(0, 2, 3, 4, 1)
        )
    if "ids" in inputs:
        batch["text"] = jnp.asarray(inputs["ids"], jnp.int32)
        batch["text_mask"] = jnp.asarray(inputs["attention_mask"])
    return batch


def spec_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


def simvtp(params: Params, inputs: Arrays, heads: Heads) -> Net:
    net = simvtps.SimVTP(
        size(params["encoder"]["blocks"], heads["heads"]),
        size(params["decoder"]["blocks"], heads["decoder-heads"]),
        cube=params["patch_embed"]["kernel"].shape[:3],
        vocab_size=len(params["text_embed"]["word"]),
        text_length=len(params["text_embed"]["position"]),
        dropout=0.0,
        contrast_text="masked",
        match_text="masked",
        **PLAIN,
    )
    batch = batch_of(inputs)

    def run() -> dict[str, Any]:
        hidden = jnp.asarray(inputs["mask"])
        draws = simvtps.Draws(
            masking.of_dropped(hidden, int(hidden[0].sum())),
            jnp.zeros(batch["text"].shape, bool),
            batch["text"],
            jnp.roll(jnp.arange(ROWS), 1),
        )
        out = simvtps.forward(net, params, batch, draws)
        return {n: getattr(out, n) for n in ("pixels", "words", "match", "video", "text")}

    return Net(lambda key: simvtps.init(net, key, spec_of(batch)), run)


def simvtp_finetune(params: Params, inputs: Arrays, heads: Heads) -> Net:
    base = simvtps.make(
        size=size(params["video"]["encoder"]["blocks"], heads["heads"]),
        decoder="tiny",  # a fine-tuned net has none
        cube=params["video"]["patch_embed"]["kernel"].shape[:3],
        vocab_size=len(params["text"]["text_embed"]["word"]),
        text_length=len(params["text"]["text_embed"]["position"]),
        **PLAIN,
    )
    task, extra = retrieve.make(base=base), {kind: {} for kind in retrieve.KINDS}
    batch = batch_of(inputs)
    return Net(
        lambda key: task.init(key, spec_of(batch)),
        lambda: {k: task.encode[k](params, extra, batch)["embedding"] for k in retrieve.KINDS},
    )


def videomae(params: Params, inputs: Arrays, heads: Heads) -> Net:
    net = videomaes.VideoMAE(
        size(params["encoder"]["blocks"], heads["heads"]),
        size(params["decoder"]["blocks"], heads["decoder-heads"]),
        cube=params["patch_embed"]["kernel"].shape[:3],
        mask="tubes", ratio=0.5, decoder_ratio=0.0, drop_path=0.0, remat=None, unroll=1, **PLAIN,
    )  # fmt: skip
    batch = batch_of(inputs)

    def run() -> dict[str, Any]:
        hidden = jnp.asarray(inputs["mask"])
        mask = masking.of_dropped(hidden, int(hidden[0].sum()))
        draws = videomaes.Draws(mask, mask.drop, jnp.ones(mask.drop.shape, bool))
        return dict(pixels=videomaes.forward(net, params, batch, draws)[0])

    return Net(lambda key: videomaes.init(net, key, spec_of(batch)), run)


def videomae_finetune(params: Params, inputs: Arrays, heads: Heads) -> Net:
    base = videomaes.make(
        size=size(params["base"]["encoder"]["blocks"], heads["heads"]),
        decoder="tiny",
        cube=params["base"]["patch_embed"]["kernel"].shape[:3],
        **PLAIN,
    )
    task, batch = classify.make(base=base, classes=len(params["head"]["bias"])), batch_of(inputs)
    return Net(
        lambda key: task.init(key, spec_of(batch)),
        lambda: dict(logits=task.encode["classes"](params, {"base": {}}, batch)["classes"]),
    )


def word(params: Params, inputs: Arrays, heads: Heads) -> Net:
    params = params["text_embed"]
    words, width = params["word"].shape
    length, types = (len(params[n]) for n in ("position", "type"))
    net = embed.WordEmbed(words, width, 0, length, types, dropout=0.0, dtype=jnp.float64)
    ids = jnp.asarray(inputs["ids"], jnp.int32)
    return Net(
        lambda key: dict(text_embed=net.init(key, ids)["params"]),
        lambda: dict(tokens=net.apply({"params": params}, ids)),
    )


def vit_of(params: Params, heads: int, style: Style, pooling: str = "class") -> vits.ViT:
    return vits.ViT(
        size(params["encoder"]["blocks"], heads),
        len(params["position"]) - 1,
        cube=params["patch_embed"]["kernel"].shape[:3],
        style=style,
        first_norm="norm_pre" in params,
        pooling=pooling,
        features=params["proj"]["kernel"].shape[-1] if "proj" in params else None,
        dtype=jnp.float64,
    )


def cubes_of(params: Params, inputs: Arrays) -> Any:
    image = jnp.asarray(np.asarray(inputs["image"], np.float64).transpose(0, 2, 3, 1))[:, None]
    return embed.cut(image, params["patch_embed"]["kernel"].shape[:3])


def vit(pooling: str) -> Callable[[Params, Arrays, Heads], Net]:
    def make(params: Params, inputs: Arrays, heads: Heads) -> Net:
        body = {n: p for n, p in params.items() if n != "head"}
        net, cubes = vit_of(body, heads["heads"], VIT, pooling), cubes_of(body, inputs)

        def run() -> dict[str, Any]:
            bound = net.bind({"params": body})
            raw = bound.encode(cubes)
            found = dict(raw=raw, pooled=bound.pool(raw))
            if head := params.get("head"):
                found["logits"] = found["pooled"] @ head["kernel"] + head["bias"]
            return found

        return Net(lambda key: net.init(key, cubes)["params"], run)

    return make


def mae(params: Params, inputs: Arrays, heads: Heads) -> Net:
    body, head = params["encoder"], params["decoder"]
    net, cubes = vit_of(body, heads["heads"], VIT), cubes_of(body, inputs)
    keep = jnp.asarray(inputs["keep"], jnp.int32)
    b, n, p = cubes.shape
    hidden = jnp.ones((b, n), bool).at[jnp.arange(b)[:, None], keep].set(False)
    mask = masking.of_dropped(hidden, n - keep.shape[1])
    blocks = head["stack"]["blocks"]
    decoder = vits.Decoder(size(blocks, heads["decoder-heads"]), n, p, dtype=jnp.float64)

    def encode(params: Params) -> Any:
        bound = net.bind({"params": params})
        return bound.norm(bound.encode(masking.take(cubes, keep), keep))

    def init(key: Any) -> Params:
        first = net.init(key, cubes)["params"]
        return dict(encoder=first, decoder=decoder.init(key, encode(first), mask)["params"])

    def run() -> dict[str, Any]:
        tokens = encode(body)
        return dict(tokens=tokens, pixels=decoder.apply({"params": head}, tokens, mask))

    return Net(init, run)


def clip(style: Style) -> Callable[[Params, Arrays, Heads], Net]:
    def make(params: Params, inputs: Arrays, heads: Heads) -> Net:
        visual, words = params["visual"], params["text"]
        image, cubes = vit_of(visual, heads["heads"], style), cubes_of(visual, inputs)
        text = texts.CausalText(
            size(words["encoder"]["blocks"], heads["text-heads"]),
            words["proj"]["kernel"].shape[-1],
            *(len(words[n]) for n in ("word", "position")),
            style=style,
            dtype=jnp.float64,
        )
        ids = jnp.asarray(inputs["ids"], jnp.int32)
        return Net(
            lambda key: dict(
                visual=image.init(key, cubes)["params"], text=text.init(key, ids)["params"]
            ),
            lambda: dict(
                image=image.apply({"params": visual}, cubes),
                text=text.apply({"params": words}, ids),
            ),
        )

    return make


def tvtsv2(act: str, sorted_by: str) -> Callable[[Params, Arrays, Heads], Net]:
    def make(params: Params, inputs: Arrays, heads: Heads) -> Net:
        visual, words = params["visual"], params["text"]
        grid = math.isqrt(len(visual["position"]) - 1)
        patch, frames = visual["patch_embed"]["kernel"].shape[1], len(visual["time_position"])
        method = tvtsv2s.make(
            size=size(visual["encoder"]["blocks"], heads["heads"]),
            text_size=size(words["encoder"]["blocks"], heads["text-heads"]),
            features=visual["proj"]["kernel"].shape[-1],
            side=grid * patch, patch=patch, frames=frames, sorted_by=sorted_by, act=act,
            turns=len(params["sorter"]["head"]["bias"]),
            vocab_size=len(words["word"]), text_length=len(words["position"]), **PLAIN,
        )  # fmt: skip
        net = method.init.args[0]
        batch = dict(
            valid=jnp.ones(ROWS, bool),
            video=jnp.asarray(np.asarray(inputs["video"], np.float64).transpose(0, 2, 3, 4, 1)),
            text=jnp.asarray(inputs["ids"], jnp.int32),
        )

        def run() -> dict[str, Any]:
            hidden = jnp.tile(jnp.asarray(~inputs["keep"]), (1, batch["video"].shape[1]))
            mask = masking.of_dropped(hidden, int(hidden[0].sum()))
            return tvtsv2s.forward(net, params, batch, mask)._asdict()

        return Net(lambda key: method.init(key, spec_of(batch)), run)

    return make
