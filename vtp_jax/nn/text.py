"""Text towers that published video-text methods start from: CLIP's causal one (arXiv 2103.00020)
and BERT (1810.04805), which is bidirectional and can cross-attend to other tokens (ALBEF, BLIP)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtp_jax.nn.embed import WordEmbed
from vtp_jax.nn.sizes import Size
from vtp_jax.nn.transformer import (
    ACTIVATIONS,
    BERT,
    CLIP,
    AttentionMask,
    Linear,
    OtherMask,
    Stack,
    Style,
    layer_norm,
    product,
)
from vtp_jax.types import UserError


def causal(n: int) -> Bool[Array, "1 n n"]:
    """The mask under which a token attends to itself and to the tokens before it."""
    return jnp.tril(jnp.ones((1, n, n), bool))


class CausalText(nn.Module):
    """CLIP's text tower: ids -> tokens -> one vector, that of the end-of-text token.

    The verbs, in order: `embed`, `encode` (the last block's output), `pool`. Padding after the end
    needs no mask: no token attends to later ones.

    features: width of the projection after pooling, without bias
    end_id:   the id whose first position is pooled; None: the largest id of the row, which in
              CLIP's vocabulary is the end of text
    The rest is as in `nn.transformer.Stack`. Initialisation is CLIP's, except in the blocks.
    """

    size: Size
    features: int
    vocab_size: int = 49408
    length: int = 77
    end_id: int | None = None
    style: Style = CLIP
    dtype: Any = jnp.float32
    remat: str | None = None
    unroll: int = 1

    def setup(self):
        d, normal = self.size.width, nn.initializers.normal
        self.word = self.param("word", normal(0.02), (self.vocab_size, d))
        self.position = self.param("position", normal(0.01), (self.length, d))
        self.encoder = Stack(self.size, 0.0, self.style, self.dtype, self.remat, self.unroll)
        self.norm = layer_norm(self.dtype, self.style.eps)
        self.proj = Linear(self.features, use_bias=False, init=normal(d**-0.5), dtype=self.dtype)

    def embed(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        if ids.shape[1] > self.length:
            raise UserError(
                f"texts of {ids.shape[1]} tokens; the table has {self.length} positions"
            )
        return (self.word[ids] + self.position[: ids.shape[1]]).astype(self.dtype)

    def encode(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        return self.encoder(self.embed(ids), causal(ids.shape[1]))

    def pool(self, raw: Float[Array, "b l d"], ids: Int[Array, "b l"]) -> Float[Array, "b e"]:
        end = jnp.argmax(ids if self.end_id is None else ids == self.end_id, axis=1)
        last = jnp.take_along_axis(raw, end[:, None, None], axis=1)[:, 0]
        return self.proj(self.norm(last))

    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b e"]:
        return self.pool(self.encode(ids), ids)


class BertParts(nn.Module):
    """The fields of BERT nets, and for their setup the parts that they are made of.

    dropout: rate in BERT's three places: embeddings, branches and attention weights
    tasks:   number of words that the method adds, see `nn.embed.WordEmbed`
    The rest is as in `nn.transformer.Stack` and `nn.embed.WordEmbed`.
    """

    size: Size
    vocab_size: int = 30522
    pad_id: int = 0
    length: int = 512
    dropout: float = 0.1
    style: Style = BERT
    dtype: Any = jnp.float32
    remat: str | None = None
    unroll: int = 1
    tasks: int = 0

    def make_words(self) -> nn.Module:
        return WordEmbed(
            self.vocab_size, self.size.width, self.pad_id, self.length,
            dropout=self.dropout, dtype=self.dtype, tasks=self.tasks,
        )  # fmt: skip

    def make_blocks(self, depth: int) -> nn.Module:
        size = self.size._replace(depth=depth)
        return Stack(size, 0.0, self.style, self.dtype, self.remat, self.unroll, self.dropout)


class Bert(BertParts):
    """BERT with all words in segment 0. The blocks are post-norm, so no final norm follows them.

    The verbs, in order: `embed`, `encoder`, `pool`; `encode` is the first two. Calling the module
    runs all of them and creates all parameters. `encoder` also takes other tokens (see `Stack`);
    the parameters for these exist only if `init` is called with some.
    """

    def setup(self):
        self.text_embed = self.make_words()
        self.encoder = self.make_blocks(self.size.depth)
        self.pooler = Linear(self.size.width, dtype=self.dtype)

    def embed(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        return self.text_embed(ids)

    def encode(
        self,
        ids: Int[Array, "b l"],
        mask: AttentionMask = None,
        other: Float[Array, "c m e"] | None = None,
        other_mask: OtherMask = None,
    ) -> Float[Array, "b l d"]:
        return self.encoder(self.embed(ids), mask, other, other_mask)

    def pool(self, tokens: Float[Array, "b l d"]) -> Float[Array, "b d"]:
        """tanh of a layer on the first token, [CLS]."""
        return jnp.tanh(self.pooler(tokens[:, 0]))

    def __call__(
        self,
        ids: Int[Array, "b l"],
        mask: AttentionMask = None,
        other: Float[Array, "c m e"] | None = None,
        other_mask: OtherMask = None,
    ) -> Float[Array, "b d"]:
        return self.pool(self.encode(ids, mask, other, other_mask))


class WordHead(nn.Module):
    """BERT's prediction of words: a linear layer, GELU, a norm, then products with the word
    embedding table (tied weights) plus a bias."""

    eps: float = BERT.eps
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b l d"], table: Float[Array, "v d"]
    ) -> Float[Array, "b l v"]:
        x = ACTIVATIONS["gelu"](Linear(tokens.shape[-1], dtype=self.dtype, name="fc")(tokens))
        x = layer_norm(self.dtype, self.eps, "norm")(x)
        bias = self.param("bias", nn.initializers.zeros, (table.shape[0],))
        return product(x, table.T.astype(self.dtype)) + bias.astype(self.dtype)
