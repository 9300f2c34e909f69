"""The loop over layers, for every kind of block, and what it keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from vtp_jax.types import UserError


def rematerialised(block: type[nn.Module], remat: str | None, unroll: int) -> Any:
    """The block, whose activations are computed again in the backward pass except those that the
    policy `remat` keeps; None keeps all. Raises UserError unless `jax.checkpoint_policies` has it.
    """
    if remat is None:
        return block
    policy = getattr(jax.checkpoint_policies, remat, None)
    if policy is None:
        raise UserError(f"method.remat={remat!r}; known: the names in jax.checkpoint_policies")
    # Inside a loop the compiler does not merge the second computation with the first.
    return nn.remat(block, policy=policy, prevent_cse=unroll > 1)


def stacked(
    block: type[nn.Module],
    depth: int,
    *,
    remat: str | None = None,
    unroll: int = 1,
    shared: int = 0,
    collections: Sequence[str] = ("params",),
) -> Any:
    """A class of `depth` blocks, made with a block's own fields and called as

        made(x, per_layer, *shared) -> (x, None)

    Blocks are (x, own, *shared) -> (x, None). per_layer: a tree whose arrays have an axis 0 of
    depth, of which each block gets its own entry. shared: number of arguments that all blocks get.
    collections: what is stacked along axis 0, as the parameters are, whatever `unroll` is. remat,
    unroll: see `nn.transformer.Stack`.
    """
    axes: Any = (0, *[nn.broadcast] * shared)
    return nn.scan(
        rematerialised(block, remat, unroll),
        variable_axes=dict.fromkeys(collections, 0),
        split_rngs={"params": True, "dropout": True},
        in_axes=axes,
        length=depth,
        unroll=min(unroll, depth),
    )
