"""The net of BLIP (arXiv 2201.12086) and OmniVL (2209.07526), for images and clips: a visual
encoder, and one BERT that serves as three nets.

By itself it is the text encoder. With cross-attention to the visual tokens after each
self-attention it separates right pairs from wrong ones. With a causal self-attention of its own
(`writing`) it generates text. The latter two read a task word in place of [CLS].
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from vtp_jax.nn import sizes
from vtp_jax.nn.backbone import Tokens
from vtp_jax.nn.divided import DividedViT
from vtp_jax.nn.text import Bert, WordHead, causal
from vtp_jax.nn.transformer import Linear
from vtp_jax.types import Params, TokenMask

OWN = ("attn", "norm1")  # what the causal decoder's blocks do not share
KINDS = ("video", "text")


class Blip(nn.Module):
    """Parameters of the nets, and the verbs that losses use.

    size, text_size: of the blocks; features: width of embeddings. picture: side in pixels; frames:
    maximum number in a clip; cube: frames, rows and columns of a clip's token; an image's token has
    one frame. dropout: BERT's. text_length: maximum length of a text. The rest is as in
    nn.transformer.Stack.
    """

    size: sizes.Size
    text_size: sizes.Size
    features: int
    picture: int
    frames: int
    cube: tuple[int, int, int]
    dropout: float
    drop_path: float
    dtype: Any
    remat: str | None
    unroll: int
    vocab_size: int
    text_length: int
    pad_id: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def setup(self):
        dtype, (t, h, w) = jnp.dtype(self.dtype), self.cube
        more: Any = dict(dtype=dtype, remat=self.remat, unroll=self.unroll)
        self.visual = DividedViT(
            self.size, (self.picture // h) * (self.picture // w), self.frames // t,
            self.cube, len(self.mean), drop_path=self.drop_path, mean=self.mean, std=self.std,
            **more,
        )  # fmt: skip
        self.text = Bert(
            self.text_size, self.vocab_size, self.pad_id, self.text_length, self.dropout,
            tasks=2, **more,
        )  # fmt: skip
        self.video_proj, self.text_proj = (Linear(self.features, dtype=dtype) for _ in KINDS)
        self.match_head = Linear(2, dtype=dtype)
        self.word_head = WordHead(dtype=dtype)

    def see(self, video: Num[Array, "b f h w c"], hide: TokenMask | None = None) -> Tokens:
        """Tokens of a clip or of an image (`nn.backbone`), the class token first."""
        return self.visual.see(video, hide)

    def read(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
        return self.text.encode(ids, mask)

    def fuse(
        self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"], seen: Float[Array, "b n e"]
    ) -> Float[Array, "b l d"]:
        """The text's tokens, with cross-attention to `seen` in each block; the first token
        summarises both."""
        return self.text.encode(ids.at[:, 0].set(self.vocab_size), mask, seen)

    def write(
        self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"], seen: Float[Array, "c n e"]
    ) -> Float[Array, "b l v"]:
        """Logits of the word after each word, over the vocabulary and the two task words; b / c
        texts for each of the c clips. Expects parameters made by `writing`."""
        ids = ids.at[:, 0].set(self.vocab_size + 1)
        return self.words(self.text.encode(ids, causal(ids.shape[1]) & mask[:, None], seen))

    def words(self, tokens: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        table = self.variables["params"]["text"]["text_embed"]
        return self.word_head(tokens, jnp.concatenate([table["word"], table["task"]]))

    def visit(self, image: Any, clip: Any, ids: Int[Array, "b l"]) -> None:
        """Every part once, and no stack twice: linen creates only what init touches."""
        self.visual.embed(image)
        seen = self.visual.norm(self.see(clip).raw)
        fused = self.fuse(ids, jnp.ones(ids.shape, bool), seen)
        self.match_head(fused)
        self.video_proj(seen)
        self.text_proj(fused)
        self.words(fused)


def writing(params: Params) -> Params:
    """The parameters with the causal decoder's self-attention in place of the text encoder's."""
    text = params["text"]
    blocks = {**text["encoder"]["blocks"], **params["decoder"]["blocks"]}
    return {**params, "text": {**text, "encoder": {"blocks": blocks}}}
