"""What is done with a pretrained net: make(*, base: Method, ...) -> Method, on any method that has
the `encode` functions the task needs. Here is what tasks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax.errors import ScopeParamNotFoundError
from jaxtyping import Array

from vtp_jax.types import Batch, Encoded, Extra, Method, Params, Spec, UserError


def of_base(verb: Callable[..., Encoded]) -> Callable[..., Encoded]:
    """A verb of the base, for a task's params and extra, both {"base": the base's, ...}."""

    def f(params: Params, extra: Extra, *arguments: Any, **more: Any) -> Encoded:
        return verb(params["base"], extra["base"], *arguments, **more)

    return f


def look(base: Method, kind: str, rng: Array, batch: Batch | Spec, params: Params) -> Encoded:
    """The shapes that the base's encode[kind] gives for a batch with these parameters, which need
    not be all of the base's. Raises UserError where it lacks one."""
    spec = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items()}
    try:
        extra = jax.eval_shape(lambda key, params: base.start(key, spec, params), rng, params)
        return jax.eval_shape(base.encode[kind], params, extra, spec)
    except (KeyError, ScopeParamNotFoundError) as error:
        told = str(error).split("(https")[0]
        raise UserError(
            f"config.task.drop: encode '{kind}' needs what was dropped: {told}"
        ) from None
