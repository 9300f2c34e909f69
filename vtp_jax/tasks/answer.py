"""Questions on videos, answered with one of a list of answers.

Needs:     `encode["video"]`, `["text"]`; `["pair"]` with an `embedding`, or both `embedding`s
Batch:     `video`, `text` (the question), `label` (the number of the answer)
Evaluator: `classify` with `classes="answer"`: top-1

The usual form of open-ended question answering (MSRVTT-QA, MSVD-QA: the 1,000 to 2,000 answers that
are most common in training; ViLT, VIOLET and others): one vector of a video and its question goes
through a layer twice as wide, a norm, GELU and one linear layer; cross-entropy. The vector is

    fuse = "pair"        the `embedding` of encode["pair"], for methods that fuse
    fuse = "embedding"   both `embedding`s, concatenated, for two towers

Parameters: {"base": the method's, less what `drop` names, "head": ...}.

A label outside the list trains nothing; evaluation counts one above it as wrong and skips -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vtp_jax import augment, tree
from vtp_jax.nn.bind import bind
from vtp_jax.nn.transformer import ACTIVATIONS, Linear, layer_norm
from vtp_jax.objectives import terms
from vtp_jax.objectives.classification import scored
from vtp_jax.tasks import encoded_shapes, on_base
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
    wide,
)

FUSES = dict(pair=("video", "text", "pair"), embedding=("video", "text"))  # the verbs they need
HEAD_INIT = nn.initializers.truncated_normal(0.02)


class Head(nn.Module):
    """From one vector of video and question to logits, in fp32 or wider."""

    answers: int
    dropout: float

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b c"]:
        x = wide(x)
        x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
        x = Linear(2 * x.shape[-1], init=HEAD_INIT, dtype=x.dtype, name="fc")(x)
        x = ACTIVATIONS["gelu"](layer_norm(x.dtype, name="norm")(x))
        return Linear(self.answers, init=HEAD_INIT, dtype=x.dtype, name="out")(x)


class Net(NamedTuple):
    """The pretrained method, how a video and a question become one vector, and the head on it."""

    base: Method
    fuse: str
    head: Head


class Recipe(NamedTuple):
    """How the net is trained; see `build`."""

    drop: tuple[str, ...]
    smoothing: float


def fused(
    net: Net, params: Params, extra: Extra, batch: Batch, rng: Array | None = None
) -> Encoded:
    """embedding: one vector of each row's video and question, with the base's params and extra."""
    encode = net.base.encode
    keys = (None,) * 3 if rng is None else jax.random.split(rng, 3)
    video = encode["video"](params, extra, batch, keys[0])
    text = encode["text"](params, extra, batch, keys[1])
    found = dict(video=video, text=text)
    if net.fuse == "pair":
        found = dict(pair=encode["pair"](params, extra, video, text, keys[2]))
    if lacking := [kind for kind, one in found.items() if "embedding" not in one]:
        raise UserError(f"config.task.fuse={net.fuse}: encode '{lacking[0]}' gives no embedding")
    return dict(embedding=jnp.concatenate([one["embedding"] for one in found.values()], axis=1))


def answer(
    net: Net,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array | None = None,
) -> Encoded:
    """classes: logits f32 "b c"; score: their softmax. With a key, dropout acts."""
    keys = (None, None) if rng is None else jax.random.split(rng)
    vector = fused(net, params["base"], extra["base"], batch, keys[0])["embedding"]
    logits = bind(net.head, params["head"], keys[1])(vector)
    return dict(classes=logits, score=jax.nn.softmax(logits))


def loss(
    net: Net, recipe: Recipe, params: Params, extra: Extra, batch: Batch, rng: Array, step: Array
) -> tuple[Array, Out]:
    batch = augment.views_as_rows(batch)
    label = batch["label"]
    known = batch["valid"] & (label >= 0) & (label < net.head.answers)
    logits = answer(net, recipe, params, extra, batch, rng)["classes"]
    value, top1 = scored(logits, label, known, smoothing=recipe.smoothing)
    return value.value(), Out(dict(loss_answer=value, top1=top1), extra)


def init(net: Net, recipe: Recipe, rng: Array, spec: Spec) -> Params:
    base_key, head_key = jax.random.split(rng)
    batch = jax.eval_shape(augment.views_as_rows, dict(spec))
    kept = tree.without(net.base.init(base_key, batch), recipe.drop, "config.task.drop")
    of_pairs = net.base._replace(encode={"pair": partial(fused, net)})
    vector = encoded_shapes(of_pairs, "pair", base_key, batch, kept)["embedding"]
    example = jnp.zeros((1, vector.shape[1]))
    return {"base": kept, "head": net.head.init(head_key, example)["params"]}


def start(net: Net, recipe: Recipe, rng: Array, spec: Spec, params: Params) -> Extra:
    return {"base": net.base.start(rng, spec, params["base"])}


def build(
    *,
    base: Method,
    answers: int,
    fuse: str = "pair",
    dropout: float = 0.1,
    smoothing: float = 0.0,
    drop: Sequence[str] = (),
    labels: int = 0,
) -> tuple[Net, Recipe]:
    """A method that answers, made of one that encodes videos and texts.

    answers: the length of the list. fuse: see above. dropout: before the head; smoothing: of
    labels. drop: regexes on names of the base's parameters that the task does not use. labels: the
    number of classes that occur in the data.

    encode: "answer", "video" and "text", and the rest of the base's if nothing is dropped. extra is
    {"base": the base's}, which no step changes. Raises UserError on options that do not fit
    together.
    """
    terms.choose("fuse", fuse, FUSES, "config.task")
    if lacking := [verb for verb in FUSES[fuse] if verb not in base.encode]:
        raise UserError(f"config.task.fuse={fuse}: needs a method that has encode['{lacking[0]}']")
    if labels > answers + 1:  # what is not in the list has the number after the last
        raise UserError(f"config.task.answers={answers}; the data's labels go up to {labels - 1}")
    return Net(base, fuse, Head(answers, dropout)), Recipe(tuple(drop), smoothing)


@made_of(build)
def make(**cfg: Any) -> Method:
    net, recipe = build(**cfg)
    made = assemble(net, recipe, init=init, loss=loss, encode=dict(answer=answer), start=start)
    kept = FUSES[net.fuse] if recipe.drop else tuple(net.base.encode)
    return on_base(made, net.base, kept)
