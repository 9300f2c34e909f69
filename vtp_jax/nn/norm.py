"""Normalisation layers other than the Transformer's."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vtp_jax.types import wide


def batch_norm(
    x: Float[Array, "b d"], where: Bool[Array, " b"], eps: float = 1e-5
) -> Float[Array, "b d"]:
    """Every column normalised to mean 0 and standard deviation 1 over the rows where `where` is
    True, across all devices (as PyTorch's SyncBatchNorm in training); fp32 or wider, in two passes.

    The other rows are shifted and scaled alike but do not enter the statistics.
    """
    x = wide(x)
    counts, rows = where[:, None], jnp.maximum(where.sum(dtype=x.dtype), 1)
    x = x - jnp.where(counts, x, 0).sum(axis=0) / rows
    variance = jnp.where(counts, x * x, 0).sum(axis=0) / rows
    return x / jnp.sqrt(variance + eps)


class BatchNorm(nn.Module):
    """`batch_norm`, then a learned scale and bias. It has no running statistics: it is for heads
    that are used in training only."""

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], where: Bool[Array, " b"]) -> Float[Array, "b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[1],))
        return batch_norm(x, where) * scale + bias
