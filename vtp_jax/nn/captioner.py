"""CoCa's text decoder (arXiv 2205.01917): the lower half reads words only, the upper half also
attends to the video and predicts the next word. Both are causal, so one pass over a text serves
both contrast, through a class token at its end, and captioning.

Details that the paper does not specify are as in OpenCLIP: norms before the class token's
projection and before the head, neither of which has a bias. The class token takes no row of the
position table, so padding does not change its position. The tokens that the upper half attends to
are normalised once for all layers.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtp_jax.nn.sizes import Size
from vtp_jax.nn.text import causal
from vtp_jax.nn.transformer import VIT, Linear, Stack, Style, layer_norm
from vtp_jax.types import UserError


class Captioner(nn.Module):
    """The verbs: `read` runs the lower half, `predict` the upper half, and `prefill` and `step`
    run both, for generation word by word.

    size: of the lower half; layers: depth of the upper half; length: rows of the position table
    The rest is as in `nn.transformer.Stack`.
    """

    size: Size
    layers: int
    vocab_size: int
    length: int
    style: Style = VIT
    dtype: Any = jnp.float32
    remat: str | None = None
    unroll: int = 1

    def setup(self):
        d, normal = self.size.width, nn.initializers.normal
        self.word = self.param("word", normal(0.02), (self.vocab_size, d))
        self.position = self.param("position", normal(0.01), (self.length, d))
        self.class_token = self.param("class_token", normal(0.01), (d,))
        more = (0.0, self.style, self.dtype, self.remat, self.unroll)
        self.lower = Stack(self.size, *more)
        self.class_norm = layer_norm(self.dtype, self.style.eps)
        self.proj = Linear(d, use_bias=False, dtype=self.dtype)
        self.memory_norm = layer_norm(self.dtype, self.style.eps)
        self.upper = Stack(self.size._replace(depth=self.layers), *more)
        self.norm = layer_norm(self.dtype, self.style.eps)
        self.head = Linear(self.vocab_size, use_bias=False, dtype=self.dtype)

    def embed(self, ids: Int[Array, "b l"], place: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        return (self.word[ids] + self.position[place]).astype(self.dtype)

    def embed_all(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        length = ids.shape[1]
        if length > self.length:
            raise UserError(f"texts of {length} tokens; the table has {self.length} positions")
        return self.embed(ids, jnp.broadcast_to(jnp.arange(length), ids.shape))

    def read(
        self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b d"]]:
        """(tokens of the words, embedding of the text)."""
        words = self.embed_all(ids)
        last = jnp.broadcast_to(
            self.class_token.astype(words.dtype), (len(ids), 1, self.size.width)
        )
        keys = jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)
        seen = causal(keys.shape[1]) & keys[:, None]
        x = self.lower(jnp.concatenate([words, last], axis=1), seen)
        return x[:, :-1], self.proj(self.class_norm(x[:, -1]))

    def predict(
        self,
        words: Float[Array, "b l d"],
        memory: Float[Array, "c q d"],
        mask: Bool[Array, "#b l m"],
    ) -> Float[Array, "b l v"]:
        """Logits of the word after each token, from the lower half's tokens and the video's
        (`memory`). mask: the words that each word may attend to."""
        return self.head(self.norm(self.upper(words, mask, self.memory_norm(memory))))

    def prefill(
        self, ids: Int[Array, "b l"], memory: Float[Array, "b q d"]
    ) -> Float[Array, "b l v"]:
        """Logits of the word after each token of whole rows; fills a cache (`nn.transformer`)."""
        mask = causal(ids.shape[1])
        return self.predict(self.lower(self.embed_all(ids), mask), memory, mask)

    def step(
        self, token: Int[Array, " r"], place: Int[Array, " r"], memory: Float[Array, "c q d"]
    ) -> Float[Array, "r v"]:
        """Logits of the word after one more token in each row, with a cache of `length` places."""
        mask = (jnp.arange(self.length) <= place[:, None])[:, None]
        words = self.lower(self.embed(token[:, None], place[:, None]), mask)
        return self.predict(words, memory, mask)[:, 0]
