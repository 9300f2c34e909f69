"""BERT in two halves, as ALBEF has it (arXiv 2107.07651, section 3.1): the first blocks read only
a text, the last ones also attend to the output of another encoder."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vtp_jax.nn.embed import WordEmbed
from vtp_jax.nn.sizes import Size
from vtp_jax.nn.transformer import BERT, AttentionMask, OtherMask, Stack, Style
from vtp_jax.types import UserError


class SplitBert(nn.Module):
    """`read` encodes a text, `fuse` continues from its tokens with those of another encoder.
    Calling the module does both, and creates all parameters.

    size: of both halves together; fusion: the number of blocks of the second half, which alone have
    cross-attention. The rest as in `nn.text.Bert`. A BERT of `size` is the two halves without other
    tokens, its blocks cut at `size.depth - fusion`.
    """

    size: Size
    fusion: int = 6
    vocab_size: int = 30522
    pad_id: int = 0
    length: int = 512
    dropout: float = 0.1
    style: Style = BERT
    dtype: Any = jnp.float32
    remat: str | None = None
    unroll: int = 1
    tasks: int = 0

    def setup(self):
        first = self.size.depth - self.fusion
        if min(first, self.fusion) < 1:
            raise UserError(
                f"fusion={self.fusion} of {self.size.depth} blocks: both halves have some"
            )
        self.text_embed = WordEmbed(
            self.vocab_size, self.size.width, self.pad_id, self.length,
            dropout=self.dropout, dtype=self.dtype, tasks=self.tasks,
        )  # fmt: skip
        self.encoder, self.fuser = (
            Stack(
                self.size._replace(depth=depth), 0.0, self.style, self.dtype, self.remat,
                self.unroll, self.dropout,
            )
            for depth in (first, self.fusion)
        )  # fmt: skip

    def read(self, ids: Int[Array, "b l"], mask: AttentionMask = None) -> Float[Array, "b l d"]:
        return self.encoder(self.text_embed(ids), mask)

    def fuse(
        self,
        tokens: Float[Array, "b l d"],
        mask: AttentionMask = None,
        other: Float[Array, "c m e"] | None = None,
        other_mask: OtherMask = None,
    ) -> Float[Array, "b l d"]:
        return self.fuser(tokens, mask, other, other_mask)

    def __call__(
        self,
        ids: Int[Array, "b l"],
        mask: AttentionMask = None,
        other: Float[Array, "c m e"] | None = None,
        other_mask: OtherMask = None,
    ) -> Float[Array, "b l d"]:
        return self.fuse(self.read(ids, mask), mask, other, other_mask)
