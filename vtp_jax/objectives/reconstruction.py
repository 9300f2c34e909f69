"""Pixels as targets (MAE, VideoMAE, SimVTP). Everything is computed in fp32 or wider, because with
an eps of 1e-6 rounding errors become visible on cubes of almost one colour."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from vtp_jax import masking
from vtp_jax.nn import embed
from vtp_jax.types import Mean, TokenMask, wide

EPS = 1e-6
TARGETS = ("normalised", "pixels")


def by_channel(cubes: Float[Array, "b n p"], channels: int) -> Float[Array, "b n q c"]:
    return cubes.reshape(*cubes.shape[:2], -1, channels)


def centre(
    cubes: Float[Array, "b n p"], channels: int
) -> tuple[Float[Array, "b n q c"], Float[Array, "b n 1 c"]]:
    """The cubes minus their mean, and the mean, per channel. The mean is computed relative to the
    first pixel, so that a cube of one colour becomes exactly 0: a rounding error, divided by the
    eps, would be a target of its own."""
    x = by_channel(cubes, channels)
    origin = x[:, :, :1]
    shift = (x - origin).mean(axis=2, keepdims=True)
    return x - origin - shift, origin + shift


def deviation(centred: Float[Array, "b n q c"]) -> Float[Array, "b n 1 c"]:
    """The standard deviation of each cube and channel over its pixels: unbiased, plus 1e-6."""
    return centred.std(axis=2, keepdims=True, ddof=1) + EPS


def statistics(
    cubes: Float[Array, "b n p"], channels: int = 3
) -> tuple[Float[Array, "b n 1 c"], Float[Array, "b n 1 c"]]:
    """Mean and standard deviation of each cube and channel over its pixels. Channels run fastest in
    p."""
    centred, mean = centre(cubes, channels)
    return mean, deviation(centred)


def normalise(cubes: Float[Array, "b n p"], channels: int = 3) -> Float[Array, "b n p"]:
    """The target: every cube with mean 0 and (almost) standard deviation 1 in each channel."""
    centred, _ = centre(cubes, channels)
    return (centred / deviation(centred)).reshape(cubes.shape)


def target(
    video: Num[Array, "b t h w c"],
    cube: tuple[int, int, int],
    ask: Int[Array, "b a"],
    kind: str = "normalised",
) -> Float[Array, "b a p"]:
    """The cubes of a video (uint8, or floats in [0, 1]) at the indices `ask`. kind: "normalised",
    or "pixels": as they are, in [0, 1]."""
    cubes = embed.to_unit(masking.take(embed.cut(video, cube), ask))
    return normalise(cubes) if kind == "normalised" else cubes


def restore(
    prediction: Float[Array, "b n p"],
    mean: Float[Array, "b n 1 c"],
    std: Float[Array, "b n 1 c"],
) -> Float[Array, "b n p"]:
    """Pixels of predicted normalised cubes: the inverse of `normalise` for a given mean and std."""
    x = by_channel(prediction, mean.shape[-1])
    return (x * std + mean).reshape(prediction.shape)


def from_neighbours(
    values: Float[Array, "b n 1 c"],
    dropped: Bool[Array, "b n"],
    grid: tuple[int, int, int],
) -> Float[Array, "b n 1 c"]:
    """Values with those of hidden cubes estimated from the visible ones: their mean, weighted by
    the inverse square of the distance on the grid. For pictures that use no statistics of hidden
    cubes."""
    axes = jnp.meshgrid(*(jnp.arange(side) for side in grid), indexing="ij")
    place = jnp.stack([a.reshape(-1) for a in axes], axis=-1).astype(jnp.float32)
    square = jnp.sum((place[:, None] - place[None]) ** 2, axis=-1)
    weight = jnp.where(dropped[:, None, :], 0.0, 1 / jnp.maximum(square, 1e-2)[None])
    weight = weight / jnp.maximum(weight.sum(axis=-1, keepdims=True), 1e-12)
    guess = jnp.einsum("bnm,bmsc->bnsc", weight, values)
    return jnp.where(dropped[..., None, None], guess, values)


def pictures(
    video: Num[Array, "b t h w c"],
    predicted: Float[Array, "b d p"],
    mask: TokenMask,
    cube: tuple[int, int, int],
    target: str = "normalised",
    alone: Float[Array, "b d p"] | None = None,
) -> dict[str, Any]:
    """Videos for display, from the predicted cubes of the hidden places. target: their kind, one of
    TARGETS; alone: those that are predicted without the caption, if the method reads one.

    video f32 [0, 1] "b t h w c"; hidden bool "b t h w"; restored: {statistics: f32 "b t h w c"};
    restored_alone: the same without the caption. Predicted pixels need no statistics ("none").
    Normalised cubes get the mean and deviation of the visible cubes around them ("visible"), their
    own true ones ("true", as the references draw them), or constants around grey ("normalised").
    """
    true, grid = embed.to_unit(embed.cut(video, cube)), embed.grid_of(video.shape, cube)
    dropped, known = mask.dropped[..., None], {}
    if target == "normalised":
        own, around = statistics(true), partial(from_neighbours, dropped=mask.dropped, grid=grid)
        known = {
            "visible": (around(own[0]), around(own[1])),
            "true": own,
            "normalised": (jnp.full_like(own[0], 0.5), jnp.full_like(own[1], 0.2)),
        }

    def paint(pixels: Float[Array, "b n p"]) -> Array:
        return embed.join(jnp.where(dropped, jnp.clip(pixels, 0, 1), true), grid, cube)

    def finish(cubes: Float[Array, "b d p"]) -> dict[str, Array]:
        guess = masking.put(jnp.zeros_like(true), mask.drop, cubes.astype(true.dtype))
        return {k: paint(restore(guess, *v)) for k, v in known.items()} or {"none": paint(guess)}

    found = dict(
        video=embed.join(true, grid, cube),
        hidden=embed.join(jnp.broadcast_to(dropped, true.shape), grid, cube)[..., 0],
        restored=finish(predicted),
    )
    return found if alone is None else dict(found, restored_alone=finish(alone))


def squared_error(
    prediction: Float[Array, "b n p"],
    target: Float[Array, "b n p"],
    where: Bool[Array, " b"] | Bool[Array, "b n"],
) -> Mean:
    """(prediction - target)^2 over all values of the rows or cubes where `where` is True, in fp32
    or wider."""
    error = (wide(prediction) - wide(target)) ** 2
    asked = where.reshape(*where.shape, *[1] * (error.ndim - where.ndim))
    return Mean.of(error, jnp.broadcast_to(asked, error.shape))
