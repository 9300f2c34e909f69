"""Fine-tuning for retrieval: video-text contrast alone, on any method that encodes both.

Source: SimVTP's released fine-tuning (facts: wufeim/SimVTP @558d24e, `DualVideoTextEncoder` and its
engine), which starts two encoders from the weights of the one that was pretrained, averages each
one's last tokens and gives the mean to a fresh layer norm; cosines over a temperature, both ways.

Deviations from the release, each with the switch that brings it back:
- Means over tokens leave padding out; the reference's depend on batch-mates.    pool_padding=True
- The loss is the mean of its two directions, the reference's is their sum.    sum_directions=True
- Negatives come from the whole batch; the reference's from one GPU's 8 pairs.            groups=N
- Tensors that a tower does not use are not there (the reference carries 25 M of them): `drop`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.errors import ScopeParamNotFoundError
from jaxtyping import Array

from vtp_jax import tree
from vtp_jax.nn import pool as pooling
from vtp_jax.nn.transformer import layer_norm
from vtp_jax.objectives import contrastive
from vtp_jax.types import Batch, Encoded, Extra, Method, Out, Params, Spec, UserError

KINDS = ("video", "text")
TOWERS = {"one": dict(video="base", text="base"), "two": dict(video="video", text="text")}
POOLS = dict(mean_norm="raw", embedding="embedding")  # what of the base's Encoded they read


def make(
    *,
    base: Method,
    towers: str = "two",
    pool: str = "mean_norm",
    temperature: float = 0.05,
    sum_directions: bool = False,
    pool_padding: bool = False,
    groups: int = 1,
    drop: Mapping[str, Sequence[str]] | None = None,
) -> Method:
    """Retrieval with `base`, which needs encode "video" and "text".

    towers: "one" net for both, params {"base": ...}; or "two" that begin equal and are trained
        apart, params {"video": ..., "text": ...}
    pool: "mean_norm", the mean of the tokens before the net's last norm through a fresh layer norm,
        params "video_norm" and "text_norm"; or "embedding", the net's own, with its pretrained norm
    temperature, groups: see `objectives.contrastive.info_nce`
    drop: part of params ("base", or "video" and "text") -> regexes of the names in it that the task
        does not use

    encode: "video" and "text", as the base's with this task's embedding; of one tower from which
    nothing is dropped, also whatever else the base has ("pair"). extra is {part: the base's}; it is
    read and does not change. Raises UserError on what does not fit together.
    """
    for name, value, known in (("towers", towers, TOWERS), ("pool", pool, POOLS)):
        if value not in known:
            raise UserError(f"config.task.{name}={value!r}; known: {', '.join(known)}")
    if lacking := [kind for kind in KINDS if kind not in base.encode]:
        raise UserError(
            f"config.task: the method has no encode '{lacking[0]}', which retrieval needs"
        )
    if pool == "embedding" and pool_padding:
        raise UserError(
            "config.task.pool_padding is of pool=mean_norm; an embedding is the method's own"
        )
    part, reads, norm = TOWERS[towers], POOLS[pool], layer_norm(None)
    drop, parts = drop or {}, list(dict.fromkeys(part.values()))
    if odd := sorted(set(drop) - set(parts)):
        raise UserError(
            f"config.task.drop: no part '{odd[0]}'; {towers} towers: {', '.join(parts)}"
        )

    def init(rng: Array, spec: Spec) -> Params:
        whole = base.init(rng, spec)
        params: dict[str, Any] = {
            p: tree.without(whole, drop.get(p, ()), f"config.task.drop.{p}") for p in parts
        }
        for kind in KINDS:
            found = look(base, kind, rng, spec, params[part[kind]])
            if reads not in found:
                raise UserError(f"config.task.pool={pool}: encode '{kind}' gives no {reads}")
            if pool == "mean_norm":
                width = found["raw"].shape[-1]
                params[f"{kind}_norm"] = norm.init(rng, jnp.zeros(width))["params"]
        return params

    def start(rng: Array, spec: Spec, params: Params) -> Extra:
        return {p: base.start(rng, spec, params[p]) for p in parts}

    def encoder(kind: str) -> Callable[..., Encoded]:
        def encode(params: Params, extra: Extra, batch: Batch, rng: Any = None) -> Encoded:
            found = base.encode[kind](params[part[kind]], extra[part[kind]], batch, rng)
            if pool == "embedding":
                return found
            mean = pooling.mean(found["raw"], None if pool_padding else found["mask"])
            embedding = norm.apply({"params": params[f"{kind}_norm"]}, mean)
            return {**found, "embedding": embedding}

        return encode

    def loss(
        params: Params, extra: Extra, batch: Batch, rng: Array, step: Array
    ) -> tuple[Array, Out]:
        keys = jax.random.split(rng)
        video, text = (
            encode[kind](params, extra, batch, key)["embedding"]
            for kind, key in zip(KINDS, keys, strict=True)
        )
        found = contrastive.both_ways(
            text,
            video,
            batch["valid"],
            temperature=temperature,
            groups=groups,
            sum_directions=sum_directions,
        )
        return found.value(), Out(dict(loss_vtc=found), extra)

    encode: dict[str, Callable[..., Encoded]] = {kind: encoder(kind) for kind in KINDS}
    if towers == "one" and not drop:
        encode = {name: of_base(verb) for name, verb in base.encode.items()} | encode
    return Method(init, loss, encode, start)


def of_base(verb: Callable[..., Encoded]) -> Callable[..., Encoded]:
    """A verb of the base, for the task's params and extra."""

    def f(params: Params, extra: Extra, *arguments: Any, **more: Any) -> Encoded:
        return verb(params["base"], extra["base"], *arguments, **more)

    return f


def look(base: Method, kind: str, rng: Array, spec: Spec, params: Params) -> Encoded:
    """The shapes that the base's encoder gives. Raises UserError where it lacks a parameter."""
    try:
        extra = jax.eval_shape(lambda key, params: base.start(key, spec, params), rng, params)
        return jax.eval_shape(base.encode[kind], params, extra, dict(spec))
    except (KeyError, ScopeParamNotFoundError) as error:
        told = str(error).split("(https")[0]
        raise UserError(
            f"config.task.drop: encode '{kind}' needs what was dropped: {told}"
        ) from None
