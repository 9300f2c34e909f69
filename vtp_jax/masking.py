"""Masks of tokens and words, and choices of negative rows: pure functions of a key.

Row i of a draw depends on the key and on i, not on the number of rows after it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from vtp_jax.types import TokenMask, UserError


def tubes(rng: Array, b: int, grid: tuple[int, int, int], ratio: float) -> TokenMask:
    """The same places hidden in every frame (VideoMAE, SimVTP): int(ratio * h * w) of the h * w
    places, drawn uniformly and independently for each row."""
    t, h, w = grid
    places = tokens(rng, b, h * w, ratio)
    start = (jnp.arange(t) * h * w)[None, :, None]

    def spread(index: Int[Array, "b s"]) -> Int[Array, "b m"]:
        return (start + index[:, None, :]).reshape(b, t * index.shape[1])

    return TokenMask(spread(places.keep), spread(places.drop), jnp.tile(places.dropped, (1, t)))


def tokens(rng: Array, b: int, n: int, ratio: float) -> TokenMask:
    """int(ratio * n) of n tokens hidden, drawn uniformly and independently for each row (MAE's
    random masking)."""
    if not 0 <= ratio < 1:
        raise UserError(f"mask ratio {ratio}: must be at least 0 and below 1")
    hidden = int(ratio * n)
    order = jnp.argsort(jax.random.uniform(rng, (b, n)), axis=1)
    drop, keep = jnp.sort(order[:, :hidden], axis=1), jnp.sort(order[:, hidden:], axis=1)
    dropped = jnp.zeros((b, n), bool).at[jnp.arange(b)[:, None], drop].set(True)
    return TokenMask(keep.astype(jnp.int32), drop.astype(jnp.int32), dropped)


def running_cells(rng: Array, b: int, grid: tuple[int, int, int], ratio: float) -> TokenMask:
    """VideoMAE V2's mask of decoder places (arXiv 2303.16727, section 3.2; its code): int(4 ratio)
    of the four places of every 2 x 2 cell are dropped, advancing by one place along the cell in
    each frame, so that any four consecutive frames keep each place equally often. Each row of the
    batch draws one of the four phases. Raises UserError on other ratios and on odd grids."""
    t, h, w = grid
    if int(4 * ratio) not in (1, 2, 3):
        raise UserError(f"mask ratio {ratio}: running cells drop 1, 2 or 3 of 4 places")
    if h % 2 or w % 2:
        raise UserError(f"running cells are 2 x 2; they do not tile a grid of {h} x {w} tokens")
    phase = jax.random.randint(rng, (b, 1, 1, 1), 0, 4)
    frame, row, column = jnp.meshgrid(*(jnp.arange(side) for side in grid), indexing="ij")
    # The code's ring of ones, then zeros, is read from phase + frame + 1 on, in row-major order.
    dropped = (phase + frame + 1 + 2 * (row % 2) + column % 2) % 4 < int(4 * ratio)
    return of_dropped(dropped.reshape(b, t * h * w), t * h * w // 4 * int(4 * ratio))


MASKS = ("tubes", "tokens")


def of_video(kind: str, rng: Array, b: int, grid: tuple[int, int, int], ratio: float) -> TokenMask:
    """A mask of a video's tokens. kind: "tubes", or "tokens", drawn over all frames."""
    if kind == "tubes":
        return tubes(rng, b, grid, ratio)
    return tokens(rng, b, math.prod(grid), ratio)


def highest(score: Float[Array, "b n"], k: int) -> TokenMask:
    """The mask that keeps the k tokens with the highest scores, ties going to the first: pruning by
    received attention (EVAD, arXiv 2304.08451; EViT, 2202.07800). A token with an infinite score is
    always kept."""
    best = jax.lax.top_k(jax.lax.stop_gradient(score), k)[1]
    dropped = jnp.ones(score.shape, bool).at[jnp.arange(len(score))[:, None], best].set(False)
    return of_dropped(dropped, score.shape[1] - k)


def of_dropped(dropped: Bool[Array, "b n"], hidden: int) -> TokenMask:
    """The mask of the tokens that `dropped` marks, `hidden` of them in each row."""
    order = jnp.argsort(~dropped, axis=1, stable=True).astype(jnp.int32)
    return TokenMask(order[:, hidden:], order[:, :hidden], dropped)


def words(rng: Array, maskable: Bool[Array, "b l"], ratio: float) -> Bool[Array, "b l"]:
    """True for words to hide: each maskable one independently with probability `ratio`."""
    return jax.random.bernoulli(rng, ratio, maskable.shape) & maskable


def negatives(rng: Array, valid: Bool[Array, " b"], groups: int = 1) -> Int[Array, " b"]:
    """For every row the index of another valid row of its group, drawn uniformly (with replacement
    over rows). Where there is none, the row itself: such rows must be left out of losses.

    groups: number of contiguous blocks that negatives stay within (a paper's "per GPU"). Raises
    UserError unless it divides the rows.
    """
    (b,) = valid.shape
    if b % groups:
        raise UserError(f"a batch of {b} rows does not divide into groups={groups}")
    v = valid.reshape(groups, b // groups).astype(jnp.int32)
    count = v.sum(axis=1, keepdims=True)
    order = jnp.argsort(1 - v, axis=1, stable=True)  # valid rows first, ascending
    rank = jnp.cumsum(v, axis=1) - 1
    u = jax.random.uniform(rng, (b,)).reshape(groups, -1)
    # (i + randint(1, count)) mod count, among the valid rows.
    others = jnp.maximum(count - 1, 1)
    shift = 1 + jnp.minimum((u * others).astype(jnp.int32), others - 1)
    other = jnp.take_along_axis(order, (rank + shift) % jnp.maximum(count, 1), axis=1)
    start = (jnp.arange(groups) * (b // groups))[:, None]
    own = jnp.arange(b // groups)[None]
    chosen = jnp.where((v > 0) & (count > 1), other, own)
    return (start + chosen).reshape(b).astype(jnp.int32)


def candidates(
    rng: Array, valid: Bool[Array, " b"], k: int, groups: int = 1
) -> tuple[Int[Array, "b k"], Bool[Array, "b k"]]:
    """k-way matching (VIOLET, arXiv 2111.12681; LAVENDER, 2206.07160): for every row its own index,
    then k - 1 other valid rows of its group, drawn uniformly without replacement; and a mask of
    those that exist, since a group may have fewer. k = b gives all B x B pairs. A row that is not
    valid has no candidate."""
    own = jnp.arange(len(valid), dtype=jnp.int32)
    if not 1 <= k <= len(valid):
        raise UserError(f"{k} candidates in a batch of {len(valid)} rows: at least 1, at most all")
    order = jnp.where(together(valid, groups), jax.random.uniform(rng, 2 * valid.shape), 2.0)
    order = order.at[own, own].set(jnp.where(valid, -1.0, 2.0))  # its own comes first
    chosen = jnp.argsort(order, axis=1)[:, :k]
    real = jnp.take_along_axis(order, chosen, axis=1) < 2
    return jnp.where(real, chosen, own[:, None]).astype(jnp.int32), real


def replaced(
    rng: Array, valid: Bool[Array, " b"], share: float, groups: int = 1
) -> tuple[Int[Array, " b"], Bool[Array, " b"]]:
    """Replaced pairs (ClipBERT, arXiv 2102.06183): for every row the index of the row whose other
    half it gets, and whether the two are still a pair. A row is replaced with probability `share`,
    by a draw of `negatives`."""
    chance, choice = jax.random.split(rng)
    own = jnp.arange(len(valid), dtype=jnp.int32)
    asked = jax.random.bernoulli(chance, share, valid.shape)
    index = jnp.where(asked, negatives(choice, valid, groups), own)
    return index, index == own


def together(valid: Bool[Array, " b"], groups: int = 1) -> Bool[Array, "b b"]:
    """True for pairs of valid rows of the same group (see `negatives`)."""
    (b,) = valid.shape
    if b % groups:
        raise UserError(f"a batch of {b} rows does not divide into groups={groups}")
    group = jnp.arange(b) // (b // groups)
    return (group[:, None] == group) & valid & valid[:, None]


def hard_negatives(
    rng: Array,
    scores: Float[Array, "b k"],
    allowed: Bool[Array, "b k"],
    floor: float = 1e-4,
) -> Int[Array, " b"]:
    """For every row one of its `allowed` columns, drawn in proportion to the softmax over the whole
    row, including columns not allowed, plus `floor` (ALBEF, arXiv 2107.07651; the floor is from
    BLIP's code). Where no column is allowed, 0: such rows must be left out of losses."""
    weight = jax.nn.softmax(jax.lax.stop_gradient(scores)) + floor
    return jax.random.categorical(rng, jnp.log(jnp.where(allowed, weight, 0))).astype(jnp.int32)


def take(x: Shaped[Array, "b n *d"], index: Int[Array, "b k"]) -> Shaped[Array, "b k *d"]:
    """Tokens by index, row by row."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def put(
    x: Shaped[Array, "b n *d"], index: Int[Array, "b k"], values: Shaped[Array, "b k *d"]
) -> Shaped[Array, "b n *d"]:
    """x with tokens replaced by index, row by row."""
    return jax.vmap(lambda row, i, v: row.at[i].set(v))(x, index, values)
