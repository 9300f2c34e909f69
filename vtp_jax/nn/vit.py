"""Vision Transformers with learned positions: ViT (arXiv 2010.11929), MAE (2111.06377), CLIP's
image tower (2103.00020). An image is a video of one frame, a patch a cube of one frame.

What a video needs beyond that is the method's: frames one by one (`nn.backbone.by_frame`), or
temporal embeddings added between `embed` and `begin`.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from vtp_jax.nn import embed, pool
from vtp_jax.nn.backbone import Tokens
from vtp_jax.nn.embed import CubeEmbed, Triple
from vtp_jax.nn.sizes import Size
from vtp_jax.nn.transformer import VIT, Linear, Stack, Style, layer_norm
from vtp_jax.types import TokenMask, UserError

TABLE_INIT = nn.initializers.normal(0.02)


class ViT(nn.Module):
    """Cubes of normalised pixels -> tokens -> one vector.

    The verbs, in order: `embed`, `begin`, `encoder`, and `pool`, or `norm` of all tokens. `encode`
    is the first three, and `see` is these for a video (`nn.backbone`); calling the module is all,
    and creates all parameters.

    places:     rows of the position table, without the class token's
    has_class:  there is a class token, before the others, with a position of its own
    first_norm: CLIP: tokens are normalised before the blocks, and the embedding has no bias
    pooling:    "class": the normalised class token; "mean": the norm of the other tokens' mean,
                as fine-tuned MAE has it
    features:   width of CLIP's projection after pooling; None: there is none
    mean, std:  of pixels in [0, 1], by channel, which `see` standardises; by default it does not
    The rest as in `nn.transformer.Stack`. Tables start as N(0, 0.02).
    """

    size: Size
    places: int
    cube: Triple = (1, 16, 16)
    channels: int = 3
    style: Style = VIT
    has_class: bool = True
    first_norm: bool = False
    pooling: str = "class"
    features: int | None = None
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: str | None = None
    unroll: int = 1
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def setup(self):
        if self.pooling not in (("class", "mean") if self.has_class else ("mean",)):
            raise UserError(f"pooling '{self.pooling}': 'mean', or 'class' of a class token")
        d, eps = self.size.width, self.style.eps
        self.patch_embed = CubeEmbed(
            d, self.cube, self.channels, self.dtype, use_bias=not self.first_norm
        )
        if self.has_class:
            self.class_token = self.param("class_token", TABLE_INIT, (d,))
        self.position = self.param("position", TABLE_INIT, (self.has_class + self.places, d))
        if self.first_norm:
            self.norm_pre = layer_norm(self.dtype, eps)
        self.encoder = self.make_blocks()
        self.norm = layer_norm(self.dtype, eps)
        if self.features is not None:
            self.proj = Linear(self.features, use_bias=False, dtype=self.dtype)

    def make_blocks(self) -> nn.Module:
        """The blocks, called by `setup`; nets with another kind of block override it."""
        return Stack(self.size, self.drop_path, self.style, self.dtype, self.remat, self.unroll)

    def embed(
        self, cubes: Float[Array, "b k p"], index: Int[Array, "b k"] | None = None
    ) -> Float[Array, "b k d"]:
        """Tokens of the cubes at places `index`; without it the cubes are all, in order."""
        x, table = self.patch_embed(cubes), self.position[int(self.has_class) :]
        if index is None and x.shape[1] != self.places:
            raise UserError(f"{x.shape[1]} cubes; the position table has {self.places} places")
        return x + (table if index is None else table[index]).astype(x.dtype)

    def begin(self, x: Float[Array, "b k d"]) -> Float[Array, "b n d"]:
        """What enters the blocks: the class token before the others, CLIP's first norm."""
        if self.has_class:
            first = (self.class_token + self.position[0]).astype(x.dtype)
            first = jnp.broadcast_to(first, (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([first, x], axis=1)
        return self.norm_pre(x) if self.first_norm else x

    def encode(
        self, cubes: Float[Array, "b k p"], index: Int[Array, "b k"] | None = None
    ) -> Float[Array, "b n d"]:
        """The last block's output, the class token first."""
        return self.encoder(self.begin(self.embed(cubes, index)))

    def see(self, video: Num[Array, "b t h w c"], hide: TokenMask | None = None) -> Tokens:
        """The backbone verb. The position table has a row for each place of the video's grid."""
        cubes, index, grid = embed.visible(video, self.cube, self.mean, self.std, hide)
        if math.prod(grid) != self.places:
            raise UserError(f"a grid of {grid}; the position table has {self.places} places")
        raw = self.encode(cubes, None if hide is None else index)
        return Tokens(raw, int(self.has_class), index, grid)

    def project(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        """The last norm, and the projection where there is one: of a pooled token, or of all."""
        return self.norm(x) if self.features is None else self.proj(self.norm(x))

    def pool(
        self, raw: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b e"]:
        """One vector of the last block's output. `mask`: the tokens that a mean is over."""
        if self.pooling == "class":
            return self.project(raw[:, 0])
        first = int(self.has_class)
        return self.project(pool.mean(raw[:, first:], None if mask is None else mask[:, first:]))

    def __call__(self, cubes: Float[Array, "b n p"]) -> Float[Array, "b e"]:
        return self.pool(self.encode(cubes))
