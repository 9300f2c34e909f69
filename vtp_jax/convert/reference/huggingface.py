"""Hugging Face's VideoMAE, compared with transformers 5.23.0; tensor names of versions 4 and 5."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from vtp_jax.convert.reference.parts import (
    Names,
    Outputs,
    Stack,
    Tensors,
    linear,
    norm,
    run_blocks,
)
from vtp_jax.convert.reference.videomae import Autoencoder, embed_video, reconstruct

INNER = "attention.attention."
V5 = Names(
    "layernorm_before", tuple(f"{INNER}{x}.weight" for x in ("query", "key", "value")),
    (f"{INNER}query.bias", None, f"{INNER}value.bias"), "attention.output.dense",
    "layernorm_after", "intermediate.dense", "output.dense",
)  # fmt: skip
V4 = V5._replace(bias=(f"{INNER}q_bias", None, f"{INNER}v_bias"))


def _stack(t: Tensors, prefix: str, eps: float) -> Stack:
    """The blocks, under either naming of the two biases: separate parameters (v4), or biases of
    layers (v5)."""
    return Stack(prefix, V4 if f"{prefix}.0.{V4.bias[0]}" in t else V5, eps)


def pretrain(
    t: Tensors,
    video: Float[np.ndarray, "b t 3 h w"],
    mask: Bool[np.ndarray, "b n"],
    heads: int,
    decoder_heads: int,
    eps: float = 1e-12,
) -> Outputs:
    """`transformers.VideoMAEForPreTraining`, which takes frames before channels.

    eps: `layer_norm_eps` of its config; the decoder's last norm always has 1e-5. A net whose config
    averages tokens has no norm after the encoder. -> as `videomae.pretrain`.
    """
    last = "videomae.layernorm"
    net = Autoencoder(
        "videomae.embeddings.patch_embeddings.projection",
        _stack(t, "videomae.encoder.layer", eps),
        last if f"{last}.weight" in t else None,
        _stack(t, "decoder.decoder_layers", eps),
        1e-5,
    )
    return reconstruct(t, net, video.swapaxes(1, 2), mask, heads, decoder_heads)


def classify(
    t: Tensors, video: Float[np.ndarray, "b t 3 h w"], heads: int, eps: float = 1e-12
) -> Outputs:
    """`transformers.VideoMAEForVideoClassification`.

    With `fc_norm` (epsilon always 1e-5) tokens are averaged; without it the first token is taken
    after `videomae.layernorm`. -> as `videomae.classify`.
    """
    x = embed_video(t, "videomae.embeddings.patch_embeddings.projection", video.swapaxes(1, 2))
    x = run_blocks(t, _stack(t, "videomae.encoder.layer", eps), x, heads)
    if "fc_norm.weight" in t:
        pooled = norm(t, "fc_norm", x.mean(1), 1e-5)
    else:
        pooled = norm(t, "videomae.layernorm", x[:, 0], eps)
    return {"raw": x, "pooled": pooled, "logits": linear(t, "classifier", pooled)}
