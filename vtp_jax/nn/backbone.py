"""The backbone verb: how a method asks any visual net for the tokens of a video.

    see(video, hide=None) -> Tokens

video is "b t h w c", uint8 or floats in [0, 1]; an image is a video of one frame. hide is a mask of
the places on the net's own grid (`grid_of` its shape and cube), drawn by `masking`; a net of blocks
that need whole frames or windows documents which masks it takes. The verb standardises pixels, and
stops before the last norm. `nn.vit.ViT`, `nn.mae.MaskedAutoencoder`, `nn.divided.DividedViT` and
`nn.spacetime.SpaceTimeViT` have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vtp_jax.nn.embed import Triple


class Tokens(NamedTuple):
    """What a backbone gives: m tokens a video, of which k = m - first have a place on the grid.

    raw:   the last block's output, before the backbone's last norm; tokens without a place first
    first: number of tokens without a place: class tokens, latent tokens, registers
    index: the places of the others, flat over (t, h, w)
    grid:  t, h, w of the places: of the output, where blocks merge tokens
    """

    raw: Float[Array, "b m d"]
    first: int
    index: Int[Array, "b k"]
    grid: Triple


def by_frame(see: Callable[[Any], Tokens], video: Any) -> Tokens:
    """The tokens of all frames of "b t h w c", each of which `see` sees as an image: the tokens
    without a place of all frames first, then the others frame by frame."""
    b, t = video.shape[:2]
    found = see(video.reshape(b * t, 1, *video.shape[2:]))
    (_, h, w), d = found.grid, found.raw.shape[-1]
    first = found.raw[:, : found.first].reshape(b, t * found.first, d)
    rest = found.raw[:, found.first :].reshape(b, -1, d)
    start = (jnp.arange(t, dtype=jnp.int32) * (h * w))[:, None]
    index = (found.index.reshape(b, t, -1) + start).reshape(b, -1)
    return Tokens(jnp.concatenate([first, rest], axis=1), t * found.first, index, (t, h, w))
