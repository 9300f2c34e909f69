"""What is done with a pretrained net: make(*, base: Method, ...) -> Method, on any method that has
the `encode` functions that the task needs. Here is what tasks share.

A task file has the parts of a method file: `build(*, base, ...) -> (net, recipe)`, whose net holds
the base or is the base, and `make`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax.errors import ScopeParamNotFoundError
from jaxtyping import Array

from vtp_jax.types import Batch, Encoded, Extra, Method, Params, Spec, UserError

# Values of `config.task.pool`, and the key of the base's Encoded that each reads.
POOLS = dict(mean_norm="raw", embedding="embedding")


def on_base(made: Method, base: Method, names: Iterable[str]) -> Method:
    """A task's method, whose params and extra are {"base": the base's, ...}, with these verbs of
    the base in addition to its own, which come first."""

    def wrapped(verb: Callable[..., Encoded]) -> Callable[..., Encoded]:
        def f(params: Params, extra: Extra, *arguments: Any, **more: Any) -> Encoded:
            return verb(params["base"], extra["base"], *arguments, **more)

        return f

    kept = {name: wrapped(base.encode[name]) for name in names}
    return made._replace(encode={**kept, **made.encode})


def encoded_shapes(
    base: Method, kind: str, rng: Array, batch: Batch | Spec, params: Params
) -> Encoded:
    """The shapes that the base's encode[kind] returns for a batch, with `params`, some of which may
    have been dropped. Raises UserError if it needs one that was dropped."""
    spec = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items()}
    try:
        extra = jax.eval_shape(lambda key, params: base.start(key, spec, params), rng, params)
        return jax.eval_shape(base.encode[kind], params, extra, spec)
    except (KeyError, ScopeParamNotFoundError) as error:
        cause = str(error).split("(https")[0]
        raise UserError(
            f"config.task.drop: encode '{kind}' needs what was dropped: {cause}"
        ) from None
