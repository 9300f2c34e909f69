"""The official TVTSv2 (TencentARC/TVTS @290a63e, folder v2), with its sorter."""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from vtp_jax.convert.reference import clip
from vtp_jax.convert.reference.parts import (
    ACTS,
    Act,
    Outputs,
    Stack,
    Tensors,
    attend,
    count,
    embed_cubes,
    linear,
    norm,
    read,
    run_blocks,
    take,
)
from vtp_jax.convert.reference.timm import TIMM

SPACE = clip.CLIP._replace(qkv=("attn.qkv.weight",), bias=("attn.qkv.bias",), proj="attn.proj")
TIME = SPACE._replace(
    qkv=("timeattn.qkv.weight",), bias=("timeattn.qkv.bias",), proj="timeattn.proj"
)


def apart(group: Int[np.ndarray, "n"]) -> Float64[np.ndarray, "m m"]:
    """Added to scores, so that each token attends only to the first one and to its own group, and
    the first one to all."""
    seen = np.pad(group[:, None] == group, ((1, 0), (1, 0)), constant_values=True)
    return np.where(seen, 0.0, -np.inf)


def pretrain(
    t: Tensors,
    video: Float[np.ndarray, "b 3 t h w"],
    keep: Bool[np.ndarray, "b s"],
    ids: Int[np.ndarray, "b k l"],
    heads: int,
    decoder_heads: int,
    text_heads: int,
    act: Act,
    normed: bool,
) -> Outputs:
    """The whole net.

    keep: the visible places of a frame, the same in all frames. decoder_heads: the sorter's.
    normed: True for B/16 and B/32; H/14 projects the patches without `ln_post`, and sorts without
    the class token.
    -> video "b n e", class token first; texts "b k e"; turns "b k c".
    """
    b, frames = len(video), video.shape[2]
    x = embed_cubes(t, "video_model.conv1", video)
    place = read(t, "video_model.positional_embedding")
    time = read(t, "video_model.temporal_embedding")[:frames].repeat(keep.shape[1], 0)
    x = take(x + np.tile(place[1:], (frames, 1)) + time, np.tile(keep, (1, frames)))
    first = np.broadcast_to(read(t, "video_model.class_embedding") + place[0], (b, 1, x.shape[2]))
    x = norm(t, "video_model.ln_pre", np.concatenate([first, x], 1), 1e-5)
    frame, spot = np.divmod(np.arange(x.shape[1] - 1), (x.shape[1] - 1) // frames)
    prefix = "video_model.transformer.resblocks"
    for i in range(count(t, prefix)):
        block = f"{prefix}.{i}."
        past = norm(t, f"{block}ln_3", x, 1e-5)
        past = norm(t, f"{block}ln_1", x + attend(t, block, TIME, past, heads, apart(spot)), 1e-5)
        x = x + attend(t, block, SPACE, past, heads, apart(frame))
        hidden = ACTS[act](linear(t, f"{block}mlp.c_fc", norm(t, f"{block}ln_2", x, 1e-5)))
        x = x + linear(t, f"{block}mlp.c_proj", hidden)
    end = norm(t, "video_model.ln_post", x, 1e-5)
    tokens = end if normed else np.concatenate([end[:, :1], x[:, 1:]], 1)
    tokens = tokens @ read(t, "video_model.proj")

    # Without these prefixes the text tower's names are CLIP's.
    front = re.compile("text_(?=token|positional|ln_final)")
    renamed = {front.sub("", n).replace("text_model.", "transformer."): x for n, x in t.items()}
    texts = clip.text(renamed, ids.reshape(-1, ids.shape[-1]), text_heads, act)["embedding"]
    texts = texts.reshape(*ids.shape[:2], -1)

    kind = read(t, "pred_model.type_embed")[0]
    x = np.concatenate([(tokens if normed else tokens[:, 1:]) + kind[0], texts + kind[1]], 1)
    x = run_blocks(t, Stack("pred_model.blocks", TIMM, 1e-6), x, decoder_heads)
    x = norm(t, "pred_model.norm", x[:, -ids.shape[1] :], 1e-6)
    return {"video": tokens, "texts": texts, "turns": linear(t, "pred_model.head", x)}
