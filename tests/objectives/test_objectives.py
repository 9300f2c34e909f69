"""Objectives against plain numpy, and the law of `valid`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.objectives import contrastive, neighbours, reconstruction
from vtp_jax.objectives.classification import (
    accuracy,
    cross_entropy,
    log_odds,
    scored,
    smooth,
    soft_cross_entropy,
)
from vtp_jax.types import Mean


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# Each test calls these where cases differ in data only.
cross_entropy = jax.jit(cross_entropy, static_argnames=("groups", "smoothing"))
soft_cross_entropy = jax.jit(soft_cross_entropy)
accuracy = jax.jit(accuracy, static_argnums=3)
smooth = jax.jit(smooth, static_argnums=(1, 2))
info_nce = jax.jit(contrastive.info_nce, static_argnames=("temperature", "groups"))
normalise = jax.jit(reconstruction.normalise)
from_neighbours = jax.jit(reconstruction.from_neighbours, static_argnums=2)
squared_error = jax.jit(reconstruction.squared_error)
A, B = normal(2, 6, 5)
ALL = np.ones(6, bool)


def oracle(a, b, t):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    s = np.exp(a @ b.T / t)
    return -np.log(np.diag(s) / s.sum(axis=1)).mean()


def test_info_nce_is_the_mean_over_rows():
    value = info_nce(A, B, ALL, temperature=0.05).value()
    np.testing.assert_allclose(value, oracle(A, B, 0.05), rtol=1e-5)


def test_info_nce_in_groups_compares_rows_of_a_group_only():
    value = info_nce(A, B, ALL, temperature=0.1, groups=2).value()
    halves = [oracle(A[i : i + 3], B[i : i + 3], 0.1) for i in (0, 3)]
    np.testing.assert_allclose(value, np.mean(halves), rtol=1e-5)


def test_invalid_rows_are_never_negatives():
    valid = np.array([True, False, True, True, False, True])

    @jax.jit
    def f(a, b):
        return contrastive.info_nce(a, b, jnp.asarray(valid), temperature=0.1).value()

    rows = np.flatnonzero(valid)
    np.testing.assert_allclose(f(A, B), oracle(A[rows], B[rows], 0.1), rtol=1e-5)
    seen = valid[:, None]
    garbage, other, empty = (
        np.where(seen, x, np.float32(y)) for x, y in ((A, 1e6), (B, -7.0), (B, 0.0))
    )
    assert f(garbage, B) == f(A, B) == f(A, other)
    grads = jax.jit(jax.grad(f, (0, 1)))(A, empty)
    for g in map(np.asarray, grads):
        assert np.isfinite(g).all() and not g[~valid].any() and g[valid].any()


def test_cross_entropy_counts_the_entries_in_its_mask():
    logits = normal(2, 3, 7)
    target = np.array([[1, 2, -100], [6, -100, 0]])
    asked = target >= 0
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    picked = [-log_p[0, 0, 1], -log_p[0, 1, 2], -log_p[1, 0, 6], -log_p[1, 2, 0]]
    mean = cross_entropy(logits, target, asked)
    np.testing.assert_allclose(mean.value(), np.mean(picked), rtol=1e-6)
    assert mean.count == 4
    grouped = cross_entropy(logits, target, asked, groups=2).value()
    np.testing.assert_allclose(grouped, np.mean(picked), rtol=1e-6)
    uneven = asked.copy()
    uneven[1, 2] = False
    value = cross_entropy(logits, target, uneven, groups=2).value()
    np.testing.assert_allclose(value, (np.mean(picked[:2]) + picked[2]) / 2, rtol=1e-6)
    assert cross_entropy(logits, target, np.zeros_like(asked)).value() == 0
    assert accuracy(logits, np.argmax(logits, -1), asked).value() == 1


def test_accuracy_in_the_top_k_gives_ties_to_lower_classes():
    logits = jnp.array([[0.1, 0.5, 0.2], [3.0, 3.0, 3.0], [3.0, 3.0, 3.0], [9.0, 0.0, 0.0]])
    target, asked = jnp.array([2, 0, 2, 1]), jnp.array([True, True, True, False])
    unknown = jnp.full((3, 4), jnp.nan)  # never right
    assert [accuracy(unknown, jnp.arange(3), jnp.ones(3, bool), k).value() for k in (1, 4)] == [
        0,
        0,
    ]
    shares = [accuracy(logits, target, asked, k) for k in (1, 2, 3)]
    assert [int(s.total) for s in shares] == [1, 2, 3] and shares[0].count == 3


def test_soft_cross_entropy_is_cross_entropy_on_hard_targets_and_linear_in_soft_ones():
    logits, asked = normal(3, 7), np.array([True, False, True])
    a, b = np.array([1, 2, 6]), np.array([0, 3, 3])
    hard = [cross_entropy(logits, target, asked).value() for target in (a, b)]
    found = [soft_cross_entropy(logits, smooth(t, 7), asked).value() for t in (a, b)]
    np.testing.assert_allclose(found, hard, rtol=1e-6)
    mixed = 0.3 * np.asarray(smooth(a, 7)) + 0.7 * np.asarray(smooth(b, 7))
    value = soft_cross_entropy(logits, mixed, asked).value()
    np.testing.assert_allclose(value, 0.3 * hard[0] + 0.7 * hard[1], rtol=1e-6)


def test_bf16_logits_are_summed_in_fp32():
    logits = jnp.zeros((1, 1, 1000), jnp.bfloat16)
    value = cross_entropy(logits, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)).value()
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, np.log(1000), rtol=1e-6)


def test_scored_is_the_loss_and_the_accuracy_of_the_same_entries():
    logits, asked = normal(6, 4), np.array([True, True, False, True, True, False])
    target = (logits.argmax(axis=1) + np.array([0, 1, 0, 0, 1, 0])) % 4
    loss, right = jax.jit(partial(scored, groups=2, smoothing=0.1))(logits, target, asked)
    assert loss.value() == cross_entropy(logits, target, asked, groups=2, smoothing=0.1).value()
    assert right.count == 4 and right.value() == accuracy(logits, target, asked).value()
    assert right.value() == 0.5


def test_log_odds_are_those_of_yes():
    logits = jnp.array([[1.0, 3.0], [0.5, -0.5]], jnp.bfloat16)
    odds = log_odds(logits)
    assert odds.tolist() == [2.0, -1.0] and odds.dtype == jnp.float32
    p = jax.nn.softmax(logits.astype(jnp.float32))
    np.testing.assert_allclose(odds, jnp.log(p[:, 1] / p[:, 0]), rtol=1e-5)


def test_targets_are_normalised_per_cube_and_channel():
    cubes = np.random.default_rng(0).uniform(size=(2, 3, 8 * 3)).astype(np.float32)
    target = np.asarray(normalise(cubes)).reshape(2, 3, 8, 3)
    np.testing.assert_allclose(target.mean(axis=2), 0, atol=1e-6)
    np.testing.assert_allclose(target.std(axis=2, ddof=1), 1, atol=1e-4)
    x = np.asarray(cubes, np.float64).reshape(2, 3, 8, 3)[1, 2, :, 1]
    expected = (x - x.mean()) / (x.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(target[1, 2, :, 1], expected, rtol=1e-4)


def test_restore_undoes_normalise():
    cubes = np.random.default_rng(0).uniform(size=(2, 3, 8 * 3)).astype(np.float32)

    @jax.jit
    def undo(cubes):
        return reconstruction.restore(
            reconstruction.normalise(cubes), *reconstruction.statistics(cubes)
        )

    again = undo(cubes)
    np.testing.assert_allclose(again, cubes, atol=1e-6)


def test_from_neighbours_uses_visible_cubes_only():
    values = np.random.default_rng(0).uniform(size=(1, 2 * 2 * 3, 1, 3)).astype(np.float32)
    dropped = np.array([[True, False] * 6])
    other = np.where(dropped[..., None, None], np.float32(99.0), values)
    guess, same = (np.asarray(from_neighbours(x, dropped, (2, 2, 3))) for x in (values, other))
    assert (guess[~dropped] == values[~dropped]).all()
    assert (guess == same).all()
    low, high = values[~dropped].min(), values[~dropped].max()
    assert (guess >= low - 1e-6).all() and (guess <= high + 1e-6).all()


@pytest.mark.parametrize("valid", [[True, True], [True, False]])
def test_squared_error_counts_valid_rows(valid):
    p, t = normal(2, 2, 3, 4)
    value = squared_error(p, t, np.array(valid)).value()
    rows = np.flatnonzero(valid)
    np.testing.assert_allclose(value, np.mean((np.asarray(p) - t)[rows] ** 2), rtol=1e-5)


def test_squared_error_counts_the_cubes_in_its_mask():
    p, t = normal(2, 2, 3, 4)
    where = np.array([[True, False, True], [False, False, True]])
    mean = squared_error(p, t, where)
    np.testing.assert_allclose(mean.value(), np.mean((np.asarray(p) - t)[where] ** 2), rtol=1e-5)
    assert mean.count == 3 * 4


def test_smoothed_cross_entropy_is_that_of_smoothed_targets():
    logits, target = normal(6, 5), np.array([0, 1, 2, 3, 4, 0])
    soft = soft_cross_entropy(logits, smooth(target, 5, 0.2), ALL).value()
    value = cross_entropy(logits, target, ALL, smoothing=0.2).value()
    np.testing.assert_allclose(value, soft, rtol=1e-5)


def test_contrast_with_a_twin_and_a_queue_is_as_computed_by_hand():
    """Rows 0 and 1 of four share a name with place 2 of the queue; place 1 is empty."""
    draw = np.random.default_rng(0)
    mine, twin = draw.standard_normal((2, 2, 4, 5))
    past = draw.standard_normal((2, 3, 5))
    name, names = np.array([7, 7, 3, 4]), np.array([9, 7, 7])
    real, near = np.array([True, False, True]), np.ones((4, 4), bool)
    near[3] = near[:, 3] = False  # not valid
    value, alike = jax.jit(partial(contrastive.with_twin, temperature=0.2, alpha=0.4))(
        tuple(map(jnp.asarray, mine)), tuple(map(jnp.asarray, twin)),
        (*map(jnp.asarray, past), jnp.asarray(names), jnp.asarray(real)),
        jnp.asarray(name), jnp.asarray(near),
    )  # fmt: skip
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (mine, twin, past)]
    losses = []
    for i, j in ((0, 1), (1, 0)):
        keys = np.concatenate([unit[1][j][:3], unit[2][j][real]])
        own = name[:3, None] == np.concatenate([name[:3], names[real]])
        soft, logits = (np.exp(x[i][:3] @ keys.T / 0.2) for x in (unit[1], unit[0]))
        target = 0.4 * soft / soft.sum(1, keepdims=True) + 0.6 * own / own.sum(1, keepdims=True)
        losses.append(-(target * np.log(logits / logits.sum(1, keepdims=True))).sum(1).mean())
        np.testing.assert_allclose(np.exp(alike[i][:3, :3]), logits[:, :3], rtol=1e-3)
    np.testing.assert_allclose(value.value(), np.mean(losses), rtol=1e-5)


def products(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for inner in jax.core.jaxprs_in_params(eqn.params):
            yield from products(inner)


def test_cosines_are_computed_in_full_precision_forward_and_backward():
    """Accelerators compute fp32 products in TF32 or bf16 by default."""
    name, real, square = jnp.arange(6), jnp.ones(6, bool), jnp.ones((6, 6), bool)
    some, past, near = dict(temperature=0.05), jnp.asarray(B), jnp.stack([A, B], axis=1)
    losses = dict(
        info_nce=lambda a, b: contrastive.info_nce(a, b, real, **some),
        with_twin=lambda a, b: contrastive.with_twin(
            (a, b), (a, b), (past, past, name, real), name, square, alpha=0.4, **some
        )[0],
        neighbours=lambda a, b: neighbours.soft_info_nce(
            a, near, square[:, :2], neighbours.positiveness(b, near, square[:, :2]), real, **some
        ),
        nearest=lambda a, b: Mean.of(
            (a[:, None] * neighbours.nearest(b, past, real, 2)[0]).sum((1, 2)), real
        ),
    )
    for what, loss in losses.items():
        traced = jax.make_jaxpr(jax.grad(lambda a, b, f=loss: f(a, b).value(), (0, 1)))(A, B)
        made = list(products(traced.jaxpr))
        assert made, what
        for eqn in made:
            told = eqn.params["precision"]
            assert told is not None and set(told) == {jax.lax.Precision.HIGHEST}, (what, eqn)
