"""Video-text contrast."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from vtp_jax.objectives.classification import grouped, soft_cross_entropy
from vtp_jax.objectives.momentum import soft_targets
from vtp_jax.types import Mean, UserError, wide

# Cosines are divided by temperatures down to 0.01. By default, GPUs and TPUs compute fp32 products
# in TF32 or bf16: an error of 2^-9 in a cosine is 0.2 in a logit.
cosines = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def normalise(x: Float[Array, "b d"], floor: float = 1e-8) -> Float[Array, "b d"]:
    """x / max(|x|, floor), in fp32 or wider; the gradient at 0 is finite."""
    x = wide(x)
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), floor**2))


def info_nce(
    query: Float[Array, "b d"],
    key: Float[Array, "b d"],
    where: Bool[Array, " b"],
    *,
    temperature: float | Float[Array, ""],
    groups: int = 1,
    chunks: int = 1,
) -> Mean:
    """-log softmax over keys of cos(query_i, key_j) / temperature at j = i: one direction.

    Rows where `where` is False are neither queries nor negatives. groups: negatives come from the
    row's own block of b / groups rows only. chunks: logits are computed, forward and backward, for
    b / groups / chunks keys at a time and are never all in memory: the result is the same, in
    1 / chunks of the memory, at the cost of one more product of queries and keys. Raises UserError
    unless groups x chunks divides b.
    """
    if where.shape[0] % (groups * chunks):
        raise UserError(
            f"a batch of {where.shape[0]} rows does not divide into groups={groups} of "
            f"chunks={chunks}"
        )
    q, k = (normalise(x).reshape(groups, -1, x.shape[-1]) for x in (query, key))
    here = where.reshape(groups, -1)
    row = jnp.broadcast_to(jnp.arange(here.shape[1]), here.shape)
    least = jnp.finfo(q.dtype).min

    def block(
        carry: tuple[Array, Array, Array], some: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array, Array], None]:
        """Adds one chunk of keys to the running largest logit, the sum of exponentials relative to
        it, and the logit of the right key, "g i" each."""
        (best, total, right), (k, here, column) = carry, some
        logits = cosines("gid,gjd->gij", q, k) / temperature
        logits = jnp.where(here[:, None, :], logits, least)
        # Any shift cancels, so the shift needs no gradient.
        high = jax.lax.stop_gradient(jnp.maximum(best, logits.max(axis=-1)))
        total = total * jnp.exp(best - high) + jnp.exp(logits - high[..., None]).sum(axis=-1)
        right += jnp.where(row[..., None] == column[:, None], logits, 0).sum(axis=-1)
        return (high, total, right), None

    # A chunk takes every n-th key, so it has keys from every device that rows are split over.
    def part(x: Shaped[Array, "g n *d"]) -> Shaped[Array, "c g j *d"]:
        return jnp.moveaxis(x.reshape(groups, -1, chunks, *x.shape[2:]), 2, 0)

    zeros = jnp.zeros(here.shape, q.dtype)
    (best, total, right), _ = jax.lax.scan(
        jax.checkpoint(block, prevent_cse=False),
        (zeros + least, zeros, zeros),
        (part(k), part(here), part(row)),
    )
    return grouped(best + jnp.log(total) - right, here, groups)


def both_ways(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    where: Bool[Array, " b"],
    *,
    temperature: float | Float[Array, ""],
    groups: int = 1,
    chunks: int = 1,
    sum_directions: bool = False,
) -> Mean:
    """The mean of `info_nce` from a to b and from b to a, or their sum."""
    options: Any = dict(temperature=temperature, groups=groups, chunks=chunks)
    there, back = (info_nce(q, k, where, **options) for q, k in ((a, b), (b, a)))
    share = 1.0 if sum_directions else 0.5
    return Mean(share * (there.total + back.total), there.count)


def compare(
    query: Float[Array, "b d"],
    key: Float[Array, "k d"],
    seen: Bool[Array, "b k"],
    *,
    temperature: float | Float[Array, ""],
) -> Float[Array, "b k"]:
    """Contrastive logits against any keys, such as those of a queue: cosines / temperature, and the
    smallest finite number where `seen` is False."""
    logits = cosines("bd,kd->bk", normalise(query), normalise(key)) / temperature
    return jnp.where(seen, logits, jnp.finfo(logits.dtype).min)


def namesakes(
    name: Int[Array, " b"], names: Int[Array, " k"], seen: Bool[Array, "b k"]
) -> Float[Array, "b k"]:
    """Targets of contrast with labels (UniCL, arXiv 2204.03610): uniform over the keys that a row
    sees and that have its name; zeros where there are none."""
    same = (name[:, None] == names[None]) & seen
    return same / jnp.maximum(same.sum(axis=1, keepdims=True), 1)


def with_twin(
    mine: tuple[Float[Array, "b d"], Float[Array, "b d"]],
    twin: tuple[Float[Array, "b d"], Float[Array, "b d"]],
    past: tuple[Float[Array, "k d"], Float[Array, "k d"], Int[Array, " k"], Bool[Array, " k"]],
    name: Int[Array, " b"],
    near: Bool[Array, "b b"],
    *,
    temperature: float | Float[Array, ""],
    alpha: float | Float[Array, ""],
) -> tuple[Mean, tuple[Float[Array, "b b"], Float[Array, "b b"]]]:
    """Contrast between two kinds of features, with a momentum twin's features of this and of past
    batches as keys (ALBEF, arXiv 2107.07651; BLIP). Rows of the same name are each other's
    positives (UniCL).

    mine, twin: features of both kinds; past: the twin's past ones, with their names and whether
    they are real; near: the rows of the batch that a row sees, including itself if it is valid.
    alpha: weight of the twin's own softmax in the targets. Returns the mean of both directions,
    and for each direction the logits within this batch.
    """
    held, real = past[:2], jnp.broadcast_to(past[3], (len(name), len(past[3])))
    seen = jnp.concatenate([near, real], axis=1)
    own = namesakes(name, jnp.concatenate([name, past[2]]), seen)
    where, found = jnp.diagonal(near), []
    for i, j in ((0, 1), (1, 0)):
        keys = jnp.concatenate([twin[j], held[j].astype(twin[j].dtype)])
        logits, soft = (compare(by[i], keys, seen, temperature=temperature) for by in (mine, twin))
        target = soft_targets(soft, own, alpha)
        found.append((soft_cross_entropy(logits, target, where), logits[:, : len(name)]))
    (there, a), (back, b) = found
    return Mean((there.total + back.total) / 2, there.count), (a, b)
