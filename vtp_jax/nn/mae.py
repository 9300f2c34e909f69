"""Masked autoencoders: an encoder of what is visible, and a narrow decoder that predicts the rest
(MAE, arXiv 2111.06377; VideoMAE, 2203.12602).

Shapes: b rows, n places of a clip's grid, k visible ones, a places that the decoder is asked at;
d and e the widths of encoder and decoder, p the numbers in a cube.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtp_jax import masking
from vtp_jax.nn import embed, pool
from vtp_jax.nn.backbone import Tokens
from vtp_jax.nn.bind import has
from vtp_jax.nn.sizes import Size
from vtp_jax.nn.transformer import VIT, AttentionMask, Linear, Stack, Style, layer_norm
from vtp_jax.types import Spec, TokenMask

MASK_INIT = nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)
TABLE_INIT = nn.initializers.normal(0.02)


def predict(
    seen: Float[Array, "b k e"],
    asked: Float[Array, "b a e"],
    blocks: Callable[..., Array],
    norm: Callable[..., Array],
    head: Callable[..., Array],
) -> Float[Array, "b a p"]:
    """The decoder's cubes at the requested places. seen: the encoder's tokens, at the decoder's
    width; asked: mask tokens of these places. Both include their positions, from which alone the
    decoder knows the order."""
    x = jnp.concatenate([seen, asked], axis=1)
    return head(norm(blocks(x, read=asked.shape[1])))


class MaskedAutoencoder(nn.Module):
    """VideoMAE's net: parameters and verbs. Positions are fixed, and there is no class token.

    cube: frames, rows and columns of a token; mean, std: of pixels in [0, 1], by channel
    The rest as in `nn.transformer.Stack`.
    """

    encoder_size: Size
    decoder_size: Size
    cube: embed.Triple
    drop_path: float
    dtype: Any
    remat: str | None
    unroll: int
    attention: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def setup(self):
        d, e, dtype = self.encoder_size.width, self.decoder_size.width, jnp.dtype(self.dtype)
        stack: Any = dict(
            dtype=dtype, remat=self.remat, unroll=self.unroll, attention=self.attention
        )
        self.patch_embed = embed.CubeEmbed(d, self.cube, len(self.mean), dtype)
        self.encoder = Stack(self.encoder_size, self.drop_path, **stack)
        self.encoder_norm = layer_norm(dtype)
        self.encoder_to_decoder = Linear(e, use_bias=False, dtype=dtype)
        self.decoder = Stack(self.decoder_size, **stack)
        self.decoder_norm = layer_norm(dtype)
        self.decoder_head = Linear(math.prod(self.cube) * len(self.mean), dtype=dtype)
        if self.is_initializing():  # else read where it is used: a task may have dropped it
            self.param("mask_token", MASK_INIT, (e,))

    def embed_video(self, video: Any, hide: TokenMask | None = None) -> Tokens:
        """The tokens that enter the encoder. Pixels uint8, or floats in [0, 1]."""
        shown = embed.visible(video, self.cube, self.mean, self.std, hide)
        return Tokens(self.embed_cubes(shown.cubes, shown.index, shown.grid), 0, *shown[1:])

    def embed_cubes(
        self, cubes: Float[Array, "b k p"], index: Int[Array, "b k"], grid: embed.Triple
    ) -> Float[Array, "b k d"]:
        """Tokens of standardised cubes at places `index` of the grid."""
        x = self.patch_embed(cubes)
        return x + embed.positions(math.prod(grid), x.shape[-1], x.dtype)[index]

    def see(self, video: Any, hide: TokenMask | None = None) -> Tokens:
        """The backbone verb, see `nn.backbone`."""
        tokens = self.embed_video(video, hide)
        return tokens._replace(raw=self.encoder(tokens.raw))

    def encode(
        self, tokens: Float[Array, "b n d"], mask: AttentionMask = None
    ) -> Float[Array, "b n d"]:
        """The encoder and its last norm."""
        return self.encoder_norm(self.encoder(tokens, mask))

    def describe(
        self,
        raw: Float[Array, "b n d"],
        mask: Bool[Array, "b n"] | None = None,
        pool_padding: bool = False,
    ) -> dict[str, Array]:
        """An `Encoded` of the encoder's output: raw, mask and, unless a task has dropped the last
        norm, tokens and embedding, their mean (with pool_padding over padding too)."""
        mask = jnp.ones(raw.shape[:2], bool) if mask is None else mask
        if not has(self, "encoder_norm"):
            return dict(raw=raw, mask=mask)
        tokens = self.encoder_norm(raw)
        embedding = pool.mean(tokens, jnp.ones_like(mask) if pool_padding else mask)
        return dict(raw=raw, mask=mask, tokens=tokens, embedding=embedding)

    def decode(
        self, seen: Float[Array, "b k d"], keep: Int[Array, "b k"], ask: Int[Array, "b a"], n: int
    ) -> Float[Array, "b a p"]:
        """Predicted cubes at places `ask` of n, from the encoder's output at places `keep`."""
        x = self.encoder_to_decoder(seen)
        place = embed.positions(n, x.shape[-1], x.dtype)
        asked = self.variables["params"]["mask_token"].astype(x.dtype) + place[ask]
        return predict(x + place[keep], asked, self.decoder, self.decoder_norm, self.decoder_head)

    def restore(self, video: Any, hide: TokenMask, ask: Int[Array, "b a"]) -> Float[Array, "b a p"]:
        """The whole autoencoder: from the visible cubes to those at places `ask`."""
        tokens = self.embed_video(video, hide)
        return self.decode(self.encode(tokens.raw), hide.keep, ask, math.prod(tokens.grid))


def half_hidden(net: MaskedAutoencoder, spec: Spec) -> tuple[Float[Array, "1 t h w c"], TokenMask]:
    """A black clip of a batch's shape, of whose cubes half are hidden: what `init` visits verbs
    with."""
    video = jnp.zeros((1, *spec["video"].shape[-4:]))
    n = math.prod(embed.grid_of(video.shape, net.cube))
    return video, masking.tokens(jax.random.key(0), 1, n, 0.5)


class Decoder(nn.Module):
    """MAE's decoder: from the normalised tokens of what was seen, the class token's first, to
    predicted cubes of p numbers at the hidden places. Positions are learned."""

    size: Size
    places: int
    features: int  # p
    style: Style = VIT
    dtype: Any = jnp.float32
    remat: str | None = None
    unroll: int = 1

    @nn.compact
    def __call__(self, seen: Float[Array, "b m d"], mask: TokenMask) -> Float[Array, "b a p"]:
        e, dtype = self.size.width, self.dtype
        x = Linear(e, dtype=dtype, name="embed")(seen)
        token = self.param("mask_token", TABLE_INIT, (e,))
        table = self.param("position", TABLE_INIT, (1 + self.places, e))
        visible = jnp.pad(1 + mask.keep, ((0, 0), (1, 0)))  # the class token's place is row 0
        return predict(
            x + table[visible].astype(x.dtype),
            (token + table[1 + mask.drop]).astype(x.dtype),
            Stack(self.size, 0.0, self.style, dtype, self.remat, self.unroll, name="stack"),
            layer_norm(dtype, self.style.eps, "norm"),
            Linear(self.features, dtype=dtype, name="head"),
        )
