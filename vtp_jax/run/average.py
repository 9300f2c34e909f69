"""Averaged weights, as a method that wraps another one."""

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

    After every update, average <- decay average + (1 - decay) parameters. The average starts equal
    to the parameters, is fp32 whatever their dtype (in bf16 a decay of 0.9998 would never move it),
    and lives in `extra["ema"]`, sharded like the parameters of the same names and shapes.
    decay: a number below 1, or a schedule as for `schedules.make`. Raises UserError on other
    numbers, and if the method has an "ema" of its own.
    """
    if not isinstance(decay, Mapping) and not 0 <= decay < 1:
        raise UserError(f"average={decay}: the decay must be at least 0 and below 1")
    rate = schedules.make(decay, "average")

    def start(rng: Array, spec: Spec, params: Params) -> Extra:
        own = method.start(rng, spec, params)
        if NAME in own:
            raise UserError(f"average: the method already has an '{NAME}' of its own")
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
    """The extra of the wrapped method."""
    return {name: leaf for name, leaf in extra.items() if name != NAME}
