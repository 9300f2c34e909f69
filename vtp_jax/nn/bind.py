"""A net with its parameters, of which a task may have dropped some."""

from __future__ import annotations

from typing import TypeVar

import flax.linen as nn
from jaxtyping import Array

from vtp_jax.types import Params

Net = TypeVar("Net", bound=nn.Module)


def bind(net: Net, params: Params, rng: Array | None = None) -> Net:
    """The net with its parameters, ready for its verbs to be called. Dropout and drop path act if
    there is a key: pass none to a net that has neither."""
    return net.bind({"params": params}, rngs={} if rng is None else {"dropout": rng})


def has(bound: nn.Module, name: str) -> bool:
    """Whether a bound net has parameters called `name` at its top level. Tasks drop those that they
    do not use (docs/methods.md), and the encoders then leave out what depends on them."""
    return name in bound.variables["params"]
