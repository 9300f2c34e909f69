"""Pixels as targets (MAE, VideoMAE, SimVTP facts section 2.1). All of it in fp32 or wider: the
eps of 1e-6 makes rounding visible on cubes of almost one colour."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vtp_jax.types import Mean

EPS = 1e-6


def by_channel(cubes: Float[Array, "b n p"], channels: int) -> Float[Array, "b n q c"]:
    return cubes.reshape(*cubes.shape[:2], -1, channels)


def statistics(
    cubes: Float[Array, "b n p"], channels: int = 3
) -> tuple[Float[Array, "b n 1 c"], Float[Array, "b n 1 c"]]:
    """Mean and standard deviation (unbiased, + 1e-6) of each cube and channel over its pixels.
    Channels run fastest in p."""
    x = by_channel(cubes, channels)
    # From the first pixel on: a cube of one colour has deviation 0 exactly, not an ulp of its
    # colour, which the division by 1e-6 would make a target of.
    origin = x[:, :, :1]
    y = x - origin
    return (
        y.mean(axis=2, keepdims=True) + origin,
        y.std(axis=2, keepdims=True, ddof=1) + EPS,
    )


def normalise(cubes: Float[Array, "b n p"], channels: int = 3) -> Float[Array, "b n p"]:
    """Every cube with mean 0 and (almost) deviation 1 in each channel: the target."""
    x = by_channel(cubes, channels)
    y = x - x[:, :, :1]
    y = y - y.mean(axis=2, keepdims=True)
    return (y / statistics(cubes, channels)[1]).reshape(cubes.shape)


def restore(
    prediction: Float[Array, "b n p"],
    mean: Float[Array, "b n 1 c"],
    std: Float[Array, "b n 1 c"],
) -> Float[Array, "b n p"]:
    """Pixels from predicted normalised cubes: what `normalise` took away, put back."""
    x = by_channel(prediction, mean.shape[-1])
    return (x * std + mean).reshape(prediction.shape)


def from_neighbours(
    values: Float[Array, "b n 1 c"],
    dropped: Bool[Array, "b n"],
    grid: tuple[int, int, int],
) -> Float[Array, "b n 1 c"]:
    """The values of hidden cubes guessed from the visible ones: their mean weighted by the inverse
    square of the distance on the grid. Visible cubes keep their own. For pictures that use no
    statistics of what is hidden."""
    axes = jnp.meshgrid(*(jnp.arange(side) for side in grid), indexing="ij")
    place = jnp.stack([a.reshape(-1) for a in axes], axis=-1).astype(jnp.float32)
    square = jnp.sum((place[:, None] - place[None]) ** 2, axis=-1)
    weight = jnp.where(dropped[:, None, :], 0.0, 1 / jnp.maximum(square, 1e-2)[None])
    weight = weight / jnp.maximum(weight.sum(axis=-1, keepdims=True), 1e-12)
    guess = jnp.einsum("bnm,bmsc->bnsc", weight, values)
    return jnp.where(dropped[..., None, None], guess, values)


def squared_error(
    prediction: Float[Array, "b n p"], target: Float[Array, "b n p"], where: Bool[Array, " b"]
) -> Mean:
    """(prediction - target)^2 over all numbers of the rows where `where` holds."""
    wide = jnp.promote_types(prediction.dtype, jnp.float32)
    error = (prediction.astype(wide) - target.astype(wide)) ** 2
    return Mean.of(error, jnp.broadcast_to(where[:, None, None], error.shape))
