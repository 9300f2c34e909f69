"""From tokens to one vector."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def mean(x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None) -> Float[Array, "b d"]:
    """The mean over tokens, over those where `mask` holds when it is given; in fp32 or wider."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if mask is None:
        return x.mean(axis=1)
    w = mask[..., None].astype(x.dtype)
    return (x * w).sum(axis=1) / jnp.maximum(w.sum(axis=1), 1)
