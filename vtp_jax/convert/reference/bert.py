"""BERT's embedding module (google-research/bert; `transformers` @5.23.0)."""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Int

from vtp_jax.convert.reference.parts import Rows, Tensors, norm, read
from vtp_jax.types import UserError


def embeddings(t: Tensors, ids: Int[np.ndarray, "b l"]) -> Rows:
    """Words, positions and the first segment, normed.

    Names may have any prefix, such as `bert.embeddings.`; files of 2018 have `LayerNorm.gamma` and
    `.beta`. eps 1e-12. The row of [PAD] is added like any other.
    """
    table = "word_embeddings.weight"
    prefixes = [name.removesuffix(table) for name in t if name.endswith(table)]
    if len(prefixes) != 1:
        raise UserError(f"one tensor *{table} is needed, not {len(prefixes)}")
    new = {".gamma": ".weight", ".beta": ".bias"}
    t = {re.sub(r"\.(gamma|beta)$", lambda m: new[m[0]], name): x for name, x in t.items()}
    return embed_words(t, prefixes[0], ids)


def embed_words(t: Tensors, prefix: str, ids: Int[np.ndarray, "b l"]) -> Rows:
    words, places, segments = (
        read(t, f"{prefix}{table}_embeddings.weight")
        for table in ("word", "position", "token_type")
    )
    x = words[ids] + places[: ids.shape[1]] + segments[0]
    return norm(t, f"{prefix}LayerNorm", x, 1e-12)
