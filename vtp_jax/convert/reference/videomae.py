"""The official VideoMAE and VideoMAE V2 (MCG-NJU/VideoMAE @14ef8d8): `parts` explains the axes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

from vtp_jax.convert.reference.parts import (
    Names,
    Outputs,
    Rows,
    Stack,
    Tensors,
    embed_cubes,
    linear,
    norm,
    read,
    run_blocks,
    take,
)

BEIT = Names(
    "norm1", ("attn.qkv.weight",), ("attn.q_bias", None, "attn.v_bias"), "attn.proj",
    "norm2", "mlp.fc1", "mlp.fc2",
)  # fmt: skip


class Autoencoder(NamedTuple):
    """The names of VideoMAE's pretraining net in some format, with its epsilons."""

    embed: str
    encoder: Stack
    encoder_norm: str | None
    decoder: Stack
    decoder_norm_eps: float


VIDEOMAE = Autoencoder(
    "encoder.patch_embed.proj",
    Stack("encoder.blocks", BEIT, 1e-6),
    "encoder.norm",
    Stack("decoder.blocks", BEIT, 1e-6),
    1e-6,
)


def sinusoids(n: int, d: int) -> Float64[np.ndarray, "n d"]:
    """The fixed position table: sines in even columns, cosines in odd ones, rounded to fp32."""
    column = np.arange(d)
    angle = np.arange(n)[:, None] / np.power(10000, 2 * (column // 2) / d)
    return np.where(column % 2, np.cos(angle), np.sin(angle)).astype(np.float32).astype(np.float64)


def embed_video(t: Tensors, name: str, video: Float[np.ndarray, "b c t h w"]) -> Rows:
    """Cubes, with their positions added."""
    x = embed_cubes(t, name, video) + read(t, f"{name}.bias")
    return x + sinusoids(*x.shape[1:])


def decode(
    t: Tensors, net: Autoencoder, seen: Rows, hidden: Bool[np.ndarray, "b m"], heads: int
) -> Float64[np.ndarray, "b drop p"]:
    """Pixels of the hidden cubes from the encoder's tokens of the visible ones."""
    x = seen @ read(t, "encoder_to_decoder.weight").T
    table = np.broadcast_to(sinusoids(hidden.shape[1], x.shape[2]), (*hidden.shape, x.shape[2]))
    fill = read(t, "mask_token").reshape(-1) + take(table, hidden)
    x = run_blocks(t, net.decoder, np.concatenate([x + take(table, ~hidden), fill], 1), heads)
    return linear(
        t, "decoder.head", norm(t, "decoder.norm", x[:, seen.shape[1] :], net.decoder_norm_eps)
    )


def reconstruct(
    t: Tensors,
    net: Autoencoder,
    video: Float[np.ndarray, "b c t h w"],
    mask: Bool[np.ndarray, "b n"],
    heads: int,
    decoder_heads: int,
) -> Outputs:
    x = run_blocks(t, net.encoder, take(embed_video(t, net.embed, video), ~mask), heads)
    if net.encoder_norm:
        x = norm(t, net.encoder_norm, x, net.encoder.eps)
    return {"tokens": x, "pixels": decode(t, net, x, mask, decoder_heads)}


def pretrain(
    t: Tensors,
    video: Float[np.ndarray, "b 3 t h w"],
    mask: Bool[np.ndarray, "b n"],
    heads: int,
    decoder_heads: int,
) -> Outputs:
    """The pretraining net, names of its `model`.

    video: normalised pixels; t, h and w are multiples of the cube. mask: True = hidden, the same
    number in every row.
    -> tokens "b k d" after the encoder's norm; pixels "b n-k p", p = (t h w c) of a hidden cube.
    """
    return reconstruct(t, VIDEOMAE, video, mask, heads, decoder_heads)


def classify(t: Tensors, video: Float[np.ndarray, "b 3 t h w"], heads: int) -> Outputs:
    """The fine-tuned classifier: blocks, mean, `fc_norm`, `head`.

    -> raw "b n d", the last block's output; pooled "b d"; logits "b classes".
    """
    x = embed_video(t, "patch_embed.proj", video)
    x = run_blocks(t, Stack("blocks", BEIT, 1e-6), x, heads)
    pooled = norm(t, "fc_norm", x.mean(1), 1e-6)
    return {"raw": x, "pooled": pooled, "logits": linear(t, "head", pooled)}
