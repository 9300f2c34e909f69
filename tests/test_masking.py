"""Laws of masks and negatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtp_jax import masking
from vtp_jax.types import UserError

KEY = jax.random.key(3)
tubes = jax.jit(masking.tubes, static_argnums=(1, 2, 3))
tokens = jax.jit(masking.tokens, static_argnums=(1, 2, 3))
running_cells = jax.jit(masking.running_cells, static_argnums=(1, 2, 3))


@pytest.mark.parametrize(
    "grid, ratio", [((8, 14, 14), 0.9), ((2, 3, 5), 0.5), ((1, 4, 4), 0.0), ((3, 2, 2), 0.99)]
)
def test_tubes_hide_the_same_places_in_every_frame(grid, ratio):
    t, h, w = grid
    mask = tubes(KEY, 5, grid, ratio)
    dropped = np.asarray(mask.dropped).reshape(5, t, h * w)
    assert (dropped == dropped[:, :1]).all()
    assert (dropped.sum(axis=2) == int(ratio * h * w)).all()
    assert mask.keep.shape == (5, t * (h * w - int(ratio * h * w)))


def test_tubes_of_simvtp_leave_160_of_1568_tokens():
    mask = jax.eval_shape(lambda: masking.tubes(KEY, 2, (8, 14, 14), 0.9))
    assert mask.keep.shape == (2, 160) and mask.drop.shape == (2, 1408)


@pytest.mark.parametrize("grid", [(8, 14, 14), (8, 16, 16), (5, 2, 4)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_running_cells_keep_each_place_equally_often(grid, ratio):
    """VideoMAE V2: the same share in every frame and cell, every place in turn, four phases."""
    t, h, w = grid
    mask = running_cells(KEY, 64, grid, ratio)
    kept = round(4 * (1 - ratio))
    assert mask.keep.shape == (64, t * h * w // 4 * kept)
    frames = ~np.asarray(mask.dropped).reshape(64, t, h // 2, 2, w // 2, 2)
    assert (frames.sum(axis=(3, 5)) == kept).all()  # in each cell
    assert (frames == frames[:, :, :1, :, :1]).all()  # all cells alike
    for start in range(t - 3):  # in any four frames
        assert (frames[:, start : start + 4].sum(axis=1) == kept).all()
    if t > 4:
        assert (frames[:, 4:] == frames[:, : t - 4]).all()  # period four
    assert len({bytes(row) for row in np.asarray(mask.dropped)}) == 4


@pytest.mark.parametrize(
    "grid, ratio, message",
    [
        ((2, 3, 4), 0.5, "2 x 2; they do not tile a grid of 3 x 4"),
        ((2, 4, 4), 0.2, "mask ratio 0.2: running cells drop 1, 2 or 3 of 4"),
        ((2, 4, 4), 1.0, "mask ratio 1.0"),
    ],
)
def test_impossible_cells_are_rejected(grid, ratio, message):
    with pytest.raises(UserError, match=message):
        masking.running_cells(KEY, 1, grid, ratio)


@pytest.mark.parametrize("draw, of", [(tubes, (3, 4, 5)), (tokens, 60)])
def test_kept_and_dropped_partition_the_tokens_in_order(draw, of):
    mask = draw(KEY, 4, of, 0.75)
    for keep, drop, dropped in zip(*map(np.asarray, mask), strict=True):
        assert (np.diff(keep) > 0).all() and (np.diff(drop) > 0).all()
        assert sorted([*keep, *drop]) == list(range(60))
        assert set(np.flatnonzero(dropped)) == set(drop)


def test_each_row_has_its_own_mask_whatever_rows_follow():
    few, many = (np.asarray(tubes(KEY, b, (2, 4, 4), 0.5).dropped) for b in (3, 7))
    assert (few == many[:3]).all()
    assert len({bytes(row) for row in many}) > 1


def test_every_place_is_hidden_equally_often():
    share = np.asarray(tokens(KEY, 4000, 10, 0.3).dropped).mean(axis=0)
    assert np.abs(share - 0.3).max() < 0.04  # 5 standard deviations of a binomial share


def test_of_dropped_recovers_the_mask():
    mask = tubes(KEY, 4, (3, 4, 5), 0.75)
    again = jax.jit(masking.of_dropped, static_argnums=1)(mask.dropped, mask.drop.shape[1])
    jax.tree.map(np.testing.assert_array_equal, mask, again)


@pytest.mark.parametrize("ratio", [1.0, -0.1])
def test_impossible_ratios_are_rejected(ratio):
    with pytest.raises(UserError, match="mask ratio"):
        masking.tokens(KEY, 1, 4, ratio)


def test_words_hides_the_requested_share_of_maskable_words_only():
    maskable = np.tile(np.arange(40) % 4 != 0, (500, 1))
    hide = jax.jit(masking.words, static_argnums=2)
    hidden = np.asarray(hide(KEY, maskable, 0.75))
    assert not hidden[:, ::4].any()
    assert abs(float(hidden.mean()) / 0.75 - 0.75) < 0.03
    assert not np.asarray(hide(KEY, maskable, 0.0)).any()


negatives = jax.jit(
    lambda seed, valid, groups: masking.negatives(jax.random.key(seed), valid, groups),
    static_argnums=2,
)


def rows(*numbers: int) -> st.SearchStrategy[list[bool]]:
    """Of few lengths, since each is compiled separately."""
    return st.sampled_from(numbers).flatmap(
        lambda n: st.lists(st.booleans(), min_size=n, max_size=n)
    )


@settings(deadline=None, max_examples=40)
@given(
    st.one_of(st.tuples(rows(4, 9), st.just(1)), st.tuples(rows(4, 12), st.just(2))),
    st.integers(0, 99),
)
def test_negatives_are_other_valid_rows_of_the_group(drawn, seed):
    valid, groups = np.array(drawn[0]), drawn[1]
    chosen = np.asarray(negatives(seed, valid, groups))
    size = len(valid) // groups
    for i, j in enumerate(chosen):
        others = [r for r in range(len(valid)) if r // size == i // size and valid[r] and r != i]
        if valid[i] and others:
            assert j in others
        else:
            assert j == i


def test_negatives_are_uniform_over_the_other_rows():
    valid = jnp.array([True, False, True, True, True])
    many = jax.jit(jax.vmap(lambda k: masking.negatives(k, valid)))
    draws, valid = np.asarray(many(jax.random.split(KEY, 3000))), np.asarray(valid)
    for i in (0, 2, 3, 4):
        share = np.bincount(draws[:, i], minlength=5) / 3000
        expected = np.array([j != i and valid[j] for j in range(5)]) / 3
        assert np.abs(share - expected).max() < 0.045


def test_candidates_are_the_row_itself_and_others_of_its_group_each_once():
    valid = jnp.array([True, False, True, True, True, True])
    draw = jax.jit(jax.vmap(lambda key: masking.candidates(key, valid, 3, 2)))
    index, real = map(np.asarray, draw(jax.random.split(KEY, 400)))
    assert real[:, 1].sum() == 0 and (index[:, 1] == 1).all()
    assert (real[:, [0, 2]] == [True, True, False]).all() and real[:, 3:].all()
    for row in (0, 2, 3, 4, 5):
        assert (index[:, row, 0] == row).all() and real[:, row, 0].all()
        group = {r for r in range(6) if r // 3 == row // 3 and r != 1}
        for some, exist in zip(index[:, row], real[:, row], strict=True):
            assert len(set(some[exist])) == exist.sum() and set(some[exist]) <= group
    first = np.bincount(index[:, 3, 1], minlength=6)[4:]
    assert abs(first[0] / 400 - 0.5) < 0.1  # four standard deviations
    with pytest.raises(UserError, match="7 candidates in a batch of 6 rows"):
        masking.candidates(KEY, valid, 7)


def test_a_share_of_pairs_is_replaced_by_other_valid_rows():
    valid = jnp.array([True, False, True, True])
    draw = jax.jit(jax.vmap(lambda key: masking.replaced(key, valid, 0.25)))
    index, pair = map(np.asarray, draw(jax.random.split(KEY, 1000)))
    assert ((index == np.arange(4)) == pair).all() and pair[:, 1].all()
    assert not (index[:, [0, 2, 3]] == 1).any()
    assert np.abs((~pair).mean(axis=0)[[0, 2, 3]] - 0.25).max() < 0.06


def test_put_undoes_take():
    x = np.random.default_rng(0).standard_normal((3, 12, 4)).astype(np.float32)

    @jax.jit
    def copy(x):
        mask = masking.tokens(KEY, 3, 12, 0.5)
        y = masking.put(jnp.zeros_like(x), mask.keep, masking.take(x, mask.keep))
        return masking.put(y, mask.drop, masking.take(x, mask.drop))

    np.testing.assert_array_equal(copy(x), x)


def test_hard_negatives_are_drawn_by_their_scores_among_those_allowed():
    scores = jnp.asarray(np.log(np.array([[0.5, 0.3, 0.2, 0.0]] * 3, np.float32) + 1e-9))
    allowed = jnp.array([[False, True, True, True], [True] * 4, [False, False, False, True]])
    draw = jax.jit(jax.vmap(lambda key: masking.hard_negatives(key, scores, allowed, floor=0.1)))
    found = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    weight = np.array([0.5, 0.3, 0.2, 0.0]) + 0.1
    for row, may in zip(found.T, np.asarray(allowed), strict=True):
        share = np.bincount(row, minlength=4) / len(row)
        np.testing.assert_allclose(share, weight * may / (weight * may).sum(), atol=0.03)


def test_each_row_is_given_the_valid_rows_of_its_group():
    valid = jnp.array([True, False, True, True])
    known = jax.jit(masking.together, static_argnums=1)(valid, 2)
    wanted = np.diag([1, 0, 1, 1])
    wanted[2, 3] = wanted[3, 2] = 1
    np.testing.assert_array_equal(known, wanted.astype(bool))
    with pytest.raises(UserError, match="4 rows does not divide into groups=3"):
        masking.together(valid, 3)
