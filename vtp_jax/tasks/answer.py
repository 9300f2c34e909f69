"""Questions on videos, answered with one of a list of answers.

Needs:     `encode["video"]`, `["text"]`; `["pair"]` with an `embedding`, or both `embedding`s
Batch:     `video`, `text` (the question), `label` (the number of the answer)
Evaluator: `classify` with `classes="answer"`: top-1

As open-ended question answering is mostly measured (MSRVTT-QA, MSVD-QA: the 1,000 to 2,000 answers
that are commonest in training; ViLT, VIOLET and others): what the method makes of a video and its
question goes through a layer twice as wide, a norm, GELU and one linear layer; cross-entropy.

    fuse = "pair"        the `embedding` of encode["pair"]: of methods that fuse
    fuse = "embedding"   both `embedding`s, one after the other: of two towers

Parameters: {"base": the method's, less what `drop` names, "head": ...}.

A label outside the list trains nothing; evaluation counts one above it as wrong and skips -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vtp_jax import augment, tree
from vtp_jax.nn.transformer import ACTIVATIONS, Linear, layer_norm
from vtp_jax.objectives.classification import accuracy, cross_entropy
from vtp_jax.tasks import look, of_base
from vtp_jax.types import Batch, Encoded, Extra, Method, Out, Params, Spec, UserError

FUSES = dict(pair=("video", "text", "pair"), embedding=("video", "text"))  # what they need
HEAD_INIT = nn.initializers.truncated_normal(0.02)


class Head(nn.Module):
    """From one vector of video and question to logits, in fp32 or wider."""

    answers: int
    dropout: float

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b c"]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
        x = Linear(2 * x.shape[-1], init=HEAD_INIT, dtype=x.dtype, name="fc")(x)
        x = ACTIVATIONS["gelu"](layer_norm(x.dtype, name="norm")(x))
        return Linear(self.answers, init=HEAD_INIT, dtype=x.dtype, name="out")(x)


def fused(
    base: Method,
    fuse: str,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array | None = None,
) -> Encoded:
    """embedding: one vector of each row's video and question."""
    keys = (None,) * 3 if rng is None else jax.random.split(rng, 3)
    video = base.encode["video"](params, extra, batch, keys[0])
    text = base.encode["text"](params, extra, batch, keys[1])
    said = dict(video=video, text=text)
    if fuse == "pair":
        said = dict(pair=base.encode["pair"](params, extra, video, text, keys[2]))
    if lacking := [kind for kind, one in said.items() if "embedding" not in one]:
        raise UserError(f"config.task.fuse={fuse}: encode '{lacking[0]}' gives no embedding")
    return dict(embedding=jnp.concatenate([one["embedding"] for one in said.values()], axis=1))


def answer(
    base: Method,
    head: Head,
    fuse: str,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array | None = None,
) -> Encoded:
    """classes: logits f32 "b c"; score: their softmax. With a key the net trains: dropout."""
    keys = (None, None) if rng is None else jax.random.split(rng)
    vector = fused(base, fuse, params["base"], extra["base"], batch, keys[0])["embedding"]
    rngs = {} if keys[1] is None else {"dropout": keys[1]}
    logits = head.apply({"params": params["head"]}, vector, rngs=rngs)
    assert isinstance(logits, jax.Array)
    return dict(classes=logits, score=jax.nn.softmax(logits))


def loss(
    base: Method,
    head: Head,
    fuse: str,
    smoothing: float,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array,
    step: Array,
) -> tuple[Array, Out]:
    batch = augment.views_as_rows(batch)
    label = batch["label"]
    known = batch["valid"] & (label >= 0) & (label < head.answers)
    logits = answer(base, head, fuse, params, extra, batch, rng)["classes"]
    found = dict(
        loss_answer=cross_entropy(logits, label, known, smoothing=smoothing),
        top1=accuracy(logits, label, known),
    )
    return found["loss_answer"].value(), Out(found, extra)


def init(
    base: Method, head: Head, fuse: str, drop: Sequence[str], rng: Array, spec: Spec
) -> Params:
    base_key, head_key = jax.random.split(rng)
    batch = jax.eval_shape(augment.views_as_rows, dict(spec))
    kept = tree.without(base.init(base_key, batch), drop, "config.task.drop")
    of_pairs = base._replace(encode={"pair": partial(fused, base, fuse)})
    vector = look(of_pairs, "pair", base_key, batch, kept)["embedding"]
    return {"base": kept, "head": head.init(head_key, jnp.zeros((1, vector.shape[1])))["params"]}


def make(
    *,
    base: Method,
    answers: int,
    fuse: str = "pair",
    dropout: float = 0.1,
    smoothing: float = 0.0,
    drop: Sequence[str] = (),
    labels: int = 0,
) -> Method:
    """A method that answers, made of one that encodes videos and texts.

    answers: how long the list is. fuse: see above. dropout: before the head; smoothing: of labels.
    drop: regexes on names of the base's parameters that the task has no use for. labels: how many
    classes occur in the data.

    encode: "answer", "video" and "text", and the rest of the base's where nothing is dropped. extra
    is {"base": the base's}; it is read and does not change. Raises UserError on what does not fit
    together.
    """
    if fuse not in FUSES:
        raise UserError(f"config.task.fuse={fuse!r}; known: {', '.join(FUSES)}")
    if lacking := [verb for verb in FUSES[fuse] if verb not in base.encode]:
        raise UserError(f"config.task.fuse={fuse}: needs a method that has encode['{lacking[0]}']")
    if labels > answers + 1:  # what is not in the list has the number after the last
        raise UserError(f"config.task.answers={answers}; the data's labels go up to {labels - 1}")
    head = Head(answers, dropout)
    whole = {k: v for k, v in base.encode.items() if not drop or k in FUSES[fuse]}
    return Method(
        init=partial(init, base, head, fuse, drop),
        loss=partial(loss, base, head, fuse, smoothing),
        encode={
            **{name: of_base(verb) for name, verb in whole.items()},
            "answer": partial(answer, base, head, fuse),
        },
        start=lambda rng, spec, params: {"base": base.start(rng, spec, params["base"])},
    )
