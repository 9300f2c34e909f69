"""Queues of rows from past batches (MoCo, arXiv 1911.05722; ALBEF, 2107.07651), which live in a
method's `extra`. The momentum twins that fill them are in `objectives.momentum`.

A queue is a plain dict of arrays, visible to checkpoints and sharding rules:

    {<column>: "n ..." for each column, "real": bool "n", "next": i32 ""}

`real`: which places hold a row. `next`: the next place to write, which holds the oldest row once
the queue is full. All arrays may be split over devices along n.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from vtp_jax.types import UserError

Queue = Mapping[str, Array]
STATE = ("real", "next")  # in addition to the columns


def init(size: int, **columns: jax.ShapeDtypeStruct) -> Queue:
    """An empty queue of `size` places. columns: the shape and dtype of one row of each column, as
    in init(65536, video=ShapeDtypeStruct((256,), jnp.float32))."""
    zeros = {name: jnp.zeros((size, *one.shape), one.dtype) for name, one in columns.items()}
    return {**zeros, "real": jnp.zeros(size, bool), "next": jnp.zeros((), jnp.int32)}


def push(
    queue: Queue,
    rows: Mapping[str, Shaped[Array, "b *d"]],
    valid: Bool[Array, " b"],
    groups: int = 1,
) -> Queue:
    """The queue with b new rows in place of the b oldest; `rows` has all of its columns.

    Rows that are not valid also take a place, because counts are static: they are stored as zeros
    with `real` False. No gradient flows into a queue. groups: g queues of n / g places, one after
    the other; each takes the b / g rows of its block of the batch (the references' "per GPU").
    Raises UserError if there are more rows than places, or unless g divides both numbers.
    """
    n, b = queue["real"].shape[0], valid.shape[0]
    if n % groups or b % groups:
        raise UserError(f"a queue of {n} places and {b} rows do not divide into groups={groups}")
    if b > n:
        raise UserError(f"a queue of {n} places cannot take a batch of {b} rows; make it larger")
    size = n // groups
    place = (queue["next"] + jnp.arange(b // groups, dtype=jnp.int32)) % size
    place = (size * jnp.arange(groups, dtype=jnp.int32)[:, None] + place).reshape(b)

    def write(old: Shaped[Array, "n *d"], new: Shaped[Array, "b *d"]) -> Shaped[Array, "n *d"]:
        # A scatter, because dynamic_update_slice gathers a queue that is split over devices.
        new = jnp.where(valid.reshape(-1, *[1] * (new.ndim - 1)), new, 0).astype(old.dtype)
        return old.at[place].set(jax.lax.stop_gradient(new), unique_indices=True)

    columns = {name: write(queue[name], rows[name]) for name in queue if name not in STATE}
    real = queue["real"].at[place].set(valid, unique_indices=True)
    return {**columns, "real": real, "next": (queue["next"] + b // groups) % size}
