"""Recognition: which of `classes` classes a video belongs to.

Needs:     `encode["video"]`
Batch:     `video`, `label`
Evaluator: `classify`: top-1, top-5, views averaged after the softmax

The fine-tuning of VideoMAE and its followers (arXiv 2203.12602, section 4 and appendix; its code):
the mean over the last block's tokens, before the backbone's last norm, goes through a norm of its
own, dropout and one linear layer whose weights start 1000 times smaller than usual. Soft-target
cross-entropy on smoothed labels; mixup and CutMix; random erasing and flips on the device; several
augmented views of one decoded clip are rows of the batch.

Parameters: {"base": the method's, less what `drop` names, "fc_norm": ..., "head": ...}.

Labels are in [0, classes); a row with a label outside has no loss.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vtp_jax import augment, tree
from vtp_jax.nn import embed, pool
from vtp_jax.nn.bind import bind
from vtp_jax.nn.transformer import Linear, layer_norm
from vtp_jax.objectives import terms
from vtp_jax.objectives.classification import accuracy, smooth, soft_cross_entropy
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

READ = (*POOLS.values(), "mask")
HEAD_INIT = nn.initializers.normal(0.02 * 1e-3)  # the code cuts it off at 100 deviations


class Head(nn.Module):
    """From the base's Encoded of a video to logits, in fp32 or wider."""

    classes: int
    pool: str
    dropout: float
    pick: tuple[int, ...]

    @nn.compact
    def __call__(self, video: Encoded) -> Float[Array, "b c"]:
        if self.pool == "embedding":
            x = video["embedding"]
        else:
            x = pool.mean(video["raw"], video["mask"])
            x = layer_norm(x.dtype, name="fc_norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
        logits = Linear(self.classes, init=HEAD_INIT, dtype=x.dtype, name="head")(x)
        return logits[:, jnp.array(self.pick)] if self.pick else logits


class Net(NamedTuple):
    """The pretrained method, and the head on it."""

    base: Method
    head: Head


class Recipe(NamedTuple):
    """How the net is trained: mostly, how clips are augmented; see `build`."""

    drop: tuple[str, ...]
    classes: int
    smoothing: float
    flip: float
    erase: float
    mix: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def augmented(
    recipe: Recipe, rng: Array, batch: Batch
) -> tuple[Float[Array, "b t h w c"], Float[Array, "b k"]]:
    """The clips of a batch in [0, 1], flipped, erased and mixed, and their targets."""
    flip_key, erase_key, mix_key = jax.random.split(rng, 3)
    video = embed.to_unit(batch["video"])
    target = smooth(batch["label"], recipe.classes, recipe.smoothing)
    if recipe.flip:
        video = augment.flip(flip_key, video, recipe.flip)
    if recipe.erase:
        video = augment.erase(erase_key, video, recipe.erase, recipe.mean, recipe.std)
    return augment.mix(mix_key, video, target, batch["valid"], **recipe.mix)


def loss(
    net: Net, recipe: Recipe, params: Params, extra: Extra, batch: Batch, rng: Array, step: Array
) -> tuple[Array, Out]:
    """Soft-target cross-entropy over all views of all valid rows; top1 and top5 compare the
    predictions for the augmented clips with each row's own label."""
    augment_key, net_key = jax.random.split(rng)
    batch = augment.views_as_rows(batch)
    known = (batch["label"] >= 0) & (batch["label"] < recipe.classes)
    valid = batch["valid"] & known
    video, target = augmented(recipe, augment_key, {**batch, "valid": valid})
    batch = {**batch, "video": video}
    logits = classify(net, recipe, params, extra, batch, net_key)["classes"]
    found = {"loss_class": soft_cross_entropy(logits, target, valid)}
    for k in (1, min(5, recipe.classes)):
        found[f"top{k}"] = accuracy(logits, batch["label"], valid, k)
    return found["loss_class"].value(), Out(found, extra)


def classify(
    net: Net,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array | None = None,
) -> Encoded:
    """classes: logits f32 "b c"; score: their softmax. With a key, dropout and the base's drop path
    act."""
    own = {name: value for name, value in params.items() if name != "base"}
    keys = (None, None) if rng is None else jax.random.split(rng)
    video = net.base.encode["video"](params["base"], extra["base"], batch, keys[0])
    logits = bind(net.head, own, keys[1])(video)
    return dict(classes=logits, score=jax.nn.softmax(logits))


def init(net: Net, recipe: Recipe, rng: Array, spec: Spec) -> Params:
    base, head = net
    base_key, head_key = jax.random.split(rng)
    clips = jax.eval_shape(augment.views_as_rows, dict(spec))
    # A base that also reads texts gets all its parameters, from texts of one word if the data have
    # none.
    text = jax.ShapeDtypeStruct((*clips["video"].shape[:1], 1), jnp.int32)
    kept = tree.without(
        base.init(base_key, {"text": text, **clips}), recipe.drop, "config.task.drop"
    )
    video = encoded_shapes(base, "video", base_key, clips, kept)
    if POOLS[head.pool] not in video:
        raise UserError(f"config.task.pool={head.pool}: encode 'video' gives no {POOLS[head.pool]}")
    example = {k: jnp.zeros((1, *x.shape[1:]), x.dtype) for k, x in video.items() if k in READ}
    return {"base": kept, **head.init(head_key, example)["params"]}


def start(net: Net, recipe: Recipe, rng: Array, spec: Spec, params: Params) -> Extra:
    return {"base": net.base.start(rng, spec, params["base"])}


def listed(path: str) -> list[int]:
    """The class numbers in a JSON file."""
    if not Path(path).is_file():
        raise UserError(
            f"config.task.pick: there is no file '{path}', a JSON list of the head's classes in "
            "the data's order; the release of VideoMAE V2 has its own in misc/"
        )
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"config.task.pick: {path} is not JSON: {error}") from None
    if not isinstance(found, list) or not all(type(i) is int for i in found):
        raise UserError(f"config.task.pick: {path} is no list of whole numbers")
    return found


def build(
    *,
    base: Method,
    classes: int,
    pool: str = "mean_norm",
    dropout: float = 0.0,
    smoothing: float = 0.0,
    flip: float = 0.0,
    erase: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mix_prob: float = 1.0,
    switch: float = 0.5,
    groups: int = 1,
    drop: Sequence[str] = (),
    pick: Sequence[int] | str = (),
    labels: int = 0,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> tuple[Net, Recipe]:
    """A method that classifies, made of one that encodes videos.

    pool: `mean_norm` (the mean of `raw`, and a norm of its own) or `embedding` (the base's)
    dropout: before the linear layer; smoothing: of labels; flip, erase: probabilities
    mixup, cutmix, mix_prob, switch, groups: see `augment.mix`
    drop: regexes on names of the base's parameters that the task does not use; no gradient reaches
        those of them that are kept, but weight decay does (docs/methods.md lists them by base)
    pick: the head's classes that are the data's, in the data's order, for a head that was trained
        on more classes (V2: from 710 to 400), or the path of a JSON list of them; empty: all
    labels, mean, std: facts of the data: the number of classes that occur, and pixels (of erased
        boxes)

    encode: "classes" and "video", and the rest of the base's if nothing is dropped. extra is
    {"base": the base's}, which no step changes. Raises UserError on options that do not fit
    together.
    """
    terms.choose("pool", pool, POOLS, "config.task")
    if "video" not in base.encode:
        raise UserError("config.task: classify needs a method that has encode['video']")
    pick = listed(pick) if isinstance(pick, str) else pick
    if wrong := [i for i in pick if not 0 <= i < classes]:
        raise UserError(f"config.task.pick: {wrong[0]} is none of the head's {classes} classes")
    asked = len(pick) or classes
    if labels > asked:
        raise UserError(f"config.task has {asked} classes; the data's labels go up to {labels - 1}")
    head = Head(classes, pool, dropout, tuple(pick))
    mix = dict(mixup=mixup, cutmix=cutmix, prob=mix_prob, switch=switch, groups=groups)
    return Net(base, head), Recipe(
        drop=tuple(drop),
        classes=asked,
        smoothing=smoothing,
        flip=flip,
        erase=erase,
        mix=mix,
        mean=tuple(mean),
        std=tuple(std),
    )


@made_of(build)
def make(**cfg: Any) -> Method:
    net, recipe = build(**cfg)
    made = assemble(net, recipe, init=init, loss=loss, encode=dict(classes=classify), start=start)
    kept = ("video",) if recipe.drop else tuple(net.base.encode)
    return on_base(made, net.base, kept)
