"""Batch norm with running statistics (Ioffe and Szegedy, arXiv 1502.03167), for nets that normalise
by them after training: ResNets and other convolutional nets.

Statistics are no parameters. They are the linen collection "stats", and live in a method's
`extra["stats"]` as a tree with the names of the modules that own them:

    start:  {"stats": running.init(shapes)}, shapes = eval_shape(net.init, ...)
    loss:   bound = running.learning(net, params, extra["stats"], rng), the net's verbs, and
            Out(metrics, {**extra, "stats": running.learnt(bound)})
    encode: bound = running.bind(net, params, extra["stats"])

So they are saved with `extra`, a skipped step leaves them as they were, and a warm start fills them
under `extra/stats/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vtp_jax import tree
from vtp_jax.types import Params, wide

STATS = "stats"
Net = TypeVar("Net", bound=nn.Module)
Stats = Mapping[str, Any]


class RunningNorm(nn.Module):
    """Every channel with mean 0 and variance 1, then a learned scale and bias; in fp32 or wider.

    In a net that is `learning`, mean and variance are those of the batch, over the rows where
    `where` holds on all devices together, and the statistics move towards them, the variance
    without bias, as in PyTorch: statistics += rate * (batch's - statistics). Otherwise they are
    the statistics, and each row is normalised by itself. Without a valid row, nothing moves.
    """

    rate: float = 0.1
    eps: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *n d"], where: Bool[Array, " b"]
    ) -> Float[Array, "b *n d"]:
        d, x = x.shape[-1], wide(x)
        scale = self.param("scale", nn.initializers.ones, (d,))
        bias = self.param("bias", nn.initializers.zeros, (d,))
        old_mean = self.variable(STATS, "mean", jnp.zeros, (d,), x.dtype)
        old_variance = self.variable(STATS, "variance", jnp.ones, (d,), x.dtype)
        mean, variance = old_mean.value, old_variance.value
        if self.is_mutable_collection(STATS) and not self.is_initializing():
            mean, variance, count = moments(x, where)
            rate = jnp.where(count > 0, self.rate, 0)
            unbiased = variance * count / jnp.maximum(count - 1, 1)
            for held, new in ((old_mean, mean), (old_variance, unbiased)):
                moved = held.value + rate * (jax.lax.stop_gradient(new) - held.value)
                held.value = moved.astype(held.value.dtype)
        return (x - mean) / jnp.sqrt(variance + self.eps) * scale + bias


def moments(
    x: Float[Array, "b *n d"], where: Bool[Array, " b"]
) -> tuple[Float[Array, " d"], Float[Array, " d"], Float[Array, ""]]:
    """Mean and biased variance of each channel over the rows where `where` holds, in two passes,
    and the number of values of a channel."""
    axes = tuple(range(x.ndim - 1))
    here = jnp.broadcast_to(where.reshape(-1, *[1] * (x.ndim - 1)), x.shape)
    count = here[..., 0].sum(dtype=x.dtype)
    total = jnp.maximum(count, 1)
    mean = jnp.where(here, x, 0).sum(axes) / total
    variance = jnp.where(here, jnp.square(x - mean), 0).sum(axes) / total
    return mean, variance, count


def init(variables: Mapping[str, Any]) -> Stats:
    """The statistics of step 0, mean 0 and variance 1, for the result of net.init or its shapes."""
    return tree.map_named(
        lambda name, x: jnp.full(x.shape, float(name.endswith("variance")), x.dtype),
        variables[STATS],
    )


def bind(net: Net, params: Params, stats: Stats, rng: Array | None = None) -> Net:
    """`nn.bind.bind` of a net that normalises by running statistics."""
    rngs = {} if rng is None else {"dropout": rng}
    return net.bind({"params": params, STATS: stats}, rngs=rngs)


def learning(net: Net, params: Params, stats: Stats, rng: Array | None = None) -> Net:
    """The net in training: it normalises by the batch, and its statistics move; see `learnt`."""
    rngs = {} if rng is None else {"dropout": rng}
    return net.bind({"params": params, STATS: stats}, rngs=rngs, mutable=[STATS])


def learnt(bound: nn.Module) -> Stats:
    """The statistics of a `learning` net after the verbs that were called."""
    return bound.variables[STATS]
