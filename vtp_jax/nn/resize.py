"""Fits pretrained weights to other input sizes, once, in numpy, when they are loaded."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from vtp_jax.types import UserError


def cubic(n: int, m: int) -> Float[np.ndarray, "m n"]:
    """Interpolation weights from n samples to m: row j has at most four nonzero ones, with sum 1.

    PyTorch's `interpolate(mode="bicubic", align_corners=False)`: Keys' kernel with a = -0.75
    (`jax.image.resize` has -0.5), at (j + 0.5) n / m - 0.5, edges repeated, no antialiasing.
    """
    a, place = -0.75, (np.arange(m) + 0.5) * n / m - 0.5
    table = np.zeros((m, n))
    for step in (-1, 0, 1, 2):
        sample = np.floor(place) + step
        x = np.abs(place - sample)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        column = np.clip(sample, 0, n - 1).astype(int)
        np.add.at(table, (np.arange(m), column), np.where(x <= 1, near, far))
    return table


def grid_positions(
    table: Float[np.ndarray, "n d"], old: tuple[int, int], new: tuple[int, int]
) -> Float[np.ndarray, "m d"]:
    """A learned position table resized to another grid (rows, columns): same dtype, computed in
    fp64.

    Rows before the grid's (a class token's) are kept. Bicubic with PyTorch's defaults, as in MAE,
    BEiT and DeiT; OpenCLIP and newer timm use another kernel and, when a table shrinks, antialias.
    """
    (h, w), first = old, len(table) - old[0] * old[1]
    if first < 0:
        raise UserError(f"a position table of {len(table)} rows has no grid of {h} x {w} places")
    grid = table[first:].reshape(h, w, -1).astype(np.float64)
    grid = np.einsum("ph,qw,hwd->pqd", cubic(h, new[0]), cubic(w, new[1]), grid, optimize=True)
    grid = grid.reshape(new[0] * new[1], -1).astype(table.dtype)
    return np.concatenate([table[:first], grid])


def positions(table: Float[np.ndarray, "n d"], rows: int) -> Float[np.ndarray, "m d"]:
    """`grid_positions` from one square grid to another, both with a class token or both without.

    Raises UserError unless both numbers of rows fit such grids.
    """
    for first in (0, 1):
        old, new = math.isqrt(len(table) - first), math.isqrt(rows - first)
        if (old * old + first, new * new + first) == (len(table), rows):
            return grid_positions(table, (old, old), (new, new))
    raise UserError(
        f"position tables of {len(table)} and {rows} rows do not belong to two square grids; use "
        "vtp_jax.nn.resize.grid_positions, which takes the two grids as arguments"
    )


def inflate(
    kernel: Float[np.ndarray, "1 h w c d"], frames: int, how: str
) -> Float[np.ndarray, "t h w c d"]:
    """An image kernel inflated to cubes of `frames` frames (I3D, arXiv 1705.07750; ViViT,
    arXiv 2103.15691). how: "mean": copies divided by `frames`, so that a still clip gives the same
    output as its picture; "centre": the kernel in the middle frame, zeros in the others."""
    if how == "mean":
        return np.repeat(kernel / kernel.dtype.type(frames), frames, axis=0)
    if how == "centre":
        cube = np.zeros((frames, *kernel.shape[1:]), kernel.dtype)
        cube[frames // 2] = kernel[0]
        return cube
    raise UserError(f"a kernel is inflated by 'mean' or 'centre', not '{how}'")
