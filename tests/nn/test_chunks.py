"""Rows in chunks have the numbers and gradients of the whole, with a key for each chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.nn.chunks import in_chunks
from vtp_jax.objectives import contrastive
from vtp_jax.types import UserError

RNG = np.random.default_rng(0)
W, X = (jnp.asarray(RNG.standard_normal((n, 4)), jnp.float32) for n in (4, 12))
ALL = jnp.asarray(np.ones(12, bool))


def test_contrast_of_rows_encoded_in_chunks_has_exact_gradients():
    def loss(w, x, n):
        def encode(rng, rows):
            return dict(a=jnp.tanh(rows["x"] @ w), b=jnp.tanh(rows["x"] @ w.T))

        out = in_chunks(encode, n)(None, dict(x=x))
        return contrastive.both_ways(out["a"], out["b"], ALL, temperature=0.1).value()

    whole, parts = (jax.value_and_grad(loss, (0, 1))(W, X, n) for n in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)


def test_each_chunk_has_its_own_key_and_rows_keep_their_order():
    def f(rng, x):
        return x, jnp.broadcast_to(jax.random.key_data(rng), (len(x), 2))

    rows, keys = in_chunks(f, 3)(jax.random.key(7), X)
    assert (rows == X).all()
    found = {tuple(map(int, k)) for k in keys}
    assert len(found) == 3 and (keys[::3] == keys[0]).all()


def test_only_one_chunks_activations_are_held_at_a_time():
    def peak(n):
        def loss(w, x):
            def deep(rng, x):
                for _ in range(6):
                    x = jnp.sin(x @ w)
                return x.sum(axis=1)

            return in_chunks(deep, n)(None, x).sum()

        shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 8), (4096, 8)))
        return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert peak(8) < 0.5 * peak(1)


def test_chunks_that_do_not_divide_the_rows_are_rejected():
    with pytest.raises(UserError, match="12 rows does not divide into chunks=5"):
        in_chunks(lambda rng, x: x, 5)(None, X)
