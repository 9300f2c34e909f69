"""Video-text matching against hard wrong pairs (ALBEF, arXiv 2107.07651, section 3.2; BLIP).

A net that reads a video and a text together classifies a row's own pair, its text with a wrong
video, and its video with a wrong text.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtp_jax import masking
from vtp_jax.objectives import classification
from vtp_jax.types import Mean

V = TypeVar("V")
T = TypeVar("T")


class Wrong(NamedTuple):
    """The wrong partners of every row."""

    video: Int[Array, " b"]  # whose video goes with the row's text
    text: Int[Array, " b"]  # whose text goes with the row's video
    asked: Bool[Array, " b"]  # the row has wrong partners


def hard(
    rngs: tuple[Array, Array],
    alike: tuple[Float[Array, "b b"], Float[Array, "b b"]],
    allowed: Bool[Array, "b b"],
) -> Wrong:
    """Draws a wrong video and a wrong text for every row, the likelier the more alike they are; see
    `masking.hard_negatives`.

    rngs: for videos and for texts. alike: logits of contrast from videos to texts and from texts to
    videos. allowed: which rows may be a row's wrong partners.
    """
    return Wrong(
        video=masking.hard_negatives(rngs[0], alike[1], allowed),
        text=masking.hard_negatives(rngs[1], alike[0], allowed),
        asked=allowed.any(axis=1),
    )


def triples(wrong: Wrong, video: V, text: T) -> tuple[V, T]:
    """Videos and texts of 3b pairs: each row's own, its text with a wrong video, its video with a
    wrong text. video, text: arrays or trees of them, rows "b ..." first."""

    def rows(tree: Any, *parts: Array | None) -> Any:
        return jax.tree.map(
            lambda x: jnp.concatenate([x if i is None else x[i] for i in parts]), tree
        )

    return rows(video, None, wrong.video, None), rows(text, None, None, wrong.text)


def scored(logits: Float[Array, "p 2"], asked: Bool[Array, " b"]) -> tuple[Mean, Mean]:
    """Cross-entropy and accuracy of logits (wrong, right) of the p = 3b pairs of `triples`, over
    the rows that have wrong partners."""
    b = asked.shape[0]
    label = (jnp.arange(3 * b) < b).astype(jnp.int32)
    return classification.scored(logits, label, jnp.tile(asked, 3))
