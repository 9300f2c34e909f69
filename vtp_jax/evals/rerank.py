"""Retrieval both ways with re-ranking: the k best by cosine are sorted again by the score of the
pair, as ALBEF, BLIP and their followers report it.

The rule: a query's k best by cosine are ranked by `encode[pair]`, ties by cosine; all others keep
the rank that cosine gives. t2v is the rank of the caption's own video, v2t that of the video's best
caption. A NaN score ranks last, and is in no R@k. Each video and each caption is encoded once;
pairs are scored in blocks of one size, the rows of a block distributed over the mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vtp_jax import evals
from vtp_jax.evals import retrieval
from vtp_jax.run import sharding
from vtp_jax.types import Batch, Evaluator, State, Stream, UserError

READ = ("embedding", "memory", "mask")  # the keys of an Encoded that are kept


class Gallery(NamedTuple):
    """Rows that could be read, on the host."""

    id: Int[np.ndarray, "n"]
    encoded: Mapping[str, Any]  # arrays, rows first; the keys of READ that the method returns


def make(
    *,
    encode: Mapping[str, Callable[..., Mapping[str, Any]]],
    streams: Mapping[str, Stream],
    mesh: Mesh,
    check: evals.Check = evals.unchecked,
    stream: str = "val",
    video: str = "video",
    text: str = "text",
    pair: str = "pair",
    k: int = 128,
    ks: Sequence[int] = (1, 5, 10),
    block: int = 256,
) -> Evaluator:
    """Retrieval on `stream` and `<stream>/captions`, named as in evals.retrieval, by `encode[pair]`
    among the k best of each query. Yields t2v_* and v2t_* as evals.retrieval does, n_videos,
    n_captions, n_videos_left_out and n_captions_left_out. block: pairs scored at a time. Holds the
    `memory` of all rows on the host.
    """
    of_video, of_text = (
        describer(evals.verb("rerank", encode, name, "embedding", "memory"), mesh)
        for name in (video, text)
    )
    join = evals.verb("rerank", encode, pair, "score")
    score = evals.jitted(lambda *a: join(*a)["score"].astype(jnp.float32), mesh)
    sharding.check_rows({"rerank.block": block}, mesh)
    captions = retrieval.captions_of(streams, stream)
    check("rerank", of_video, stream)
    check("rerank", of_text, captions)

    def first(params: Any, extra: Any, *batches: Batch) -> Any:
        """The scores of a block of pairs, all of the first video and the first text."""
        both = [f(params, extra, b)[2] for f, b in zip((of_video, of_text), batches, strict=True)]
        return score(params, extra, *rows(both, jnp.zeros(block, jnp.int32)))

    check("rerank", first, stream, captions)

    def run(state: State) -> Iterator[tuple[str, float]]:
        videos = gather(streams, stream, of_video, state, mesh)
        texts = gather(streams, captions, of_text, state, mesh)
        owner = retrieval.owners(texts.id, videos.id, stream)
        known = owner >= 0
        texts, owner = Gallery(texts.id[known], rows(texts.encoded, known)), owner[known]

        def scored(a: Int[np.ndarray, "p"], b: Int[np.ndarray, "p"]) -> Float[np.ndarray, "p"]:
            return score_pairs(score, state, mesh, videos.encoded, texts.encoded, (a, b), block)

        asking, found = texts.encoded["embedding"], videos.encoded["embedding"]
        cosine, best = retrieval.top(asking, found, k)
        scores = scored(best.reshape(-1), np.repeat(np.arange(len(best)), best.shape[1]))
        own = (best == owner[:, None]) & np.isfinite(cosine)
        t2v = place(scores.reshape(best.shape), own)
        before = retrieval.rank(asking, found, owner)
        t2v = np.where(own.any(axis=1), t2v, before.t2v)

        cosine, best = retrieval.top(found, asking, k)
        scores = scored(np.repeat(np.arange(len(best)), best.shape[1]), best.reshape(-1))
        own = (owner[best] == np.arange(len(best))[:, None]) & np.isfinite(cosine)
        asked = np.isin(np.arange(len(best)), owner)
        v2t = place(scores.reshape(best.shape), own)[asked]
        v2t = np.where(own.any(axis=1)[asked], v2t, before.v2t)

        yield from retrieval.summarise("t2v", t2v, ks, len(videos.id)).items()
        yield from retrieval.summarise("v2t", v2t, ks, len(texts.id)).items()
        yield "n_videos", float(len(videos.id))
        yield "n_captions", float(len(texts.id))
        yield "n_videos_left_out", float(streams[stream].rows - len(videos.id))
        yield "n_captions_left_out", float(streams[captions].rows - len(texts.id))

    protocol = (
        f"retrieval, re-ranked: {streams[stream].rows} videos of '{stream}' and "
        f"{streams[captions].rows} captions of '{captions}'; the {k} best of each query by cosine "
        f"(encode '{video}', '{text}') in the order of encode '{pair}', the others after them by "
        "cosine. rN is a fraction in [0, 1], mdr and mnr count from 1, gmean is over r1, r5, r10. "
        "Unreadable videos and their captions are left out and counted."
    )
    return Evaluator(run, protocol)


def describer(encode: Callable[..., Mapping[str, Any]], mesh: Mesh) -> Callable[..., Any]:
    """(params, extra, batch) -> (id, valid, the keys READ of its Encoded), replicated on every
    device."""

    def f(params: Any, extra: Any, batch: Batch) -> Any:
        if "video" in batch and batch["video"].ndim == 6:
            raise UserError("rerank: one clip of each video; set config.data.video.views=None")
        found = encode(params, extra, batch)
        return batch["id"], batch["valid"], {name: found[name] for name in READ if name in found}

    return evals.jitted(f, mesh)


def gather(
    streams: Mapping[str, Stream],
    name: str,
    describe: Callable[..., Any],
    state: State,
    mesh: Mesh,
) -> Gallery:
    """Encodes every valid row of a stream."""
    kept = []
    for _, (ids, valid, found) in evals.over("rerank", streams, name, describe, state, mesh):
        kept.append((ids[valid], rows(found, valid)))
    ids, encoded = (
        jax.tree.map(lambda *x: np.concatenate(x), *part) for part in zip(*kept, strict=True)
    )
    if not len(ids):
        raise UserError("rerank: the stream has no row that could be read; check the data")
    return Gallery(ids, encoded)


def rows(encoded: Any, which: Any) -> Any:
    return jax.tree.map(lambda x: x[which], encoded)


def score_pairs(
    score: Callable[..., Any],
    state: State,
    mesh: Mesh,
    videos: Mapping[str, Any],
    texts: Mapping[str, Any],
    pairs: tuple[Int[np.ndarray, "p"], Int[np.ndarray, "p"]],
    block: int,
) -> Float[np.ndarray, "p"]:
    """Scores of (video, text) pairs by their positions; the last block is padded with pairs of the
    first rows."""
    count = len(pairs[0])
    a, b = (np.pad(x, (0, -count % block)).reshape(-1, block) for x in pairs)
    found = []
    with sharding.activate(mesh):
        for i, j in zip(a, b, strict=True):
            placed = [
                jax.device_put(rows(encoded, which), sharding.batch_sharding(mesh))
                for encoded, which in ((videos, i), (texts, j))
            ]
            found.append(jax.device_get(score(state.params, state.extra, *placed)))
    return np.concatenate(found)[:count]


def place(scores: Float[np.ndarray, "m k"], own: Any) -> Float[np.ndarray, "m"]:
    """The rank, from 0, of the best of a query's own among its k best, sorted by score; inf if the
    scores of its own are NaN. The k come in the order of their cosines, which decides ties."""
    unknown = np.isnan(scores)
    order = np.argsort(-np.where(unknown, -np.inf, scores), axis=1, kind="stable")
    own = np.take_along_axis(own & ~unknown, order, axis=1)
    return np.where(own.any(axis=1), np.argmax(own, axis=1), np.inf)
