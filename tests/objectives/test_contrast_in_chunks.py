"""Contrast in chunks, which never holds all logits at once: the plain numbers, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.hlo import largest
from vtp_jax.objectives import contrastive
from vtp_jax.run import sharding
from vtp_jax.types import UserError

B, WIDTH = 24, 5
ROWS = np.random.default_rng(0).normal(size=(2, B, WIDTH))


def plain(a, b, where, temperature, groups, share):
    """An independent version with all logits at once."""
    a, b = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    block = np.arange(B) // (B // groups)
    seen = (block[:, None] == block) & where
    terms = []
    for q, k in ((a, b), (b, a)):
        logits = jnp.where(seen, q @ k.T / temperature, -jnp.inf)
        rows = jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(q @ k.T) / temperature
        means = [
            jnp.where(where, rows, 0)[block == g].sum() / where[block == g].sum()
            for g in range(groups)
        ]
        terms.append(sum(means) / groups)
    return share * sum(terms)


@pytest.mark.parametrize(
    "groups, chunks, dtype, rtol",
    [(1, 4, "float32", 1e-6), (1, 24, "float64", 1e-12), (2, 3, "float64", 1e-12)],
)
def test_chunks_change_neither_the_loss_nor_its_gradients(groups, chunks, dtype, rtol):
    with jax.enable_x64(dtype == "float64"):
        a, b = jnp.asarray(ROWS, dtype)
        where = jnp.arange(B) % 5 != 1
        share = 1.0 if groups == 2 else 0.5

        def chunked(a, b, temperature):
            return contrastive.both_ways(
                a, b, where, temperature=temperature, groups=groups, chunks=chunks,
                sum_directions=share == 1.0,
            ).value()  # fmt: skip

        def whole(a, b, temperature):
            return plain(a, b, where, temperature, groups, share)

        told, expected = (
            jax.jit(jax.value_and_grad(f, (0, 1, 2)))(a, b, jnp.asarray(0.1, dtype))
            for f in (chunked, whole)
        )
    for x, y in zip(jax.tree.leaves(told), jax.tree.leaves(expected), strict=True):
        assert x.dtype == dtype
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(jnp.abs(y).max()))


def test_no_device_holds_the_logits_of_all_pairs_forward_or_backward():
    """Neither B x B nor, on any of 8 devices, its own rows of it: B x b."""
    mesh, (b, d) = sharding.make_mesh(), (256, 4)

    def largest_array(chunks):
        def loss(q, k, where):
            found = contrastive.both_ways(q, k, where, temperature=0.1, chunks=chunks)
            return found.value()

        rows = jax.sharding.NamedSharding(mesh, P(sharding.ROWS))
        x = jax.ShapeDtypeStruct((b, d), jnp.float32, sharding=rows)
        where = jax.ShapeDtypeStruct((b,), bool, sharding=rows)
        with sharding.activate(mesh):
            gradient = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=None)
            return largest(gradient.lower(x, x, where).compile().as_text())

    assert largest_array(1) == b * b / 8
    assert largest_array(8) <= max(b * d, b * b / 64)


def test_a_batch_that_chunks_do_not_divide_is_rejected():
    with pytest.raises(UserError, match="24 rows does not divide into groups=2 of chunks=5"):
        contrastive.info_nce(
            *jnp.asarray(ROWS, jnp.float32), jnp.ones(B, bool), temperature=0.1, groups=2, chunks=5
        )
