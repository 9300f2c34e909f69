"""A config's batches without its data: for measuring and planning where it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vtp_jax.data import pipeline
from vtp_jax.types import Batch, Spec

# Of the published vocabularies: BERT's, uncased, and CLIP's. Others go by what is asked for.
VOCABULARIES = dict(
    wordpiece=dict(vocab_size=30522, pad_id=0, cls_id=101, sep_id=102, unk_id=100, mask_id=103),
    clip=dict(vocab_size=49408, pad_id=0, cls_id=49406, sep_id=49407),
)
LABELS = 1000  # classes, where nobody can count them


def describe(data: Mapping[str, Any], batch: int) -> tuple[Spec, Mapping[str, Any]]:
    """(shapes and dtypes of a global training batch, facts) as `config.data` tells them, no file
    read. What only the files know, how many words and classes there are, is the published
    vocabulary's number, and LABELS."""
    look, text, train = pipeline.Look(**data["video"]), data.get("text"), data["train"]
    pieces = train.get("pieces", 1)
    several = () if pieces == 1 else (pieces,)
    shown = look.shown if pieces == 1 else (pieces, *look.picture)
    rows = {"video": (shown, "uint8"), "valid": ((), "bool"), "id": ((), "int32")}
    facts: dict[str, Any] = dict(mean=pipeline.MEAN, std=pipeline.STD, labels=0)
    if train.get("label_column") or train.get("label") or train.get("answers"):
        rows["label"], facts["labels"] = ((), "int32"), LABELS
    if text:
        kinds = dict(text="int32", text_mask="bool", maskable="bool")
        rows |= {key: ((*several, text["length"]), kind) for key, kind in kinds.items()}
        size = text.get("vocab_size", 256)
        pieces_of = dict(vocab_size=size, pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4)
        facts |= VOCABULARIES.get(text["kind"], pieces_of)
    return {k: jax.ShapeDtypeStruct((batch, *s), kind) for k, (s, kind) in rows.items()}, facts


def fill(spec: Spec, facts: Mapping[str, Any], seed: int = 0) -> Batch:
    """A batch of noise, numpy: every row valid, captions full, words and classes of those there
    are. The ids of special words may be among the words; no shape or cost depends on them."""
    rng = np.random.default_rng(seed)
    below = dict(video=256, text=facts.get("vocab_size", 1), label=max(facts.get("labels", 0), 1))

    def draw(name: str, x: jax.ShapeDtypeStruct) -> np.ndarray:
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        if name == "id":
            return np.arange(x.shape[0], dtype=x.dtype)
        return rng.integers(0, below.get(name, 2), x.shape).astype(x.dtype)

    return {name: draw(name, x) for name, x in spec.items()}
