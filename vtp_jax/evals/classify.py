"""Recognition, and answers from a list: top-1 and top-5 over a stream, views of a video averaged
after the softmax.

The rule (VideoMAE's test, after TSN and SlowFast): a video's score is the mean over its views of
the softmax over classes; it is right in the top k if its class is among the k largest. A tie goes
to the lower class; a NaN score is never right. Rows that could not be read or have no class are
left out and counted; a class that the head does not have, such as an answer outside the list, is
wrong and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from vtp_jax import evals
from vtp_jax.types import Batch, Evaluator, State, Stream, UserError, wide

NEVER = np.iinfo(np.int64).max  # the place of a class that is right in no top k


def make(
    *,
    encode: Mapping[str, Callable[..., Mapping[str, Any]]],
    streams: Mapping[str, Stream],
    mesh: Mesh,
    check: evals.Check = evals.unchecked,
    stream: str = "val",
    classes: str = "classes",
    ks: Sequence[int] = (1, 5),
) -> Evaluator:
    """Recognition of the videos of `stream` by `encode[classes]`, which returns `score` f32 "b c";
    with classes="answer", the answers to its questions.

    Yields top<k> (fractions in [0, 1]), class_mean (the mean over the classes that occur and have a
    score of their own top-1); n_videos or n_questions: the rows that count, n_outside: those of
    them whose class has no score, n_views, n_left_out: the other rows, and n_unlabelled: those of
    them that have no class but could be read.
    """
    evals.need("classify", streams, stream)
    questions = classes == "answer"
    asked = "questions" if questions else "videos"
    what = f"{'answers to' if questions else 'recognition of'} the {streams[stream].rows} {asked}"
    outsiders = f"{'Answers outside the list' if questions else 'Classes without a score'} are"
    scores = scorer(evals.verb("classify", encode, classes, "score"), mesh)
    check("classify", scores, stream)

    def run(state: State) -> Iterator[tuple[str, float]]:
        kept, views = [], 1
        for batch, found in evals.over("classify", streams, stream, scores, state, mesh):
            if np.ndim(batch["video"]) == 6:
                views = batch["video"].shape[1]
            kept.append(found)
        label, known, bare, score = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        if not known.any():
            raise UserError(f"classify: no row of '{stream}' could be read and has a class")
        label, score, rows = label[known], score[known], float(known.sum())
        place, outside = rank(score, label), label >= score.shape[1]
        for k in ks:
            yield f"top{k}", float(np.mean(place < k))
        each = [np.mean(place[label == c] < 1) for c in np.unique(label[~outside])]
        yield "class_mean", float(np.mean(each or [0.0]))
        yield f"n_{asked}", rows
        yield "n_outside", float(outside.sum())
        yield "n_views", float(views)
        yield "n_left_out", streams[stream].rows - rows
        yield "n_unlabelled", float(bare.sum())

    protocol = (
        f"{what} of '{stream}' by encode '{classes}': softmax averaged over the views of a video, "
        "then the k largest; ties to the lower class. topN and class_mean are fractions in [0, 1]. "
        f"{outsiders} wrong and counted (n_outside); {asked} that are unreadable or have no "
        f"{'answer' if questions else 'class'} are left out and counted."
    )
    return Evaluator(run, protocol)


def scorer(encode: Callable[..., Mapping[str, Any]], mesh: Mesh) -> Callable[..., Any]:
    """(params, extra, batch) -> (label, whether it counts, whether it is readable without a class,
    score), replicated on all devices."""

    def f(params: Any, extra: Any, batch: Batch) -> tuple[Array, Array, Array, Array]:
        valid, label = batch["valid"], batch["label"]
        score = mean_score(encode, params, extra, batch)
        return label, valid & (label >= 0), valid & (label < 0), score

    return evals.jitted(f, mesh)


def mean_score(
    encode: Callable[..., Mapping[str, Any]], params: Any, extra: Any, batch: Batch
) -> Float[Array, "b c"]:
    """The scores of "b t h w c", or the mean of those of "b v t h w c", one view at a time."""
    video = batch["video"]
    if video.ndim == 5:
        return encode(params, extra, batch)["score"]
    views = jax.lax.map(
        lambda view: encode(params, extra, {**batch, "video": view})["score"],
        jnp.moveaxis(video, 1, 0),
    )
    return wide(views).mean(axis=0)


def rank(score: Float[np.ndarray, "n c"], label: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """The number of classes that come before the true one; NEVER if its score is NaN or there is no
    such class."""
    n, c = score.shape
    own = score[np.arange(n), np.minimum(label, c - 1)][:, None]
    before = ~(score <= own)  # a NaN score comes first
    tied = (score == own) & (np.arange(c) < label[:, None])
    return np.where((label < c) & ~np.isnan(own[:, 0]), (before | tied).sum(axis=1), NEVER)
