"""Accumulation inside a loss: the expensive part runs on one chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from vtp_jax.types import UserError

T = TypeVar("T")


def in_chunks(f: Callable[..., T], n: int) -> Callable[..., T]:
    """f(rng, *rows), computed in n chunks of rows, one after the other.

    rows: trees of arrays whose first axis is rows, as in the result of f. Row i of the result may
    depend only on row i of the arguments and on what f closes over, such as parameters. The
    backward pass recomputes each chunk, so only one chunk's activations are held at a time.
    Gradients are exact, even for losses that compare rows of several chunks. rng: a key, which is
    split into one for each chunk, or None.

    A chunk takes every n-th row, so it has rows from every device that rows are split over. Raises
    UserError unless n divides the number of rows.
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
