"""Loss terms by name: their weights, choices among named options, and the weighted sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from vtp_jax.types import Mean, UserError


def weights(given: Mapping[str, float] | None, defaults: Mapping[str, float]) -> dict[str, float]:
    """`defaults`, overridden by `given`. Raises UserError on a name that `defaults` lacks."""
    found = {**defaults, **(given or {})}
    if wrong := sorted(set(found) - set(defaults)):
        raise UserError(f"method.weights: no loss '{wrong[0]}'; known: {', '.join(defaults)}")
    return found


def choose(name: str, value: str, known: Collection[str], where: str = "method") -> str:
    """Returns `value`; unless it is in `known`, raises UserError that begins with
    `{where}.{name}=`."""
    if value not in known:
        raise UserError(f"{where}.{name}={value!r}; known: {', '.join(known)}")
    return value


def total(found: Mapping[str, Mean], weights: Mapping[str, float]) -> Float[Array, ""]:
    """The sum of weights[name] times the value of found["loss_<name>"]. A term of weight 0 adds
    nothing and need not be in `found`; every other one must be."""
    asked = {name: weight for name, weight in weights.items() if weight}
    return sum((w * found[f"loss_{name}"].value() for name, w in asked.items()), jnp.zeros(()))
