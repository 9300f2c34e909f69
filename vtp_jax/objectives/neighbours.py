"""Contrast with several weighted positives for each row: its key, and the key's nearest neighbours
among past rows (SNCLR, arXiv 2303.17142; NNCLR, 2104.14548).

All vectors except `query` have length one. b rows, c candidates of each, k neighbours, d width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vtp_jax.objectives.contrastive import cosines, normalise
from vtp_jax.types import Mean, UserError


def nearest(
    query: Float[Array, "b d"],
    rows: Float[Array, "n d"],
    real: Bool[Array, " n"],
    k: int,
    groups: int = 1,
) -> tuple[Float[Array, "b k d"], Bool[Array, "b k"]]:
    """The k real rows with the largest cosine to each query, in descending order, and a mask of
    those that exist: False where fewer than k rows are real. No gradient flows through them.

    groups: each block of b / g queries searches its own n / g rows, see `queue.push`. Raises
    UserError unless g divides b and n, and k is at most n / g.
    """
    (b, d), n = query.shape, rows.shape[0]
    if n % groups or b % groups or k > n // groups:
        raise UserError(f"{k} neighbours of {b} rows among {n} do not fit groups={groups}")
    if not k:
        return jnp.zeros((b, 0, d), query.dtype), jnp.zeros((b, 0), bool)
    size = n // groups
    # top_k gathers its operand, whose rows may be split over devices. To gather less: the k best
    # places lie in those k columns of a table (m, c) that have the largest maxima.
    m = max(i for i in range(1, math.isqrt(size // k) + 1) if size % i == 0)
    query = jax.lax.stop_gradient(query).reshape(groups, b // groups, d)
    table = jax.lax.stop_gradient(rows).reshape(groups, m, size // m, d).astype(query.dtype)
    cosine = cosines("gqd,gmcd->gqmc", query, table)
    cosine = jnp.where(real.reshape(groups, 1, m, -1), cosine, -jnp.inf)
    column = jax.lax.top_k(cosine.max(axis=2), k)[1]
    pool = jnp.take_along_axis(cosine, column[:, :, None], axis=3)
    best, chosen = jax.lax.top_k(pool.reshape(groups, -1, m * k), k)
    at = chosen // k, jnp.take_along_axis(column, chosen % k, axis=2)
    found = jax.vmap(lambda table, i, j: table[i, j])(table, *at)
    return found.reshape(b, k, d), (best > -jnp.inf).reshape(b, k)


def positiveness(
    query: Float[Array, "b d"],
    near: Float[Array, "b k d"],
    real: Bool[Array, "b k"],
    threshold: float = 0.0,
) -> Float[Array, "b k"]:
    """The weight of each neighbour for a query: the softmax of their cosines over the real
    neighbours, where weights up to `threshold` become 0. All are 0 where no neighbour is real."""
    # Cosines are at most 1, so no maximum need be subtracted, and k may be 0.
    raw = jnp.where(real, jnp.exp(cosines("bd,bkd->bk", normalise(query), near)), 0)
    weight = raw / jnp.maximum(raw.sum(axis=1, keepdims=True), 1e-8)
    return jnp.where(weight > threshold, weight, 0)


def soft_info_nce(
    query: Float[Array, "b d"],
    candidate: Float[Array, "b c d"],
    real: Bool[Array, "b c"],
    weight: Float[Array, "b c"],
    where: Bool[Array, " b"],
    *,
    temperature: float,
    weighted: str = "outside",
) -> Mean:
    """InfoNCE with weighted positives. p is the softmax of cos(query_i, candidate) / temperature
    over all real candidates of all rows, and j runs over the candidates of row i; the result is the
    mean over rows of

        "outside":  - sum_j weight_ij log p_ij
        "inside":   - log sum_j weight_ij p_ij

    in fp32 or wider. Rows where `where` is False are not queries. Every row needs a real candidate
    with a weight other than 0; with one candidate of weight 1 for each row, both equal
    `contrastive.info_nce`.
    """
    query = normalise(query)
    everyone = cosines("id,jcd->ijc", query, candidate) / temperature
    everyone = jnp.where(real, everyone, jnp.finfo(everyone.dtype).min)
    total = jax.nn.logsumexp(everyone, axis=(1, 2))
    own = cosines("id,icd->ic", query, candidate) / temperature
    weight = jnp.where(real, weight, 0)
    if weighted == "outside":
        loss = weight.sum(axis=1) * total - (weight * own).sum(axis=1)
    else:
        loss = total - jax.nn.logsumexp(own, axis=1, b=weight)
    return Mean.of(loss, where)
