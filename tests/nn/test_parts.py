"""Stacks run in parts: attention weights returned from them, tokens dropped between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import fill
from vtp_jax import masking
from vtp_jax.nn import sizes
from vtp_jax.nn.attention import received
from vtp_jax.nn.layers import rematerialised
from vtp_jax.nn.transformer import Block, Stack
from vtp_jax.types import UserError

SIZE, N = sizes.Size(16, 3, 2, 24), 6
MASK = np.array([[True] * 5 + [False], [True] * 6])


@functools.cache
def given():
    """(stack, params, x, the whole stack's output)."""
    stack = Stack(SIZE, drop_path=0.3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, N, 16)), jnp.float32)
    params = fill(stack.init, jax.random.key(0), x)
    return stack, params, x, np.asarray(jax.jit(stack.apply)(params, x, jnp.array(MASK)))


def test_parts_in_sequence_equal_the_whole():
    stack, params, x, whole = given()

    @jax.jit
    def parts(params):
        bound = stack.bind(params)
        first = bound.part(x, 0, 1, jnp.array(MASK))
        both = bound.part(first, 1, 3, jnp.array(MASK))
        weighed, weights = bound.part_weighed(first, 1, 3, jnp.array(MASK))
        return both, weighed, bound.part(first, 1, 3, jnp.array(MASK), read=2), weights

    both, weighed, last, weights = jax.tree.map(np.asarray, parts(params))
    assert weights.shape == (2, 2, SIZE.heads, N, N)
    for found in (both, weighed):
        np.testing.assert_allclose(found, whole, atol=1e-5)
    np.testing.assert_allclose(last, whole[:, -2:], atol=1e-5)
    assert jax.tree.map(jnp.shape, jax.eval_shape(stack.init, jax.random.key(0), x)) == (
        jax.tree.map(jnp.shape, params)
    )


def test_attention_weights_are_the_softmax_of_the_layers_own_products():
    stack, params, x, _ = given()
    weigh = jax.jit(lambda p: stack.apply(p, x, 0, 1, jnp.array(MASK), method="part_weighed")[1])
    weights = np.asarray(weigh(params), np.float64)[0]
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
    assert not weights[0, ..., 5].any() and weights[1].all()

    first = jax.tree.map(lambda w: np.asarray(w[0], np.float64), params["params"]["blocks"])
    y = np.asarray(x, np.float64)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    y = y * first["norm1"]["scale"] + first["norm1"]["bias"]
    q, k = (np.einsum("bnd,dhk->bhnk", y, first["attn"]["qkv"][:, :, i]) for i in (0, 1))
    q += first["attn"]["q_bias"][None, :, None]
    logits = np.where(MASK[:, None, None], q @ k.swapaxes(2, 3) / np.sqrt(8), -np.inf)
    plain = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, plain, atol=1e-5)


def test_dropping_tokens_between_parts_equals_masking_them_in_later_layers():
    stack, params, x, whole = given()

    @jax.jit
    def run(params):
        bound = stack.bind(params)
        y, weights = bound.part_weighed(x, 0, 1)
        score = received(weights[0]).at[:, 0].set(jnp.inf)  # always kept, as a key frame's are
        kept = masking.highest(score, 4)
        pruned = bound.part(masking.take(y, kept.keep), 1, 3)
        hidden = masking.take(bound.part(y, 1, 3, ~kept.dropped), kept.keep)
        return pruned, hidden, kept, score

    pruned, hidden, kept, score = jax.tree.map(np.asarray, run(params))
    np.testing.assert_allclose(pruned, hidden, atol=1e-5)
    assert (kept.keep[:, 0] == 0).all() and kept.keep.shape == (2, 4)
    for row, keep in zip(score, kept.keep, strict=True):
        assert row[keep].min() >= np.delete(row, keep).max()


def test_received_attention_is_summed_over_the_given_queries():
    weights = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 3, 4, 5)), jnp.float32)
    wanted = np.asarray(weights).mean(axis=1)
    np.testing.assert_allclose(received(weights), wanted.sum(axis=1), rtol=1e-5)
    first = jnp.eye(4)[jnp.array([0, 0])]
    np.testing.assert_allclose(received(weights, first), wanted[:, 0], rtol=1e-5)


def test_an_unknown_policy_is_an_error():
    with pytest.raises(UserError, match="method.remat='nothing'; known: the names in jax"):
        rematerialised(Block, "nothing", 1)
