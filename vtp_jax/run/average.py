"""Averaged weights, as a method around a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vtp_jax import schedules
from vtp_jax.types import Batch, Encoded, Extra, Method, Out, Params, Spec, UserError

NAME = "ema"


def average(method: Method, decay: float | Mapping[str, Any]) -> Method:
    """The method with a moving average of its parameters, and `encode["ema/..."]` that use it.

    After every update average <- decay average + (1 - decay) parameters. It starts as the
    parameters do, is fp32 whatever they are (in bf16 a decay of 0.9998 never moves it), and lives
    in `extra["ema"]`, whose leaves are sharded as the parameters whose names and shapes they have.
    decay: a number below 1, or a schedule of `schedules.make`. Raises UserError on another number,
    and where the method has an "ema" of its own.
    """
    if not isinstance(decay, Mapping) and not 0 <= decay < 1:
        raise UserError(f"average={decay}: a decay is at least 0 and below 1")
    rate = schedules.make(decay, "average")

    def start(rng: Array, spec: Spec, params: Params) -> Extra:
        own = method.start(rng, spec, params)
        if NAME in own:
            raise UserError(f"average: the method carries an '{NAME}' already")
        return {**own, NAME: jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)}

    def loss(
        params: Params, extra: Extra, batch: Batch, rng: Array, step: Array
    ) -> tuple[Array, Out]:
        value, out = method.loss(params, own(extra), batch, rng, step)
        return value, out._replace(extra={**out.extra, NAME: extra[NAME]})

    def after_update(params: Params, extra: Extra, step: Array) -> tuple[Params, Extra]:
        params, rest = method.after_update(params, own(extra), step)
        share = 1 - rate(step)
        mean = jax.tree.map(lambda m, p: m + share * (p - m), extra[NAME], params)
        return params, {**rest, NAME: mean}

    def plain(
        verb: Callable[..., Encoded], params: Params, extra: Extra, *a: Any, **k: Any
    ) -> Encoded:
        return verb(params, own(extra), *a, **k)

    def averaged(
        verb: Callable[..., Encoded], params: Params, extra: Extra, *a: Any, **k: Any
    ) -> Encoded:
        mean = jax.tree.map(lambda m, p: m.astype(p.dtype), extra[NAME], params)
        return verb(mean, own(extra), *a, **k)

    verbs = method.encode.items()
    return Method(
        init=method.init,
        loss=loss,
        encode={
            **{name: partial(plain, verb) for name, verb in verbs},
            **{f"{NAME}/{name}": partial(averaged, verb) for name, verb in verbs},
        },
        start=start,
        after_update=after_update,
    )


def own(extra: Extra) -> Extra:
    """The extra of the method itself."""
    return {name: leaf for name, leaf in extra.items() if name != NAME}
