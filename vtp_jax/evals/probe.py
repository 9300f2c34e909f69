"""How well embeddings separate classes, without training: classification by nearest neighbours.

The rule (Wu et al., arXiv 1805.01978; DINO's evaluation, 2104.14294): the k rows of the gallery
with the largest cosine vote for their classes, each with the weight exp(cosine / 0.07); a tie goes
to the lower class. If the gallery is the stream itself, a row is no neighbour of its own. A row
whose embedding is not finite has no vote, and is never right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from vtp_jax import evals
from vtp_jax.evals import retrieval
from vtp_jax.types import Batch, Evaluator, State, Stream, UserError

TEMPERATURE = 0.07


def make(
    *,
    encode: Mapping[str, Callable[..., Mapping[str, Any]]],
    streams: Mapping[str, Stream],
    mesh: Mesh,
    check: evals.Check = evals.unchecked,
    stream: str = "val",
    gallery: str | None = None,
    video: str = "video",
    ks: Sequence[int] = (1, 20),
    block: int = retrieval.BLOCK,
) -> Evaluator:
    """The classes of the videos of `stream` from those of `gallery`, or from the others of `stream`
    if there is none, by `encode[video]`, which returns `embedding` f32 "b d".

    Yields knn<k> (fractions in [0, 1]), chance (the share of the gallery's largest class in
    `stream`), n_videos, n_gallery and n_left_out. Rows that could not be read or have no class are
    left out and counted.
    """
    gallery = gallery or stream
    evals.need("probe", streams, stream, gallery)
    embed = embedder(evals.verb("probe", encode, video, "embedding"), mesh)
    check("probe", embed, stream)
    check("probe", embed, gallery)

    def run(state: State) -> Iterator[tuple[str, float]]:
        label, query = collect(streams, stream, embed, state, mesh)
        if gallery == stream:
            classes, rows = label, query
        else:
            classes, rows = collect(streams, gallery, embed, state, mesh)
        asks, votes = (np.flatnonzero(~np.isfinite(x).all(axis=1)) for x in (query, rows))
        query, rows = (np.nan_to_num(x, posinf=0, neginf=0) for x in (query, rows))
        found, score = neighbours(query, rows, max(ks), gallery == stream, block)
        silent = np.isin(found, votes) | np.isin(np.arange(len(found)), asks)[:, None]
        score = np.where(silent, -np.inf, score)
        for k in ks:
            chosen = vote(classes[found[:, :k]], score[:, :k])
            yield f"knn{k}", float(np.mean(chosen == label))
        common = np.bincount(classes).argmax()
        yield "chance", float(np.mean(label == common))
        yield "n_videos", float(len(label))
        yield "n_gallery", float(len(classes))
        yield "n_left_out", float(streams[stream].rows - len(label))

    others = "the others of it" if gallery == stream else f"'{gallery}'"
    protocol = (
        f"classes of the {streams[stream].rows} videos of '{stream}' by their nearest neighbours "
        f"among {others} (encode '{video}', views averaged before normalising): cosine of fp32 "
        f"embeddings, votes weigh exp(cosine / {TEMPERATURE}), ties to the lower class. knnK and "
        "chance are fractions in [0, 1]; unreadable videos are left out and counted."
    )
    return Evaluator(run, protocol)


def embedder(encode: Callable[..., Mapping[str, Any]], mesh: Mesh) -> Callable[..., Any]:
    """(params, extra, batch) -> (label, whether it counts, embedding), whole on every device."""

    def f(params: Any, extra: Any, batch: Batch) -> tuple[Array, Array, Array]:
        label, known = batch["label"], batch["valid"] & (batch["label"] >= 0)
        vector = retrieval.embed_video(encode, params, extra, batch).astype(jnp.float32)
        return label, known, vector

    return evals.jitted(f, mesh)


def collect(
    streams: Mapping[str, Stream], name: str, embed: Callable[..., Any], state: State, mesh: Mesh
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n d"]]:
    """Classes and embeddings of the rows that count."""
    kept = []
    for _, (label, known, vector) in evals.over("probe", streams, name, embed, state, mesh):
        kept.append((label[known], vector[known]))
    label, vector = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    if len(label) < 2:
        raise UserError(f"probe: stream '{name}' has fewer than 2 readable rows with a class")
    return label, vector


def neighbours(
    query: Float[np.ndarray, "m d"],
    rows: Float[np.ndarray, "n d"],
    k: int,
    itself: bool,
    block: int = retrieval.BLOCK,
) -> tuple[Int[np.ndarray, "m k"], Float[np.ndarray, "m k"]]:
    """Positions and cosines of the k nearest rows, descending. itself: query i is row i, which is
    left out. k is limited to the number of rows."""
    if not itself:
        score, found = retrieval.top(query, rows, k, block)
        return found, score
    score, found = retrieval.top(query, rows, k + 1, block)
    # With equal rows, a row may not be first in its own list, or not be in it: then the last goes.
    own = found == np.arange(len(found))[:, None]
    own[~own.any(axis=1), -1] = True
    shape = (len(found), found.shape[1] - 1)
    return found[~own].reshape(shape), score[~own].reshape(shape)


def vote(classes: Int[np.ndarray, "m k"], score: Float[np.ndarray, "m k"]) -> Int[np.ndarray, "m"]:
    """The class with most weight among the neighbours of each row; -1 if no score is finite."""
    ballot = np.zeros((len(classes), int(classes.max()) + 1))
    weight = np.exp(score.astype(np.float64) / TEMPERATURE)  # cosines: below 2 million
    np.add.at(ballot, (np.arange(len(classes))[:, None], classes), weight)
    return np.where(ballot.any(axis=1), ballot.argmax(axis=1), -1)
