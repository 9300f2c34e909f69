"""Accumulation inside a loss: the expensive part runs over some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from vtp_jax.types import UserError

T = TypeVar("T")


def in_chunks(f: Callable[..., T], n: int) -> Callable[..., T]:
    """f(rng, *rows) for the rows of n chunks, one after the other.

    rows: trees of arrays that rows lead, and so f's result, of which row i may depend on row i of
    the arguments and on what f closes over, parameters among it. The backward pass makes each chunk
    anew, so that activations of one chunk are held at a time; gradients are exact, also of losses
    that compare rows of several chunks. rng: a key, split into one for each chunk, or None.

    A chunk is every n-th row: it has rows of all devices that split them. Raises UserError where n
    does not divide the rows.
    """

    def run(rng: Array | None, *rows: Any) -> T:
        if n == 1:
            return f(rng, *rows)
        b = jax.tree.leaves(rows)[0].shape[0]
        if b % n:
            raise UserError(f"a batch of {b} rows does not divide into chunks={n}")

        def split(x: Shaped[Array, "b *d"]) -> Shaped[Array, "n c *d"]:
            return jnp.moveaxis(x.reshape(b // n, n, *x.shape[1:]), 1, 0)

        def join(x: Shaped[Array, "n c *d"]) -> Shaped[Array, "b *d"]:
            return jnp.moveaxis(x, 0, 1).reshape(b, *x.shape[2:])

        keys = None if rng is None else jax.random.split(rng, n)
        one = jax.checkpoint(lambda chunk: f(chunk[0], *chunk[1]), prevent_cse=False)
        return jax.tree.map(join, jax.lax.map(one, (keys, jax.tree.map(split, rows))))

    return run
