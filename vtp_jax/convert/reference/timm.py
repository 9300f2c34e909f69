"""Nets for images in timm's names: ViT (timm 1.0) and MAE (facebookresearch/mae)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from vtp_jax.convert.reference.parts import (
    Names,
    Outputs,
    Stack,
    Tensors,
    embed_cubes,
    linear,
    norm,
    read,
    run_blocks,
)

TIMM = Names(
    "norm1", ("attn.qkv.weight",), ("attn.qkv.bias",), "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"
)


def vit(t: Tensors, image: Float[np.ndarray, "b c h w"], heads: int, eps: float = 1e-6) -> Outputs:
    """A ViT with a class token (timm's; fine-tuned MAE and DeiT have the same names).

    With `fc_norm`, the head reads the mean of the patches after it; otherwise the class token after
    `norm`. `pos_embed` may or may not have a row for the class token. With `norm_pre` the cubes
    have no bias. `head` is optional. Layer scale, distillation tokens, registers and attention
    pooling are not supported.
    -> raw "b 1+n d", the last block's output; tokens, the same after `norm` if there is one;
    pooled "b d"; logits "b classes" with a head.
    """
    x = embed_cubes(t, "patch_embed.proj", image[:, :, None])
    normed = "norm_pre.weight" in t
    if not normed:
        x = x + read(t, "patch_embed.proj.bias")
    first = np.broadcast_to(read(t, "cls_token"), (len(x), 1, x.shape[2]))
    places = read(t, "pos_embed")
    if places.shape[1] == x.shape[1]:
        x = np.concatenate([first, x + places], 1)
    else:
        x = np.concatenate([first, x], 1) + places
    if normed:
        x = norm(t, "norm_pre", x, eps)
    out = {"raw": run_blocks(t, Stack("blocks", TIMM, eps), x, heads)}
    if "fc_norm.weight" in t:
        out["tokens"] = out["raw"]
        out["pooled"] = norm(t, "fc_norm", out["raw"][:, 1:].mean(1), eps)
    else:
        out["tokens"] = norm(t, "norm", out["raw"], eps)
        out["pooled"] = out["tokens"][:, 0]
    if "head.weight" in t:
        out["logits"] = linear(t, "head", out["pooled"])
    return out


def mae(
    t: Tensors,
    image: Float[np.ndarray, "b 3 h w"],
    keep: Int[np.ndarray, "b k"],
    heads: int,
    decoder_heads: int,
    eps: float = 1e-6,
) -> Outputs:
    """MAE's pretraining net, names of its `model`.

    keep: indices of the visible patches, in the order in which the encoder receives them.
    -> tokens "b 1+k d", class token first, after the encoder's norm; pixels "b n p" of all patches
    in the order of the image, p = (h w c).
    """
    rows = np.arange(len(keep))[:, None]
    places = read(t, "pos_embed")
    x = embed_cubes(t, "patch_embed.proj", image[:, :, None]) + read(t, "patch_embed.proj.bias")
    b, n, d = x.shape
    x = (x + places[:, 1:])[rows, keep]
    x = np.concatenate([np.broadcast_to(read(t, "cls_token") + places[:, :1], (b, 1, d)), x], 1)
    tokens = norm(t, "norm", run_blocks(t, Stack("blocks", TIMM, eps), x, heads), eps)

    x = linear(t, "decoder_embed", tokens)
    full = np.tile(read(t, "mask_token"), (b, 1 + n, 1))
    full[:, 0] = x[:, 0]
    full[rows, 1 + keep] = x[:, 1:]
    full = full + read(t, "decoder_pos_embed")
    full = run_blocks(t, Stack("decoder_blocks", TIMM, eps), full, decoder_heads)
    full = norm(t, "decoder_norm", full[:, 1:], eps)
    return {"tokens": tokens, "pixels": linear(t, "decoder_pred", full)}
