"""Fine-tuning for retrieval: video-text contrast alone.

Needs:     `encode["video"]`, `["text"]`
Batch:     `video`, `text`
Evaluator: `retrieval`: R@k both ways; docs/evaluation.md

Source: SimVTP's released fine-tuning (wufeim/SimVTP @558d24e: `DualVideoTextEncoder` and its
engine), which starts two encoders from the weights of the pretrained one and passes the mean of
each one's last tokens through a fresh layer norm; cosines over a temperature, both ways.

Parameters: {"video": the base's, "text": the base's, "video_norm": ..., "text_norm": ...} of two
towers, {"base": ..., "video_norm": ..., "text_norm": ...} of one, less what `drop` names.

Deviations from the release, each with the switch that restores it:
- Means over tokens leave padding out; the reference's depend on the batch's other rows.
                                                                                pool_padding=True
- The loss is the mean of its two directions, the reference's is their sum.    sum_directions=True
- Negatives come from the whole batch; the reference's from one GPU's 8 pairs.            groups=N
- Parameters that a tower does not use are dropped (the reference keeps 25 M of them).        drop
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vtp_jax import augment, tree
from vtp_jax.nn import embed
from vtp_jax.nn import pool as pooling
from vtp_jax.nn.transformer import layer_norm
from vtp_jax.objectives import contrastive, terms
from vtp_jax.tasks import POOLS, encoded_shapes, on_base
from vtp_jax.types import (
    Batch,
    Encoded,
    Extra,
    Method,
    Out,
    Params,
    Spec,
    UserError,
    assemble,
    made_of,
)

KINDS = ("video", "text")
TOWERS = {"one": dict(video="base", text="base"), "two": dict(video="video", text="text")}
NORM = layer_norm(None)  # computes in its input's dtype, which is fp32 or wider


class Recipe(NamedTuple):
    """How the task trains; see `build`. Its net is the base, a `Method`."""

    part: Mapping[str, str]  # kind -> the part of the parameters that encodes it
    drop: Mapping[str, Sequence[str]]
    pool: str
    temperature: float
    sum_directions: bool
    pool_padding: bool
    groups: int
    flip: float
    erase: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def encode(
    kind: str,
    base: Method,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array | None = None,
) -> Encoded:
    """The base's Encoded, with the task's embedding."""
    part = recipe.part[kind]
    found = base.encode[kind](params[part], extra[part], batch, rng)
    if recipe.pool == "embedding":
        return found
    mean = pooling.mean(found["raw"], None if recipe.pool_padding else found["mask"])
    return {**found, "embedding": NORM.apply({"params": params[f"{kind}_norm"]}, mean)}


def rows(batch: Batch) -> tuple[Batch, int]:
    """The batch with the views of a clip as rows with the same words, each view a group of its own
    as in SimVTP's loss, and the number of views. Clips with a text each, "b k l", stay one row:
    they are parts of a video, for methods that read them together."""
    return augment.views_apart(batch) if batch["text"].ndim == 2 else (batch, 1)


def augmented(recipe: Recipe, rng: Array, batch: Batch) -> Batch:
    """The batch with its clips flipped and erased, all clips of a row alike."""
    flip_key, erase_key = jax.random.split(rng)
    shape = batch["video"].shape
    video = batch["video"].reshape(shape[0], -1, *shape[-3:])
    if recipe.flip:
        video = augment.flip(flip_key, embed.to_unit(video), recipe.flip)
    if recipe.erase:
        video = embed.to_unit(video)
        video = augment.erase(erase_key, video, recipe.erase, recipe.mean, recipe.std)
    return {**batch, "video": video.reshape(shape)}


def loss(
    base: Method,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array,
    step: Array,
) -> tuple[Array, Out]:
    augment_key, video_key, text_key = jax.random.split(rng, 3)
    batch, views = rows(batch)
    batch = augmented(recipe, augment_key, batch)
    found = contrastive.both_ways(
        encode("text", base, recipe, params, extra, batch, text_key)["embedding"],
        encode("video", base, recipe, params, extra, batch, video_key)["embedding"],
        batch["valid"],
        temperature=recipe.temperature,
        groups=recipe.groups * views,
        sum_directions=recipe.sum_directions,
    )
    return found.value(), Out(dict(loss_vtc=found), extra)


def init(base: Method, recipe: Recipe, rng: Array, spec: Spec) -> Params:
    """Towers start equal. Raises UserError if the parameters that are left cannot encode, or if the
    two kinds differ in width."""
    spec = jax.eval_shape(lambda batch: rows(batch)[0], dict(spec))
    whole, reads = base.init(rng, spec), POOLS[recipe.pool]
    params: dict[str, Any] = {
        part: tree.without(whole, recipe.drop.get(part, ()), f"config.task.drop.{part}")
        for part in recipe.part.values()
    }
    widths = {}
    for kind, part in recipe.part.items():
        found = encoded_shapes(base, kind, rng, spec, params[part])
        if reads not in found:
            raise UserError(f"config.task.pool={recipe.pool}: encode '{kind}' gives no {reads}")
        widths[kind] = found[reads].shape[-1]
        if recipe.pool == "mean_norm":
            params[f"{kind}_norm"] = NORM.init(rng, jnp.zeros(widths[kind]))["params"]
    if widths["video"] != widths["text"]:
        both = " and ".join(f"'{kind}' {width}" for kind, width in widths.items())
        raise UserError(f"config.task.pool={recipe.pool}: {reads} of {both} wide do not compare")
    return params


def start(base: Method, recipe: Recipe, rng: Array, spec: Spec, params: Params) -> Extra:
    return {part: base.start(rng, spec, params[part]) for part in recipe.part.values()}


def build(
    *,
    base: Method,
    towers: str = "two",
    pool: str = "mean_norm",
    temperature: float = 0.05,
    sum_directions: bool = False,
    pool_padding: bool = False,
    groups: int = 1,
    flip: float = 0.0,
    erase: float = 0.0,
    drop: Mapping[str, Sequence[str]] | None = None,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> tuple[Method, Recipe]:
    """Retrieval with `base`, which needs encode "video" and "text".

    towers: "one" net for both kinds, or "two" that start equal and are trained apart. pool:
    "mean_norm", the mean of the tokens before the net's last norm, through a fresh layer norm; or
    "embedding", the net's own, with its pretrained norm. temperature, groups: see
    `objectives.contrastive.info_nce`. flip, erase: probabilities, in training. mean, std: of erased
    pixels. drop: part of params ("base", or "video" and "text") -> regexes of the names in it that
    the task does not use.

    encode: "video" and "text", the base's with this task's embedding; with one tower from which
    nothing is dropped, also the base's other verbs ("pair"). extra is {part: the base's}, which no
    step changes. Raises UserError on options that do not fit together.
    """
    terms.choose("towers", towers, TOWERS, "config.task")
    terms.choose("pool", pool, POOLS, "config.task")
    if lacking := [kind for kind in KINDS if kind not in base.encode]:
        raise UserError(f"config.task: retrieve needs a method that has encode '{lacking[0]}'")
    if pool == "embedding" and pool_padding:
        raise UserError("config.task.pool_padding is for pool=mean_norm; see config.method")
    part, drop = TOWERS[towers], drop or {}
    if odd := sorted(set(drop) - set(part.values())):
        parts = ", ".join(dict.fromkeys(part.values()))
        raise UserError(f"config.task.drop: no part '{odd[0]}'; {towers} towers: {parts}")
    return base, Recipe(
        part=part,
        drop=drop,
        pool=pool,
        temperature=temperature,
        sum_directions=sum_directions,
        pool_padding=pool_padding,
        groups=groups,
        flip=flip,
        erase=erase,
        mean=tuple(mean),
        std=tuple(std),
    )


@made_of(build)
def make(**cfg: Any) -> Method:
    base, recipe = build(**cfg)
    verbs = {kind: partial(encode, kind) for kind in KINDS}
    made = assemble(base, recipe, init=init, loss=loss, encode=verbs, start=start)
    one_whole = recipe.part == TOWERS["one"] and not recipe.drop
    kept = tuple(base.encode) if one_whole else ()
    return on_base(made, base, kept)
