"""Cross-entropy over classes: words of a vocabulary, match or no match, labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtp_jax.types import Mean


def cross_entropy(
    logits: Float[Array, "b *n c"],
    target: Int[Array, "b *n"],
    where: Bool[Array, "b *n"],
    groups: int = 1,
) -> Mean:
    """-log softmax(logits)[target] over the entries where `where` holds, in fp32 or wider.

    groups: 1 is the mean over all entries; g is the mean of the means of g blocks of rows, which
    is what averaging per-device losses amounts to. Blocks without an entry do not count.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    picked = jnp.take_along_axis(logits, jnp.where(where, target, 0)[..., None], axis=-1)[..., 0]
    return grouped(jax.nn.logsumexp(logits, axis=-1) - picked, where, groups)


def accuracy(
    logits: Float[Array, "b *n c"], target: Int[Array, "b *n"], where: Bool[Array, "b *n"]
) -> Mean:
    """Share of entries whose largest logit is the target's."""
    return Mean.of((jnp.argmax(logits, axis=-1) == target).astype(jnp.float32), where)


def grouped(values: Float[Array, "b *n"], where: Bool[Array, "b *n"], groups: int) -> Mean:
    """Mean over all entries (groups=1), or over the means of blocks of rows that have any."""
    if groups == 1:
        return Mean.of(values, where)
    blocks = jax.vmap(Mean.of)(values.reshape(groups, -1), where.reshape(groups, -1))
    return Mean.of(blocks.value(), blocks.count > 0)
