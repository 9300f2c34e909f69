"""Synthetic batches of a config, for measuring on machines without its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vtp_jax.types import Batch, Spec

LABELS = 1000  # number of classes where only the files define it


def fill(spec: Spec, facts: Mapping[str, Any], seed: int = 0) -> Batch:
    """A batch of noise, numpy: every row valid, captions of full length, words and classes below
    the numbers that `data.outline.describe` returns. Special words may occur among the words; no
    shape or cost depends on them."""
    rng = np.random.default_rng(seed)
    labels = facts.get("labels", LABELS)
    below = dict(video=256, text=facts.get("vocab_size", 1), label=max(labels, 1))

    def draw(name: str, x: jax.ShapeDtypeStruct) -> np.ndarray:
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        if name == "id":
            return np.arange(x.shape[0], dtype=x.dtype)
        return rng.integers(0, below.get(name, 2), x.shape).astype(x.dtype)

    return {name: draw(name, x) for name, x in spec.items()}
