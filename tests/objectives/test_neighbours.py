"""Soft neighbours against plain numpy; candidates that are not real count nowhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.objectives import contrastive, neighbours
from vtp_jax.types import UserError

B, N, D, K = 6, 20, 8, 3
DRAW = np.random.default_rng(0)
QUERY, SUPPORT, KEY = (jnp.asarray(x, jnp.float32) for x in DRAW.standard_normal((3, B, D)))
ROWS = DRAW.standard_normal((N, D)).astype(np.float32)
ROWS = jnp.asarray(ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True))
REAL, ALL = (jnp.asarray(np.ones(n, bool)) for n in (N, B))
normalise = jax.jit(contrastive.normalise)
nearest = jax.jit(neighbours.nearest, static_argnums=3, static_argnames="groups")
positiveness = jax.jit(neighbours.positiveness, static_argnames="threshold")


@jax.jit
def candidates(near, real, support=SUPPORT, where=ALL):
    weight = neighbours.positiveness(support, near, real)
    key = contrastive.normalise(KEY)[:, None]
    return (
        jnp.concatenate([key, near], axis=1),
        jnp.pad(real, ((0, 0), (1, 0)), constant_values=True) & where[:, None],
        jnp.pad(weight, ((0, 0), (1, 0)), constant_values=1.0),
    )


@functools.partial(jax.jit, static_argnames="weighted")
def loss(*args, weighted="outside"):
    more = dict(temperature=0.2, weighted=weighted)
    return neighbours.soft_info_nce(QUERY, *args, ALL, **more).value()


@functools.cache
def found():
    """(neighbours, which of them are real) of all keys."""
    return nearest(KEY, ROWS, REAL, K)


def test_the_nearest_are_those_of_the_largest_cosine():
    near, real = found()
    cosine = np.asarray(KEY) @ np.asarray(ROWS).T
    np.testing.assert_array_equal(near, np.asarray(ROWS)[np.argsort(-cosine, axis=1)[:, :K]])
    assert real.all()
    np.testing.assert_array_equal(nearest(9 * KEY, ROWS, REAL, K)[0], near)


def test_candidates_that_are_not_real_are_no_neighbours():
    few = np.isin(np.arange(N), [4, 7])
    near, real = nearest(KEY, ROWS, few, K)
    np.testing.assert_array_equal(real, [[True, True, False]] * B)
    told, rows = np.asarray(near)[:, :2].reshape(-1, D), np.asarray(ROWS)
    assert {tuple(x) for x in told} == {tuple(rows[i]) for i in (4, 7)}
    other = np.array(ROWS)
    other[11] *= -1
    np.testing.assert_allclose(
        loss(*candidates(near, real)), loss(*candidates(*nearest(KEY, other, few, K)))
    )


def test_groups_search_their_own_rows():
    near, _ = nearest(KEY, ROWS, REAL, K, groups=2)
    near, key, rows, real = map(np.asarray, (near, KEY, ROWS, REAL))
    for i in range(2):
        q, r = slice(3 * i, 3 * i + 3), slice(10 * i, 10 * i + 10)
        own, _ = nearest(key[q], rows[r], real[r], K)
        np.testing.assert_array_equal(near[q], own)
    with pytest.raises(UserError, match="11 neighbours of 6 rows among 20 do not fit groups=2"):
        neighbours.nearest(KEY, ROWS, REAL, 11, groups=2)


def test_weights_are_a_distribution_over_the_real_neighbours():
    weight = positiveness(SUPPORT, *found())
    np.testing.assert_allclose(weight.sum(axis=1), 1, rtol=1e-6)
    e = np.exp(np.einsum("bd,bkd->bk", normalise(SUPPORT), found()[0]))
    np.testing.assert_allclose(weight, e / e.sum(axis=1, keepdims=True), rtol=1e-6)
    # Unit vectors and no temperature: of 30 neighbours, the one that is opposite to all others.
    one = np.eye(D, dtype=np.float32)[:1]
    for sign, bound in ((-1, 0.0046), (1, 0.203)):
        near = np.where(np.arange(30)[:, None] == 0, sign * one, -sign * one)[None]
        weight = positiveness(jnp.asarray(one), jnp.asarray(near), jnp.ones((1, 30), bool))
        np.testing.assert_allclose(weight[0, 0], bound, rtol=0.012)
    some = np.array(found()[1])
    some[:, 0] = some[0] = False
    weight = positiveness(SUPPORT, found()[0], some)
    np.testing.assert_allclose(weight.sum(axis=1), [0, 1, 1, 1, 1, 1], rtol=1e-6)
    cut = positiveness(SUPPORT, *found(), threshold=1 / K)
    whole = np.asarray(positiveness(SUPPORT, *found()))
    np.testing.assert_array_equal(cut, np.where(whole > 1 / K, whole, 0))


@pytest.mark.parametrize("weighted", ["outside", "inside"])
def test_the_loss_equals_plain_numpys(weighted):
    candidate, real, weight = (np.asarray(x, np.float64) for x in candidates(*found()))
    query = np.asarray(QUERY, np.float64)
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    e = np.exp(np.einsum("id,jcd->ijc", query, candidate) / 0.2)
    p = e / e.sum(axis=(1, 2), keepdims=True)
    own = p[np.arange(B), np.arange(B)]
    told = dict(
        outside=-(weight * np.log(own)).sum(axis=1).mean(),
        inside=-np.log((weight * own).sum(axis=1)).mean(),
    )
    value = loss(*candidates(*found()), weighted=weighted)
    np.testing.assert_allclose(value, told[weighted], rtol=1e-5)
    assert abs(told["outside"] - told["inside"]) > 0.1


@pytest.mark.parametrize("weighted", ["outside", "inside"])
def test_with_the_key_alone_it_is_info_nce(weighted):
    none = nearest(KEY, ROWS, REAL, 0)
    told = jax.jit(lambda: contrastive.info_nce(QUERY, KEY, ALL, temperature=0.2).value())()
    np.testing.assert_allclose(loss(*candidates(*none), weighted=weighted), told, rtol=1e-6)


def test_equal_logits_give_the_log_of_their_number():
    same = np.tile(np.asarray(normalise(KEY))[:1, None], (B, 1 + K, 1))
    _, real, weight = candidates(*found())
    np.testing.assert_allclose(loss(same, real, weight), 2 * np.log(B * (1 + K)), rtol=1e-6)


@pytest.mark.parametrize("weighted", ["outside", "inside"])
def test_invalid_rows_add_no_candidates(weighted):
    where = np.array([True, False, True, True, False, True])
    more = dict(temperature=0.2, weighted=weighted)

    @jax.jit
    def f(query, candidate, real, weight, where):
        return neighbours.soft_info_nce(query, candidate, real, weight, where, **more).value()

    candidate, real, weight = map(np.asarray, candidates(*found()))
    alone = f(*(x[where] for x in (np.asarray(QUERY), candidate, real, weight)), ALL[: where.sum()])
    _, real, weight = candidates(*found(), where=where)
    args = QUERY, candidate, np.asarray(real) & where[:, None], weight, where
    value, grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*args)
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    for g in map(np.asarray, grads):
        assert np.isfinite(g).all() and not g[1].any() and not g[4].any() and g[0].any()
