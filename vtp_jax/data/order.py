"""Which clip is at which place of a run: functions of (seed, position), in constant memory.

Nothing is shuffled or kept in memory: permutations are computed on demand, so that a million
records cost the same as a thousand, and step 1,000,000 the same as step 1. The global sequence does
not depend on the number of processes: each takes its rows from it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from vtp_jax.types import UserError

ORDER, DEAL = 1, 5  # purposes of random generators; those of the other modules differ
TURNS = 8  # of the Feistel network; four are random enough except for small sets
ROUND = 1000  # rows, within which the sets of a mixture have their exact shares

Ints = Int[np.ndarray, "n"]
Find = Callable[[Ints], tuple[Ints, Ints]]


class Order(NamedTuple):
    """The order of clips. A process numbers its own rows 0, 1, ...: these are their places.

    find: positions in the global sequence -> (epochs, indices); index -1 is padding
    """

    batch: int
    process: tuple[int, int]
    find: Find

    @property
    def rows(self) -> int:
        """The number of rows of a batch that this process makes."""
        return self.batch // self.process[1]

    def at(self, places: Ints) -> tuple[Ints, Ints]:
        step, row = np.divmod(places, self.rows)
        return self.find(step * self.batch + self.process[0] * self.rows + row)


@functools.lru_cache(maxsize=64)
def rows_of(order: Order, step: int) -> tuple[Ints, Ints]:
    """(epochs, indices) of this process's rows of a batch."""
    return order.at(np.arange(step * order.rows, (step + 1) * order.rows))


def list_order(batch: int, process: tuple[int, int], count: int) -> Order:
    """0, 1, ..., count - 1, then padding."""

    def find(positions: Ints) -> tuple[Ints, Ints]:
        return np.zeros_like(positions), np.where(positions < count, positions, -1)

    return Order(batch, process, find)


def shuffled_order(batch: int, process: tuple[int, int], seed: int, count: int) -> Order:
    """Endless: every epoch of `count` positions is a permutation of its own."""
    return Order(batch, process, functools.partial(find_shuffled, (seed,), count))


def mixed_order(
    batch: int,
    process: tuple[int, int],
    seed: int,
    counts: Sequence[int],
    weights: Sequence[float],
) -> Order:
    """Endless rows of several sets of `counts` clips, in proportion to weights.

    In every ROUND positions each set has its share, in an order drawn for that round. Each set has
    its own permutations and epochs. Indices are numbered across the sets. Raises UserError on a
    weight too small for a single row.
    """
    shares = share_out(weights)
    starts = np.cumsum([0, *counts])

    def find(positions: Ints) -> tuple[Ints, Ints]:
        epochs, indices = np.empty_like(positions), np.empty_like(positions)
        rounds, places = np.divmod(positions, ROUND)
        for number in np.unique(rounds).tolist():
            here = np.flatnonzero(rounds == number)
            sets, ranks = deal(shares, seed, number)
            for k in np.unique(sets[places[here]]).tolist():
                mine = here[sets[places[here]] == k]
                own = number * shares[k] + ranks[places[mine]]
                epochs[mine], found = find_shuffled((seed, k), counts[k], own)
                indices[mine] = starts[k] + found
        return epochs, indices

    return Order(batch, process, find)


def share_out(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in proportion to weights that add up to ROUND: the largest remainders are
    rounded up."""
    if not all(np.isfinite(weights)) or min(weights) <= 0:
        raise UserError(f"weights {list(weights)}: each must be a number above 0")
    exact = np.asarray(weights) * (ROUND / sum(weights))
    shares = np.floor(exact).astype(int)
    last = np.argsort(shares - exact, kind="stable")[: ROUND - shares.sum()]
    shares[last] += 1
    if not all(shares):
        raise UserError(
            f"weights {list(weights)}: the smallest gets less than one of {ROUND} rows; raise it"
        )
    return tuple(shares.tolist())


@functools.lru_cache(maxsize=4)
def deal(shares: tuple[int, ...], seed: int, number: int) -> tuple[Ints, Ints]:
    """For each place of a round: (its set, the number of that set's places before it)."""
    slots = permute(np.arange(ROUND), ROUND, (DEAL, seed, number))
    sets = np.repeat(np.arange(len(shares)), shares)[slots]
    ranks = np.empty_like(sets)
    for k, share in enumerate(shares):
        ranks[sets == k] = np.arange(share)
    return sets, ranks


def find_shuffled(key: Sequence[int], count: int, positions: Ints) -> tuple[Ints, Ints]:
    epochs, ranks = np.divmod(positions, count)
    indices = np.empty_like(ranks)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = permute(ranks[here], count, (ORDER, *key, epoch))
    return epochs, indices


def permute(ranks: Ints, count: int, key: Sequence[int]) -> Ints:
    """The images of `ranks` under the permutation of range(count) that `key` determines.

    A Feistel network permutes the smallest 4^k >= count numbers; results outside the range go
    through it again until they are inside (Black and Rogaway, 2002): at most four times on average.
    """
    half = max((count - 1).bit_length() + 1, 2) // 2
    keys = np.random.SeedSequence(key).generate_state(TURNS, np.uint64)
    numbers = encipher(ranks.astype(np.uint64), half, keys)
    while (outside := numbers >= count).any():
        numbers[outside] = encipher(numbers[outside], half, keys)
    return numbers.astype(np.int64)


def encipher(
    numbers: UInt64[np.ndarray, "n"], half: int, keys: UInt64[np.ndarray, "k"]
) -> UInt64[np.ndarray, "n"]:
    """A permutation of the numbers with twice `half` bits."""
    mask = np.uint64((1 << half) - 1)
    left, right = numbers >> np.uint64(half), numbers & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << np.uint64(half)) | right


def mix(numbers: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """Makes every bit depend on every bit: the last stage of splitmix64 (Steele et al., 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
