"""CLIP's towers (openai/CLIP, names of its state dict; OpenCLIP with a ViT)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from vtp_jax.convert.reference.parts import (
    ACTS,
    Act,
    Names,
    Outputs,
    Stack,
    Tensors,
    embed_cubes,
    norm,
    read,
    run_blocks,
)

CLIP = Names(
    "ln_1", ("attn.in_proj_weight",), ("attn.in_proj_bias",), "attn.out_proj",
    "ln_2", "mlp.c_fc", "mlp.c_proj",
)  # fmt: skip


def image(t: Tensors, image: Float[np.ndarray, "b 3 h w"], heads: int, act: Act) -> Outputs:
    """The image tower, a ViT with a class token.

    act: "quick_gelu" for OpenAI's weights and OpenCLIP's of that name, otherwise "gelu".
    -> raw "b 1+n d", the last block's output; tokens "b 1+n d" after `ln_post`; embedding "b e" of
    the class token, not normalised.
    """
    x = embed_cubes(t, "visual.conv1", image[:, :, None])
    first = np.broadcast_to(read(t, "visual.class_embedding"), (len(x), 1, x.shape[2]))
    x = np.concatenate([first, x], 1) + read(t, "visual.positional_embedding")
    stack = Stack("visual.transformer.resblocks", CLIP, 1e-5, ACTS[act])
    raw = run_blocks(t, stack, norm(t, "visual.ln_pre", x, 1e-5), heads)
    tokens = norm(t, "visual.ln_post", raw, 1e-5)
    return {"raw": raw, "tokens": tokens, "embedding": tokens[:, 0] @ read(t, "visual.proj")}


def text(t: Tensors, ids: Int[np.ndarray, "b l"], heads: int, act: Act) -> Outputs:
    """The text tower; OpenCLIP's names may begin with `text.`.

    A word attends to itself and to those before it. The embedding is taken at the largest id, which
    is the end of the text. act: as in `image`.
    -> raw "b l d"; tokens "b l d" after `ln_final`; embedding "b e", not normalised.
    """
    p = "text." if "text.token_embedding.weight" in t else ""
    length = ids.shape[1]
    x = read(t, f"{p}token_embedding.weight")[ids] + read(t, f"{p}positional_embedding")[:length]
    future = np.triu(np.full((length, length), -np.inf), 1)
    stack = Stack(f"{p}transformer.resblocks", CLIP, 1e-5, ACTS[act])
    raw = run_blocks(t, stack, x, heads, future)
    tokens = norm(t, f"{p}ln_final", raw, 1e-5)
    last = tokens[np.arange(len(ids)), ids.argmax(1)]
    return {"raw": raw, "tokens": tokens, "embedding": last @ read(t, f"{p}text_projection")}
