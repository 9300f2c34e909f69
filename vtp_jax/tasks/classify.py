"""Recognition: which of `classes` classes a video belongs to.

Needs:     `encode["video"]`
Batch:     `video`, `label`
Evaluator: `classify`: top-1, top-5, views averaged after the softmax

As VideoMAE and its followers fine-tune (arXiv 2203.12602, section 4 and appendix; its code): the
mean over the last block's tokens, before the backbone's last norm, goes through a norm of its own,
dropout and one linear layer whose weights start 1000 times smaller than usual. Soft-target
cross-entropy on smoothed labels; mixup and CutMix; random erasing and flips on the device; several
augmented views of one decoded clip are rows of the batch.

Parameters: {"base": the method's, less what `drop` names, "fc_norm": ..., "head": ...}.

Labels are in [0, classes); a row with a label outside has no loss.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vtp_jax import augment, tree
from vtp_jax.nn import embed, pool
from vtp_jax.nn.transformer import Linear, layer_norm
from vtp_jax.objectives.classification import accuracy, smooth, soft_cross_entropy
from vtp_jax.tasks import look, of_base
from vtp_jax.types import Batch, Encoded, Extra, Method, Out, Params, Spec, UserError

POOLS = dict(mean_norm="raw", embedding="embedding")  # what of the base's Encoded they read
READ = (*POOLS.values(), "mask")
HEAD_INIT = nn.initializers.normal(0.02 * 1e-3)  # the code cuts it off at 100 deviations


class Head(nn.Module):
    """From what the base says of a video to logits, in fp32 or wider."""

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


class Recipe(NamedTuple):
    """How clips are changed before they are classified; see `make`."""

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
    base: Method,
    head: Head,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array,
    step: Array,
) -> tuple[Array, Out]:
    """Soft-target cross-entropy over all views of all valid rows; top1 and top5 are what the net
    says of the changed clips, held against each row's own label."""
    augment_key, net_key = jax.random.split(rng)
    batch = augment.views_as_rows(batch)
    known = (batch["label"] >= 0) & (batch["label"] < recipe.classes)
    valid = batch["valid"] & known
    video, target = augmented(recipe, augment_key, {**batch, "valid": valid})
    logits = classify(base, head, params, extra, {**batch, "video": video}, net_key)["classes"]
    found = {"loss_class": soft_cross_entropy(logits, target, valid)}
    for k in (1, min(5, recipe.classes)):
        found[f"top{k}"] = accuracy(logits, batch["label"], valid, k)
    return found["loss_class"].value(), Out(found, extra)


def classify(
    base: Method,
    head: Head,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array | None = None,
) -> Encoded:
    """classes: logits f32 "b c"; score: their softmax. With a key the net trains: dropout, and the
    base's drop path."""
    own = {name: value for name, value in params.items() if name != "base"}
    keys = (None, None) if rng is None else jax.random.split(rng)
    video = base.encode["video"](params["base"], extra["base"], batch, keys[0])
    rngs = {} if keys[1] is None else {"dropout": keys[1]}
    logits = head.apply({"params": own}, video, rngs=rngs)
    assert isinstance(logits, jax.Array)
    return dict(classes=logits, score=jax.nn.softmax(logits))


def init(base: Method, head: Head, drop: Sequence[str], rng: Array, spec: Spec) -> Params:
    base_key, head_key = jax.random.split(rng)
    clips = jax.eval_shape(augment.views_as_rows, dict(spec))
    # A base that reads texts too is made whole: of one word, where the data have none.
    text = jax.ShapeDtypeStruct((*clips["video"].shape[:1], 1), jnp.int32)
    kept = tree.without(base.init(base_key, {"text": text, **clips}), drop, "config.task.drop")
    video = look(base, "video", base_key, clips, kept)
    if POOLS[head.pool] not in video:
        raise UserError(f"config.task.pool={head.pool}: encode 'video' gives no {POOLS[head.pool]}")
    example = {k: jnp.zeros((1, *x.shape[1:]), x.dtype) for k, x in video.items() if k in READ}
    return {"base": kept, **head.init(head_key, example)["params"]}


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


def make(
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
) -> Method:
    """A method that classifies, made of one that encodes videos.

    pool: `mean_norm` (the mean of `raw`, and a norm of its own) or `embedding` (the base's)
    dropout: before the linear layer; smoothing: of labels; flip, erase: probabilities
    mixup, cutmix, mix_prob, switch, groups: see `augment.mix`
    drop: regexes on names of the base's parameters that the task has no use for; no gradient
        reaches what is kept of them, but weight decay does (docs/methods.md has them by base)
    pick: which of the head's classes are the data's, in the data's order, where a head that tells
        more of them apart is trained on (V2: from 710 to 400), or the path of a JSON list of them;
        without it, all
    labels, mean, std: facts of the data: how many classes occur, and pixels (of erased boxes)

    encode: "classes" and "video", and the rest of the base's where nothing is dropped. extra is
    {"base": the base's}; it is read and does not change. Raises UserError on what does not fit
    together.
    """
    if pool not in POOLS:
        raise UserError(f"config.task.pool={pool!r}; known: {', '.join(POOLS)}")
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
    recipe = Recipe(asked, smoothing, flip, erase, mix, tuple(mean), tuple(std))
    whole = base.encode if not drop else {"video": base.encode["video"]}
    return Method(
        init=partial(init, base, head, drop),
        loss=partial(loss, base, head, recipe),
        encode={
            **{name: of_base(verb) for name, verb in whole.items()},
            "classes": partial(classify, base, head),
        },
        start=lambda rng, spec, params: {"base": base.start(rng, spec, params["base"])},
    )
