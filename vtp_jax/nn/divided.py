"""A Vision Transformer for images and clips that attends over time, then over space (TimeSformer,
Bertasius et al., arXiv 2102.05095, "divided" attention). An image passes through the spatial half
alone, which is a ViT: a ViT's weights fit it name for name.

Shapes: b clips, t frames or tubes of frames, s places in each, d width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from vtp_jax.nn import embed
from vtp_jax.nn.backbone import Tokens
from vtp_jax.nn.layers import stacked
from vtp_jax.nn.sizes import Size
from vtp_jax.nn.transformer import VIT, Attention, Linear, Mlp, Style, layer_norm
from vtp_jax.types import TokenMask, UserError

TABLE_INIT = nn.initializers.normal(0.02)
Carry = tuple[Float[Array, "b d"], Float[Array, "b t s d"]]  # the class token, and the others


class DividedBlock(nn.Module):
    """Attention over time among the tokens of one place, attention over space among those of one
    frame and the class token, mlp. The class token attends to each frame separately, and the mean
    over frames is added to it. With one frame there is no attention over time.

    The branch of attention over time ends in a layer that starts at zero, `time_fc`, so that with
    a ViT's weights each frame starts with a ViT's output. (TimeSformer's code leaves this layer
    random in the first block.) With a `dropout` rng, each branch is dropped for a clip with
    probability `drop`; TimeSformer's code drops the first two branches for each place and each
    frame separately.
    """

    size: Size
    style: Style = VIT
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, carry: Carry, drop: Float[Array, ""]) -> tuple[Carry, None]:
        first, x = carry
        b, t, s, d = x.shape
        size, style, dtype = self.size, self.style, self.dtype

        def branch(y: Float[Array, "b *n d"]) -> Float[Array, "b *n d"]:
            if not self.has_rng("dropout"):
                return y
            shape = (b, *[1] * (y.ndim - 1))
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop, shape)
            return jnp.where(kept, y / (1 - drop).astype(y.dtype), 0)

        if t > 1:
            y = x.swapaxes(1, 2).reshape(b * s, t, d)
            y = layer_norm(dtype, style.eps, "norm_time")(y)
            y = Attention(size.heads, style, dtype, name="time_attn")(y, None)
            y = Linear(d, init=nn.initializers.zeros, dtype=dtype, name="time_fc")(y)
            x = x + branch(y.reshape(b, s, t, d).swapaxes(1, 2))

        frames = jnp.concatenate([jnp.broadcast_to(first[:, None, None], (b, t, 1, d)), x], axis=2)
        y = layer_norm(dtype, style.eps, "norm1")(frames.reshape(b * t, 1 + s, d))
        y = Attention(size.heads, style, dtype, name="attn")(y, None)
        y = branch(y.reshape(b, t, 1 + s, d))
        tokens = join(first + y[:, :, 0].mean(axis=1), x + y[:, :, 1:])

        y = layer_norm(dtype, style.eps, "norm2")(tokens)
        tokens += branch(Mlp(size.mlp, style.act, dtype, name="mlp")(y))
        return (tokens[:, 0], tokens[:, 1:].reshape(x.shape)), None


class DividedStack(nn.Module):
    """`depth` blocks with parameters stacked along axis 0; the fields are those of
    `nn.transformer.Stack`."""

    size: Size
    drop_path: float = 0.0
    style: Style = VIT
    dtype: Any = jnp.float32
    remat: str | None = None
    unroll: int = 1

    @nn.compact
    def __call__(
        self, first: Float[Array, "b d"], x: Float[Array, "b t s d"]
    ) -> Float[Array, "b n d"]:
        depth = self.size.depth
        stack = stacked(DividedBlock, depth, remat=self.remat, unroll=self.unroll)
        drop = jnp.linspace(0.0, self.drop_path, depth, dtype=jnp.float32)
        tokens = (first.astype(self.dtype), x.astype(self.dtype))
        return join(*stack(self.size, self.style, self.dtype, name="blocks")(tokens, drop)[0])


class DividedViT(nn.Module):
    """Images and clips of normalised pixels -> tokens, the class token first.

    An image (a clip of one frame) is cut into patches, a clip into cubes of several frames, each
    with its own embedding; everything else is shared. `encode` returns the last block's output,
    and calling the module its norm. A clip of t tubes takes the first t rows of the time table.

    places: patches of a picture; frames: the most tubes of frames in a clip
    mean, std: of pixels in [0, 1], by channel; by default pixels are taken as they are
    The rest as in `nn.transformer.Stack`. Tables start as N(0, 0.02).
    """

    size: Size
    places: int
    frames: int
    cube: embed.Triple = (2, 16, 16)
    channels: int = 3
    style: Style = VIT
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: str | None = None
    unroll: int = 1
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def setup(self):
        d, dtype, (_, p, q) = self.size.width, self.dtype, self.cube
        self.patch_embed = embed.CubeEmbed(d, (1, p, q), self.channels, dtype)
        self.video_patch_embed = embed.CubeEmbed(d, self.cube, self.channels, dtype)
        self.class_token = self.param("class_token", TABLE_INIT, (d,))
        self.position = self.param("position", TABLE_INIT, (1 + self.places, d))
        self.time_position = self.param("time_position", TABLE_INIT, (self.frames, d))
        self.encoder = DividedStack(
            self.size, self.drop_path, self.style, dtype, self.remat, self.unroll
        )
        self.norm = layer_norm(dtype, self.style.eps)

    def embed(
        self, clip: Num[Array, "b f h w c"], hide: TokenMask | None = None
    ) -> tuple[Float[Array, "b t s d"], embed.Cubes]:
        """Tokens with their positions in space and, for clips, in time; and the cubes that became
        tokens."""
        image = clip.shape[1] == 1
        cube = (1, *self.cube[1:]) if image else self.cube
        shown = embed.visible(clip, cube, self.mean, self.std, hide)
        t, h, w = shown.grid
        if h * w != self.places or t > self.frames:
            raise UserError(
                f"{t} x {h} x {w} cubes; the tables have {self.frames} x {self.places} positions"
            )
        x = (self.patch_embed if image else self.video_patch_embed)(shown.cubes)
        x = x.reshape(x.shape[0], t, -1, x.shape[-1])
        table = self.position[1:]
        if hide is not None:
            table = table[shown.index.reshape(x.shape[:3]) % self.places]
        x = x + table.astype(x.dtype)
        return x if image else x + self.time_position[:t, None].astype(x.dtype), shown

    def see(self, video: Num[Array, "b f h w c"], hide: TokenMask | None = None) -> Tokens:
        """The backbone verb. Only tubes may be hidden: attention over time takes token i of each
        frame to be at the same place."""
        x, (_, index, grid) = self.embed(video, hide)
        first = (self.class_token + self.position[0]).astype(x.dtype)
        raw = self.encoder(jnp.broadcast_to(first, (x.shape[0], x.shape[-1])), x)
        return Tokens(raw, 1, index, grid)

    def encode(self, clip: Num[Array, "b f h w c"]) -> Float[Array, "b n d"]:
        return self.see(clip).raw

    def __call__(self, clip: Float[Array, "b f h w c"]) -> Float[Array, "b n d"]:
        return self.norm(self.encode(clip))


def join(first: Float[Array, "b d"], x: Float[Array, "b t s d"]) -> Float[Array, "b n d"]:
    """All tokens in one sequence: the class token, then frame by frame."""
    return jnp.concatenate([first[:, None], x.reshape(x.shape[0], -1, x.shape[-1])], axis=1)
