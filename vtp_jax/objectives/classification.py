"""Cross-entropy over classes: words of a vocabulary, pair or not, labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtp_jax.types import Mean, wide


def cross_entropy(
    logits: Float[Array, "b *n c"],
    target: Int[Array, "b *n"],
    where: Bool[Array, "b *n"],
    groups: int = 1,
    smoothing: float = 0.0,
) -> Mean:
    """-log softmax(logits)[target] over the entries where `where` is True, in fp32 or wider.

    groups: 1 is the mean over all entries; g is the mean of the means of g blocks of rows, which
    is what averaging per-device losses computes. Blocks without an entry do not count.
    smoothing: the share of the target that is spread over all classes, see `smooth`.
    """
    logits = wide(logits)
    picked = jnp.take_along_axis(logits, jnp.where(where, target, 0)[..., None], axis=-1)[..., 0]
    if smoothing:
        picked = (1 - smoothing) * picked + smoothing * logits.mean(axis=-1)
    return grouped(jax.nn.logsumexp(logits, axis=-1) - picked, where, groups)


def soft_cross_entropy(
    logits: Float[Array, "b *n c"], target: Float[Array, "b *n c"], where: Bool[Array, "b *n"]
) -> Mean:
    """-sum_c target log softmax(logits) over the entries where `where` is True, in fp32 or wider.
    target: distributions over the classes, as from `smooth` and `augment.mix`."""
    logits = wide(logits)
    return Mean.of(-(target * jax.nn.log_softmax(logits)).sum(axis=-1), where)


def smooth(
    label: Int[Array, "*n"], classes: int, smoothing: float = 0.0
) -> Float[Array, "*n classes"]:
    """One-hot targets of which `smoothing` is spread evenly over all classes (Szegedy et al.,
    arXiv 1512.00567)."""
    return jax.nn.one_hot(label, classes) * (1 - smoothing) + smoothing / classes


def accuracy(
    logits: Float[Array, "b *n c"],
    target: Int[Array, "b *n"],
    where: Bool[Array, "b *n"],
    k: int = 1,
) -> Mean:
    """Share of entries whose target is among the k largest logits; ties go to the lower class, and
    a NaN is never right."""
    best, chosen = jax.lax.top_k(logits, k)
    right = (chosen == target[..., None]) & ~jnp.isnan(best)
    return Mean.of(right.any(axis=-1).astype(jnp.float32), where)


def scored(
    logits: Float[Array, "b *n c"],
    target: Int[Array, "b *n"],
    where: Bool[Array, "b *n"],
    groups: int = 1,
    smoothing: float = 0.0,
) -> tuple[Mean, Mean]:
    """(`cross_entropy`, `accuracy`) of the same logits. groups, smoothing: for the loss only."""
    loss = cross_entropy(logits, target, where, groups, smoothing)
    return loss, accuracy(logits, target, where)


def log_odds(logits: Float[Array, "*b 2"]) -> Float[Array, "*b"]:
    """log p(yes) - log p(no) of logits for (no, yes), in fp32 or wider."""
    logits = wide(logits)
    return logits[..., 1] - logits[..., 0]


def grouped(values: Float[Array, "b *n"], where: Bool[Array, "b *n"], groups: int) -> Mean:
    """Mean over all entries (groups=1), or over the means of those blocks that have entries."""
    if groups == 1:
        return Mean.of(values, where)
    blocks = jax.vmap(Mean.of)(values.reshape(groups, -1), where.reshape(groups, -1))
    return Mean.of(blocks.value(), blocks.count > 0)
