"""The official SimVTP (wufeim/SimVTP @558d24e): `parts` explains the axes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from vtp_jax.convert.reference.bert import embed_words
from vtp_jax.convert.reference.parts import (
    Mask,
    Outputs,
    Rows,
    Stack,
    Tensors,
    hide,
    linear,
    mean,
    norm,
    run_blocks,
    take,
)
from vtp_jax.convert.reference.videomae import BEIT, VIDEOMAE, decode, embed_video


def pretrain(
    t: Tensors,
    video: Float[np.ndarray, "b 3 t h w"],
    mask: Bool[np.ndarray, "b n"],
    ids: Int[np.ndarray, "b l"],
    attention_mask: Mask,
    heads: int,
    decoder_heads: int,
    negatives: Int[np.ndarray, "b"] | None = None,
    pool_padding: bool = True,
) -> Outputs:
    """The pretraining net, names of its `model`.

    All four passes read `ids` unchanged: the released code masks words beforehand, for all passes.
    attention_mask: true where there is a word. negatives: for each row, the row whose video (and
    mask) replaces its own. pool_padding: text and pairs are averaged over padding too, as in the
    released code; otherwise over words (and visible cubes) only.
    -> pixels "b n-k p" and words "b l vocabulary" of the joint pass, after the heads; video "b d"
    and text "b d" of the separate passes; match "b 2", logits (no, yes) of the pairs, and with
    `negatives` "2b 2", the pairs first.
    """
    words = attention_mask.astype(bool)
    cubes = take(embed_video(t, VIDEOMAE.embed, video), ~mask)
    text = embed_words(t, "text_embeddings.", ids)
    every = np.ones(cubes.shape[:2], bool)
    pooled = words | pool_padding

    def encode(x: Rows, keys: Bool[np.ndarray, "b n"]) -> Rows:
        return norm(t, "encoder.norm", run_blocks(t, VIDEOMAE.encoder, x, heads, hide(keys)), 1e-6)

    def fuse(cubes: Rows) -> Float64[np.ndarray, "b all d"]:
        return encode(np.concatenate([cubes, text], 1), np.concatenate([every, words], 1))

    joint = fuse(cubes)
    pairs = [joint] if negatives is None else [joint, fuse(cubes[negatives])]
    everywhere = np.concatenate([every, pooled], 1)
    k = cubes.shape[1]
    return {
        "pixels": decode(t, VIDEOMAE, joint[:, :k], mask, decoder_heads),
        "words": linear(t, "text_cls", joint[:, k:]),
        "video": encode(cubes, every).mean(1),
        "text": mean(encode(text, words), pooled),
        "match": linear(t, "vtm_head", np.concatenate([mean(x, everywhere) for x in pairs])),
    }


def finetune(
    t: Tensors,
    video: Float[np.ndarray, "b 3 t h w"],
    ids: Int[np.ndarray, "b l"],
    attention_mask: Mask,
    heads: int,
    pool_padding: bool = True,
) -> Outputs:
    """The two towers that are fine-tuned for retrieval, names of their `module`.

    Every cube is seen. pool_padding: as in `pretrain`.
    -> video "b d" and text "b d", before the cosine.
    """
    words = attention_mask.astype(bool)
    x = embed_video(t, "video_encoder.patch_embed.proj", video)
    x = run_blocks(t, Stack("video_encoder.blocks", BEIT, 1e-6), x, heads)
    y = embed_words(t, "text_encoder.text_embeddings.", ids)
    y = run_blocks(t, Stack("text_encoder.blocks", BEIT, 1e-6), y, heads, hide(words))
    return {
        "video": norm(t, "video_encoder.fc_norm", x.mean(1), 1e-6),
        "text": norm(t, "text_encoder.fc_norm", mean(y, words | pool_padding), 1e-6),
    }
