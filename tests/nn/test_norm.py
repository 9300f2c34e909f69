"""Batch norm over the valid rows."""

import jax
import jax.numpy as jnp
import numpy as np

from vtp_jax.nn import norm

X = jnp.asarray(3 + 2 * np.random.default_rng(0).standard_normal((7, 5)), jnp.float32)
WHERE = jnp.asarray(np.array([True, False, True, True, True, False, True]))


def test_statistics_are_those_of_the_valid_rows():
    y = norm.batch_norm(X, WHERE)
    kept = np.asarray(y)[np.asarray(WHERE)]
    np.testing.assert_allclose(kept.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(kept.std(axis=0), 1, atol=1e-4)  # eps
    np.testing.assert_allclose(kept, norm.batch_norm(X[WHERE], jnp.ones(5, bool)), rtol=1e-5)
    other = norm.batch_norm(X.at[1].set(1e6), WHERE)
    np.testing.assert_array_equal(np.asarray(other)[np.asarray(WHERE)], kept)


def test_gradients_are_finite_where_nothing_varies_and_where_no_row_is_valid():
    for where in (jnp.ones(7, bool), jnp.zeros(7, bool)):
        grad = jax.grad(lambda x, w=where: (norm.batch_norm(x, w) ** 2).sum())(jnp.ones((7, 5)))
        assert np.isfinite(grad).all()


def test_it_computes_in_fp32_and_has_a_scale_and_a_bias():
    module = norm.BatchNorm()
    x = X.astype(jnp.bfloat16)
    params = module.init(jax.random.key(0), x, WHERE)
    assert module.apply(params, x, WHERE).dtype == jnp.float32
    params = {"params": dict(scale=jnp.full(5, 2.0), bias=jnp.ones(5))}
    expected = 2 * norm.batch_norm(X, WHERE) + 1
    np.testing.assert_allclose(module.apply(params, X, WHERE), expected, rtol=1e-6)
