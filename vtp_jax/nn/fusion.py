"""BERT in two halves, as ALBEF has it (arXiv 2107.07651, section 3.1): the first blocks read only
a text, the last ones also attend to the output of another encoder."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from vtp_jax.nn.text import BertParts
from vtp_jax.nn.transformer import AttentionMask, OtherMask
from vtp_jax.types import UserError


class SplitBert(BertParts):
    """`read` encodes a text, `fuse` continues from its tokens with those of another encoder.
    Calling the module does both, and creates all parameters.

    size: of both halves together; fusion: the number of blocks of the second half, which alone have
    cross-attention. The rest as in `nn.text.BertParts`. A BERT of `size` is the two halves without
    other tokens, its blocks cut at `size.depth - fusion`.
    """

    fusion: int = 6

    def setup(self):
        first = self.size.depth - self.fusion
        if min(first, self.fusion) < 1:
            raise UserError(
                f"fusion={self.fusion} of {self.size.depth} blocks: both halves have some"
            )
        self.text_embed = self.make_words()
        self.encoder, self.fuser = self.make_blocks(first), self.make_blocks(self.fusion)

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
