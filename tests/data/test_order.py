"""Laws of the order: permutations, shares, memory, and what processes see across restarts."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtp_jax.data import order as orders
from vtp_jax.types import UserError


@given(count=st.integers(1, 3000), seed=st.integers(0, 99), epoch=st.integers(0, 2**40))
def test_permute_is_a_permutation(count, seed, epoch):
    found = orders.permute(np.arange(count), count, (seed, epoch))
    np.testing.assert_array_equal(np.sort(found), np.arange(count))


def test_permute_is_uniform():
    """Of 600 keys, each of 5 numbers is at each place about 120 times (chi-squared, 16
    degrees: 99.9 % below 39), and neighbours stay neighbours no more often than by chance."""
    found = np.stack([orders.permute(np.arange(5), 5, (7, k)) for k in range(600)])
    counts = np.stack([np.bincount(column, minlength=5) for column in found.T])
    assert ((counts - 120) ** 2 / 120).sum() < 39
    long = orders.permute(np.arange(100_000), 100_000, (3,))
    assert (np.abs(np.diff(long)) == 1).sum() < 15  # 2 are expected
    assert abs(np.corrcoef(np.arange(100_000), long)[0, 1]) < 0.015
    other = orders.permute(np.arange(100_000), 100_000, (4,))
    assert (long == other).sum() < 10  # 1 is expected


def ids(order, first, steps):
    """The global rows of some steps, of the processes of `order`, which is made per process."""
    return [
        np.concatenate([orders.rows_of(one, step)[1] for one in order])
        for step in range(first, first + steps)
    ]


MAKERS = dict(
    shuffled=lambda process: orders.shuffled_order(12, process, 3, 50),
    mixed=lambda process: orders.mixed_order(12, process, 3, (50, 7, 31), (5.0, 1.0, 0.5)),
)


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_two_then_three_then_one_process_are_one_sequence(make):
    whole = ids([make((0, 1))], 0, 9)
    parts = [
        *ids([make((i, 2)) for i in range(2)], 0, 4),
        *ids([make((i, 3)) for i in range(3)], 4, 3),
        *ids([make((0, 1))], 7, 2),
    ]
    np.testing.assert_array_equal(parts, whole)


def test_sets_of_a_mixture_have_their_shares_and_their_epochs():
    counts, weights = (50, 7, 331), (5.0, 1.0, 0.5)
    order = orders.mixed_order(10, (0, 1), 0, counts, weights)
    epochs, indices = order.at(np.arange(3 * orders.ROUND))
    sets = np.searchsorted(np.cumsum(counts), indices, side="right")
    for start in range(0, len(sets), orders.ROUND):
        shares = np.bincount(sets[start : start + orders.ROUND])
        assert shares.tolist() == list(orders.share_out(weights))
        assert np.abs(shares - orders.ROUND * np.asarray(weights) / 6.5).max() < 1
    for k, count in enumerate(counts):
        own = indices[sets == k] - sum(counts[:k])
        for epoch in range(len(own) // count):  # every clip once, one epoch after the other
            here = slice(epoch * count, (epoch + 1) * count)
            assert sorted(own[here]) == list(range(count))
            assert (epochs[sets == k][here] == epoch).all()


@given(weights=st.lists(st.floats(0.02, 50), min_size=1, max_size=8))
def test_shares_add_up(weights):
    if min(weights) < 2e-3 * sum(weights):
        return
    shares = orders.share_out(weights)
    assert sum(shares) == orders.ROUND
    assert np.abs(np.asarray(shares) - orders.ROUND * np.asarray(weights) / sum(weights)).max() < 1


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -2.0), (1.0, float("nan")), (1.0, 1e-9)])
def test_weights_without_a_row_are_rejected(weights):
    with pytest.raises(UserError, match="weights"):
        orders.share_out(weights)


@pytest.mark.parametrize("step", [0, 10**6])
def test_memory_is_that_of_the_batch(step):
    """As much for a billion records as for a thousand, at the first step and at a late one."""

    def peak(count):
        make = [
            orders.shuffled_order(64, (0, 1), 0, count),
            orders.mixed_order(64, (0, 1), 0, (count, count), (1.0, 2.0)),
        ]
        tracemalloc.start()
        for order in make:
            order.at(np.arange(step * 64, step * 64 + 64))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1000)  # what is cached once
    assert peak(10**9) < peak(1000) + 50_000
