"""Divided space-time attention: CLIP's image tower extended to videos.

The blocks are Frozen in Time's (Bain et al., arXiv 2104.00650) with one class token for the whole
clip, as in TVTSv2 (2305.14173). CLIP's weights fit by name; `time_position`, `time_attn` and
`norm_time` are new. TimeSformer's blocks are in `nn.divided`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from vtp_jax.nn.attention import Drop, attend
from vtp_jax.nn.backbone import Tokens
from vtp_jax.nn.embed import visible
from vtp_jax.nn.layers import stacked
from vtp_jax.nn.sizes import Size
from vtp_jax.nn.transformer import CLIP, Attention, Mlp, Style, layer_norm
from vtp_jax.nn.vit import ViT
from vtp_jax.types import TokenMask, UserError

ZEROS, ONES = nn.initializers.zeros, nn.initializers.ones
# With both, attention over time adds nothing at the start. See `SpaceTimeBlock`.
TIME_INITS: dict[str, dict[str, Any]] = dict(
    zero=dict(proj_init=ZEROS), reference=dict(qkv_init=ZEROS, proj_init=ONES)
)


def attend_divided(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n h k"],
    v: Float[Array, "b n h k"],
    mask: None = None,
    drop: Drop | None = None,
    *,
    frames: int,
    along: str,
) -> Float[Array, "b n h k"]:
    """`attend` among n = 1 + frames * p tokens: a class token, then the frames one after the other.

    The class token attends to all tokens. The others attend to it and, along "space", to their own
    frame; along "time", to their own place in all frames.
    """
    b, n, h, d = q.shape
    places = (n - 1) // frames
    groups = frames if along == "space" else places

    def fold(x: Float[Array, "b n h k"]) -> Float[Array, "g m h k"]:
        x = x[:, 1:].reshape(b, frames, places, h, d)
        return (x if along == "space" else x.swapaxes(1, 2)).reshape(b * groups, -1, h, d)

    def unfold(x: Float[Array, "g s h k"]) -> Float[Array, "b m h k"]:
        x = x.reshape(b, groups, -1, h, d)
        return (x if along == "space" else x.swapaxes(1, 2)).reshape(b, n - 1, h, d)

    def with_first(x: Float[Array, "b n h k"]) -> Float[Array, "g m h k"]:
        return jnp.concatenate([jnp.repeat(x[:, :1], groups, axis=0), fold(x)], axis=1)

    first = attend(q[:, :1], k, v, None, drop)
    rest = attend(fold(q), with_first(k), with_first(v), None, drop)
    return jnp.concatenate([first, unfold(rest)], axis=1)


class SpaceTimeBlock(nn.Module):
    """t = x + time_attn(norm x); s = x + attn(norm t), from x and not from t; s + mlp(norm s).

    time_init: "zero": the last matrix of the attention over time starts at 0, so that it adds
    nothing at first, and learns. "reference": the first matrix is 0 and the last all ones, as in
    the code of Frozen in Time and TVTS. This adds nothing either, but is a saddle: all channels of
    the branch are equal, the norm removes their common value, and apart from rounding only the last
    bias has a gradient.
    """

    size: Size
    frames: int
    time_init: str = "zero"
    style: Style = CLIP
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], _: None) -> tuple[Float[Array, "b n d"], None]:
        size, style, dtype = self.size, self.style, self.dtype

        def attention(along: str, name: str, **init: Any) -> Attention:
            how = partial(attend_divided, frames=self.frames, along=along)
            return Attention(size.heads, style, dtype, how=how, name=name, **init)

        def norm(x: Float[Array, "b n d"], name: str) -> Float[Array, "b n d"]:
            return layer_norm(dtype, style.eps, name)(x)

        x = nn.with_logical_constraint(x, ("act_batch", "act_len", "act_emb"))
        time = attention("time", "time_attn", **TIME_INITS[self.time_init])
        t = x + time(norm(x, "norm_time"), None)
        s = x + attention("space", "attn")(norm(t, "norm1"), None)
        return s + Mlp(size.mlp, style.act, dtype, name="mlp")(norm(s, "norm2")), None


class SpaceTimeStack(nn.Module):
    """`nn.transformer.Stack` of `SpaceTimeBlock`s; the caller passes the number of frames."""

    size: Size
    time_init: str = "zero"
    style: Style = CLIP
    dtype: Any = jnp.float32
    remat: str | None = None
    unroll: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], frames: int) -> Float[Array, "b n d"]:
        depth = self.size.depth
        stack = stacked(SpaceTimeBlock, depth, remat=self.remat, unroll=self.unroll)
        made = stack(self.size, frames, self.time_init, self.style, self.dtype, name="blocks")
        return made(x.astype(self.dtype), None)[0]


class SpaceTimeViT(ViT):
    """A ViT for the cubes of several frames, with one class token for the clip. `encode_video`
    replaces `encode`; the rest is `ViT`'s.

    frames:    rows of the time table, of which a shorter clip takes the first
    time_init: see `SpaceTimeBlock`
    """

    frames: int = 12
    time_init: str = "zero"

    def setup(self):
        super().setup()
        shape = (self.frames, self.size.width)
        self.time_position = self.param(
            "time_position", nn.initializers.normal(shape[1] ** -0.5), shape
        )

    def make_blocks(self) -> nn.Module:
        return SpaceTimeStack(
            self.size, self.time_init, self.style, self.dtype, self.remat, self.unroll
        )

    def encode_video(
        self, cubes: Float[Array, "b k p"], index: Int[Array, "b k"], frames: int
    ) -> Float[Array, "b n d"]:
        """The last block's output, the class token first, n = 1 + k.

        index: the cubes' places among frames * places, frame by frame, the same number in each.
        """
        if frames > self.frames:
            raise UserError(f"a clip of {frames} frames; the time table has {self.frames}")
        if cubes.shape[1] % frames:
            raise UserError(
                f"{cubes.shape[1]} cubes; each of {frames} frames must have the same number"
            )
        frame, place = jnp.divmod(index, self.places)
        x = self.embed(cubes, place)
        return self.encoder(self.begin(x + self.time_position[frame].astype(x.dtype)), frames)

    def see(self, video: Num[Array, "b t h w c"], hide: TokenMask | None = None) -> Tokens:
        """The backbone verb. Every frame must have the same number of visible cubes."""
        cubes, index, grid = visible(video, self.cube, self.mean, self.std, hide)
        return Tokens(self.encode_video(cubes, index, grid[0]), 1, index, grid)
