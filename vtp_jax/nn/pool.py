"""From many tokens to one vector, or to a few tokens."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vtp_jax.nn.transformer import VIT, CrossAttention, Style, layer_norm
from vtp_jax.types import wide


def mean(x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None) -> Float[Array, "b d"]:
    """The mean over tokens (those where `mask` is True, if given), in fp32 or wider."""
    x = wide(x)
    if mask is None:
        return x.mean(axis=1)
    w = mask[..., None].astype(x.dtype)
    return (x * w).sum(axis=1) / jnp.maximum(w.sum(axis=1), 1)


class AttentionPool(nn.Module):
    """n learned queries that attend to any number of tokens of any width: CoCa's attentional pooler
    (arXiv 2205.01917), a single attention layer. Queries and tokens are normalised first and
    queries are initialised from N(0, 1), both as in OpenCLIP.
    """

    queries: int
    width: int
    heads: int
    style: Style = VIT
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b m e"], mask: Bool[Array, "b m"] | None = None
    ) -> Float[Array, "b n d"]:
        query = self.param("query", nn.initializers.normal(1.0), (self.queries, self.width))
        query = layer_norm(self.dtype, self.style.eps, "norm_query")(query)
        query = jnp.broadcast_to(query, (len(x), *query.shape))
        x = layer_norm(self.dtype, self.style.eps, "norm")(x)
        attention = CrossAttention(self.heads, self.style, self.dtype, name="cross")
        return attention(query, x, mask)
