"""From pixels and words to tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, Shaped

from vtp_jax import masking
from vtp_jax.nn.transformer import layer_norm, product
from vtp_jax.types import TokenMask, UserError

Triple = tuple[int, int, int]


def grid_of(shape: tuple[int, ...], cube: Triple) -> Triple:
    """The number of cubes along t, h and w of a video "... t h w c". Raises UserError unless the
    cube's sides divide the video's."""
    sides = shape[-4:-1]
    if any(side % c for side, c in zip(sides, cube, strict=True)):
        raise UserError(
            f"a video of {'x'.join(map(str, sides))} (frames x height x width) "
            f"does not divide into cubes of {'x'.join(map(str, cube))}"
        )
    t, h, w = (side // c for side, c in zip(sides, cube, strict=True))
    return t, h, w


def cut(video: Shaped[Array, "b t h w c"], cube: Triple) -> Shaped[Array, "b n p"]:
    """The cubes of a video, ordered by time, then rows, then columns. Within a cube, p runs over
    (t, h, w, c), channels fastest."""
    b, *_, c = video.shape
    (t, h, w), (p, q, r) = grid_of(video.shape, cube), cube
    x = video.reshape(b, t, p, h, q, w, r, c)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, t * h * w, p * q * r * c)


def join(cubes: Shaped[Array, "b n p"], grid: Triple, cube: Triple) -> Shaped[Array, "b t h w c"]:
    """The inverse of `cut`: the video of the cubes."""
    b = cubes.shape[0]
    (t, h, w), (p, q, r) = grid, cube
    x = cubes.reshape(b, t, h, w, p, q, r, -1)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t * p, h * q, w * r, -1)


def to_unit(x: Num[Array, "*n"]) -> Float[Array, "*n"]:
    """uint8 -> [0, 1]; floats are assumed to be in [0, 1] already."""
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32) / 255


def standardise(
    cubes: Float[Array, "b n p"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b n p"]:
    """(cubes - mean) / std per channel, as the backbone's weights expect; channels run fastest in
    p."""
    repeats = cubes.shape[-1] // len(mean)
    m, s = (jnp.tile(jnp.asarray(v, cubes.dtype), repeats) for v in (mean, std))
    return (cubes - m) / s


class Cubes(NamedTuple):
    """Standardised cubes, and their flat indices in the grid (t, h, w)."""

    cubes: Float[Array, "b k p"]
    index: Int[Array, "b k"]
    grid: Triple


def visible(
    video: Num[Array, "b t h w c"],
    cube: Triple,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    hide: TokenMask | None = None,
) -> Cubes:
    """The cubes of a video (uint8, or floats in [0, 1]) that are not hidden. The video is cut in
    its own dtype; only visible cubes become floats. Raises UserError unless the mask fits the
    grid."""
    grid, cubes = grid_of(video.shape, cube), cut(video, cube)
    b, n, _ = cubes.shape
    if hide is None:
        index = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
    else:
        if hide.dropped.shape != (b, n):
            raise UserError(f"a mask of {hide.dropped.shape} for {b} videos of {n} tokens")
        index, cubes = hide.keep, masking.take(cubes, hide.keep)
    return Cubes(standardise(to_unit(cubes), mean, std), index, grid)


def sinusoid(n: int, d: int) -> Float[np.ndarray, "n d"]:
    """Fixed position table in fp64: column j of row p is sin or cos (even or odd j) of
    p / 10000^(2 (j // 2) / d). p is the flat index of the token over (t, h, w)."""
    angle = np.arange(n)[:, None] / np.power(10000.0, 2 * (np.arange(d) // 2) / d)[None]
    return np.where(np.arange(d) % 2 == 0, np.sin(angle), np.cos(angle))


def positions(n: int, d: int, dtype: Any) -> Float[Array, "n d"]:
    """`sinusoid`, rounded to fp32 as the reference rounds it, in `dtype`."""
    return jnp.asarray(sinusoid(n, d).astype(np.float32), dtype)


def plane(grid: Triple, d: int) -> Float[np.ndarray, "n d"]:
    """Fixed positions of cubes on a grid, fp64: the sine and cosine of the row, then of the column,
    at d / 4 frequencies 10000^(-4 j / d) each (MoCo v3, arXiv 2104.02057). Frame t adds
    `sinusoid` at t minus `sinusoid` at 0, so the first frame has the positions of a picture."""
    if d % 4:
        raise UserError(f"positions on a plane need a width that 4 divides, not {d}")
    t, h, w = grid
    omega = 10000.0 ** -(np.arange(d // 4) / (d // 4))
    row, column = (axis.reshape(-1, 1) * omega for axis in np.mgrid[:h, :w])
    place = np.concatenate([np.sin(row), np.cos(row), np.sin(column), np.cos(column)], axis=1)
    time = sinusoid(t, d) - sinusoid(1, d)
    return (time[:, None] + place).reshape(t * h * w, d)


def torch_conv_init(fan_in: int) -> Callable[..., Array]:
    """PyTorch's default for the weights and biases of convolutions: U(+-1 / sqrt(fan in))."""
    bound = 1 / math.sqrt(fan_in)
    return lambda rng, shape: jax.random.uniform(rng, shape, jnp.float32, -bound, bound)


class CubeEmbed(nn.Module):
    """Cubes of normalised pixels -> tokens: ViT's convolution with stride = kernel, as one matrix
    product, so that only visible cubes are computed. CLIP's has no bias."""

    width: int
    cube: Triple
    channels: int = 3
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, cubes: Float[Array, "b n p"]) -> Float[Array, "b n d"]:
        shape = (*self.cube, self.channels, self.width)
        init = torch_conv_init(math.prod(shape[:-1]))
        kernel = self.param("kernel", init, shape).reshape(-1, self.width)
        x = product(cubes.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            x += self.param("bias", init, (self.width,)).astype(self.dtype)
        return x


class WordEmbed(nn.Module):
    """BERT's embedding module: word + position + token type 0, layer norm (eps 1e-12), dropout.

    The padding word's row gets no gradient, as with PyTorch's `padding_idx`; it would only get one
    where means include padding. Dropout is active when a `dropout` rng is given.

    tasks: number of words that the method adds to the vocabulary, with ids from vocab_size on
    """

    vocab_size: int
    width: int
    pad_id: int = 0
    length: int = 512
    types: int = 2
    dropout: float = 0.1
    dtype: Any = jnp.float32
    tasks: int = 0

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        if ids.shape[1] > self.length:
            raise UserError(
                f"texts of {ids.shape[1]} tokens; the table has {self.length} positions"
            )
        init = nn.initializers.normal(0.02)
        word = self.param("word", init, (self.vocab_size, self.width))
        position = self.param("position", init, (self.length, self.width))
        types = self.param("type", init, (self.types, self.width))
        x = word[ids if not self.tasks else jnp.minimum(ids, self.vocab_size - 1)]
        if self.tasks:
            own = self.param("task", init, (self.tasks, self.width))
            task = ids - self.vocab_size
            x = jnp.where((task >= 0)[..., None], own[jnp.maximum(task, 0)], x)
        x = jnp.where((ids == self.pad_id)[..., None], jax.lax.stop_gradient(x), x)
        x = layer_norm(self.dtype, 1e-12, "norm")(x + position[: ids.shape[1]] + types[0])
        return nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
