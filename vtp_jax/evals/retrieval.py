"""Retrieval both ways: captions find videos (t2v), videos find captions (v2t).

The rule (reference: SimVTP's evaluation, after Collaborative Experts and Frozen in Time):
a video's embedding is the plain mean over its views, not normalised before; scores are cosines.
A rank counts from 0. t2v: the number of other videos that score higher than the caption's own; a
tie goes to the own video (first position). v2t: the position of the best-ranked caption of the
video among all captions; ties are averaged over the tied positions. R@k is the share with rank < k,
MdR and MnR are median and mean of rank + 1, gmean is the geometric mean of R@1, R@5 and R@10.

A NaN score never helps: it ranks before the truth, and a NaN truth is in no R@k and last otherwise.

The array of all pairs is never built: scores are computed in square tiles on one local device and
counted tile by tile. A tile's numbers do not depend on a row's place in it, so that equal
embeddings tie exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from vtp_jax import evals
from vtp_jax.types import Batch, Evaluator, State, Stream, UserError, wide

BLOCK = 1024  # side of a tile of scores: 4 MB of fp32


class Embedded(NamedTuple):
    """Rows that could be read, of every process. A video may have several rows in captions."""

    id: Int[np.ndarray, "n"]
    vector: Float[np.ndarray, "n d"]  # not normalised
    views: int  # views averaged in each row


class Ranks(NamedTuple):
    """Positions of the truth, from 0: halves where ties were averaged, inf where it is NaN."""

    t2v: Float[np.ndarray, "m"]  # one per caption
    v2t: Float[np.ndarray, "q"]  # one per video that has a caption


def make(
    *,
    encode: Mapping[str, Callable[..., Mapping[str, Any]]],
    streams: Mapping[str, Stream],
    mesh: Mesh,
    check: evals.Check = evals.unchecked,
    stream: str = "val",
    video: str = "video",
    text: str = "text",
    ks: Sequence[int] = (1, 5, 10, 50),
    block: int = BLOCK,
) -> Evaluator:
    """Retrieval on the videos of `stream` and the captions of `<stream>/captions`.

    The captions' stream has one row per caption, and `id` is the id of its video; without such a
    stream the captions are those of `stream` itself. `video` and `text` name the encode functions,
    which return `embedding` f32 "b d". Yields t2v_* and v2t_*: r<k> (a fraction in [0, 1]), gmean,
    mdr, mnr; and n_videos, n_captions, n_views, n_videos_left_out, n_captions_left_out. A video
    that could not be read is neither in the gallery nor a query, nor are its captions.
    """
    given = dict(stream=stream, video=video, text=text)
    embed = embedder(encode=encode, streams=streams, mesh=mesh, check=check, **given)
    captions = captions_of(streams, stream)

    def run(state: State) -> Iterator[tuple[str, float]]:
        videos, texts = embed(state)
        owner = owners(texts.id, videos.id, stream)
        known = owner >= 0
        ranks = rank(texts.vector[known], videos.vector, owner[known], block)
        yield from summarise("t2v", ranks.t2v, ks, len(videos.id)).items()
        yield from summarise("v2t", ranks.v2t, ks, int(known.sum())).items()
        yield "n_videos", float(len(videos.id))
        yield "n_captions", float(known.sum())
        yield "n_views", float(videos.views)
        yield "n_videos_left_out", float(streams[stream].rows - len(videos.id))
        yield "n_captions_left_out", float(streams[captions].rows - known.sum())

    protocol = (
        f"retrieval: {streams[stream].rows} videos of '{stream}' (encode '{video}', "
        f"views averaged before normalising), {streams[captions].rows} captions of '{captions}' "
        f"(encode '{text}', one row per caption); cosine of fp32 embeddings, no dual softmax, no "
        "re-ranking. rN is a fraction in [0, 1], mdr and mnr count from 1, gmean is over r1, r5, "
        "r10. Ties: t2v optimistic (first position); v2t averaged over the tied positions, best "
        "caption of a video counts. Unreadable videos and their captions are left out and counted."
    )
    return Evaluator(run, protocol)


def captions_of(streams: Mapping[str, Stream], stream: str) -> str:
    """The name of the stream that has the captions of `stream`."""
    evals.need("retrieval", streams, stream)
    return f"{stream}/captions" if f"{stream}/captions" in streams else stream


def embedder(
    *,
    encode: Mapping[str, Callable[..., Mapping[str, Any]]],
    streams: Mapping[str, Stream],
    mesh: Mesh,
    check: evals.Check = evals.unchecked,
    stream: str,
    video: str = "video",
    text: str = "text",
) -> Callable[[State], tuple[Embedded, Embedded]]:
    """state -> the videos of `stream` and their captions, embedded; each stream is read once."""
    videos_by, texts_by = (
        evals.verb("retrieval", encode, name, "embedding") for name in (video, text)
    )
    captions = captions_of(streams, stream)
    of_video = jitted(lambda *a: embed_video(videos_by, *a), mesh)
    of_text = jitted(lambda *a: texts_by(*a)["embedding"], mesh)
    check("retrieval", of_video, stream)
    check("retrieval", of_text, captions)

    def embed(state: State) -> tuple[Embedded, Embedded]:
        if captions == stream:
            videos, texts = collect(streams, stream, [of_video, of_text], state, mesh)
            return videos, texts
        (videos,) = collect(streams, stream, [of_video], state, mesh)
        (texts,) = collect(streams, captions, [of_text], state, mesh)
        return videos, texts

    return embed


def embed_video(
    encode: Callable[..., Mapping[str, Any]], params: Any, extra: Any, batch: Batch
) -> Float[Array, "b d"]:
    """Embeds "b t h w c", or "b v t h w c" one view at a time and averages the embeddings."""
    video = batch["video"]
    if video.ndim == 5:
        return encode(params, extra, batch)["embedding"]
    views = jax.lax.map(
        lambda view: encode(params, extra, {**batch, "video": view})["embedding"],
        jnp.moveaxis(video, 1, 0),
    )
    return wide(views).mean(axis=0)


def jitted(embed: Callable[..., Float[Array, "b d"]], mesh: Mesh) -> Callable[..., Any]:
    """(params, extra, batch) -> (id, valid, embedding), replicated on all devices."""

    def f(params: Any, extra: Any, batch: Batch) -> tuple[Array, Array, Array]:
        return batch["id"], batch["valid"], embed(params, extra, batch).astype(jnp.float32)

    return evals.jitted(f, mesh)


def collect(
    streams: Mapping[str, Stream],
    name: str,
    embeds: Sequence[Callable[..., Any]],
    state: State,
    mesh: Mesh,
) -> list[Embedded]:
    """Runs each of `embeds` over the stream and keeps the valid rows."""
    kept: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in embeds]
    views = 1

    def each(*args: Any) -> list[Any]:
        return [embed(*args) for embed in embeds]

    for batch, found in evals.over("retrieval", streams, name, each, state, mesh):
        if "video" in batch and np.ndim(batch["video"]) == 6:
            views = batch["video"].shape[1]
        for rows, (ids, valid, vector) in zip(kept, found, strict=True):
            rows.append((ids[valid], vector[valid]))
    if not any(len(ids) for ids, _ in kept[0]):
        raise UserError("retrieval: the stream has no row that could be read; check the data")
    return [
        Embedded(np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows]), views)
        for rows in kept
    ]


def owners(
    of_text: Int[np.ndarray, "m"], of_video: Int[np.ndarray, "n"], stream: str = "val"
) -> Int[np.ndarray, "m"]:
    """For each caption the position of its video in `of_video`, -1 if it is not there."""
    order = np.argsort(of_video)
    sorted_ids = of_video[order]
    if np.any(sorted_ids[1:] == sorted_ids[:-1]):
        raise ValueError(f"stream '{stream}' has two rows with one id")
    place = np.minimum(np.searchsorted(sorted_ids, of_text), len(of_video) - 1)
    owner = np.where(sorted_ids[place] == of_text, order[place], -1)
    if not np.any(owner >= 0):
        raise UserError(f"retrieval: no caption of '{stream}' has a video that could be read")
    return owner


def rank(
    texts: Float[np.ndarray, "m d"],
    videos: Float[np.ndarray, "n d"],
    owner: Int[np.ndarray, "m"],
    block: int = BLOCK,
) -> Ranks:
    """Ranks of the truth by the module's rule; `owner[i]` is the video of caption i.

    Embeddings need not be normalised. Memory: O((m + n) d) on the host, O(block²) on the device.
    """
    m, n = len(texts), len(videos)
    texts, videos = tiled(normalise(texts), block), tiled(normalise(videos), block)
    owner = np.pad(owner.astype(np.int32), (0, texts.shape[0] * block - m), constant_values=-1)
    owner = owner.reshape(-1, block)
    columns = np.arange(videos.shape[0] * block, dtype=np.int32).reshape(-1, block)
    own = np.full(owner.shape, -np.inf, np.float32)  # caption's score with its video
    best = np.full(columns.shape, -np.inf, np.float32)  # video's score with its best caption

    # The true scores come from the same tiles that are counted below: fp32 sums in another order
    # would differ in the last bit and break ties by chance.
    for i, j in np.ndindex(len(texts), len(videos)):
        if np.isin(owner[i], columns[j]).any():
            mine, its = truth(similarity(texts[i], videos[j]), owner[i], columns[j])
            own[i] = np.maximum(own[i], mine)
            best[j] = np.maximum(best[j], its)

    before_own = np.zeros(owner.shape, np.int64)
    before_best, tied_best = np.zeros(columns.shape, np.int64), np.zeros(columns.shape, np.int64)
    for i, j in np.ndindex(len(texts), len(videos)):
        scores = similarity(texts[i], videos[j])
        t, v, tied = count(scores, owner[i], columns[j], own[i], best[j], n)
        before_own[i] += t
        before_best[j] += v
        tied_best[j] += tied

    asked = np.isin(np.arange(n), owner)
    v2t = before_best.reshape(-1)[:n] + np.maximum(tied_best.reshape(-1)[:n] - 1, 0) / 2
    v2t = np.where(np.isfinite(best.reshape(-1)[:n]), v2t, np.inf)
    t2v = np.where(np.isfinite(own.reshape(-1)[:m]), before_own.reshape(-1)[:m], np.inf)
    return Ranks(t2v, v2t[asked])


def top(
    queries: Float[np.ndarray, "m d"],
    gallery: Float[np.ndarray, "n d"],
    k: int = 5,
    block: int = BLOCK,
) -> tuple[Float[np.ndarray, "m k"], Int[np.ndarray, "m k"]]:
    """The k best rows of the gallery for each query: cosines, descending, and their positions.

    Equal scores keep the gallery's order. k is limited to the size of the gallery.
    """
    m, n = len(queries), len(gallery)
    k = min(k, n)
    rows, columns = tiled(normalise(queries), block), tiled(normalise(gallery), block)
    found = []
    for row in rows:
        scores = np.full((block, k), -np.inf, np.float32)
        where = np.zeros((block, k), np.int32)
        for j, column in enumerate(columns):
            scores, where = merge_top(similarity(row, column), j * block, n, scores, where)
        found.append((np.asarray(scores), np.asarray(where)))
    return (
        np.concatenate([scores for scores, _ in found])[:m],
        np.concatenate([where for _, where in found])[:m],
    )


def summarise(
    prefix: str,
    ranks: Float[np.ndarray, "q"],
    ks: Sequence[int] = (1, 5, 10, 50),
    candidates: int | None = None,
) -> dict[str, float]:
    """{prefix}_r<k>, _gmean, _mdr, _mnr of ranks that count from 0. candidates: their number, which
    mdr and mnr have for an infinite rank."""
    shares = {k: float(np.mean(ranks < k)) for k in sorted({*ks, 1, 5, 10})}
    if candidates is not None:
        ranks = np.minimum(ranks, candidates - 1)
    return {
        **{f"{prefix}_r{k}": shares[k] for k in ks},
        f"{prefix}_gmean": float(np.cbrt(shares[1] * shares[5] * shares[10])),
        f"{prefix}_mdr": float(np.median(ranks) + 1),
        f"{prefix}_mnr": float(np.mean(ranks) + 1),
    }


def normalise(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows of length one, fp32; the length is at least 1e-8, as in torch's cosine similarity."""
    x = x.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-8))


def tiled(x: Float[np.ndarray, "n d"], block: int) -> Float[np.ndarray, "tiles block d"]:
    """Rows in tiles; the last one is padded with zeros."""
    tiles = -(-len(x) // block)
    return np.pad(x, ((0, tiles * block - len(x)), (0, 0))).reshape(tiles, block, x.shape[1])


@jax.jit
def similarity(texts: Float[Array, "bt d"], videos: Float[Array, "bv d"]) -> Float[Array, "bt bv"]:
    """One tile of cosines. A function of its own, so that every use gets the same bits."""
    return jnp.matmul(texts, videos.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def truth(
    scores: Float[Array, "bt bv"], owner: Int[Array, "bt"], column: Int[Array, "bv"]
) -> tuple[Float[Array, "bt"], Float[Array, "bv"]]:
    """Each caption's score with its own video, and each video's best with one of its captions."""
    pairs = jnp.where((owner[:, None] == column) & ~jnp.isnan(scores), scores, -jnp.inf)
    return pairs.max(axis=1), pairs.max(axis=0)


@jax.jit
def count(
    scores: Float[Array, "bt bv"],
    owner: Int[Array, "bt"],
    column: Int[Array, "bv"],
    own: Float[Array, "bt"],
    best: Float[Array, "bv"],
    n: int | Int[Array, ""],
) -> tuple[Int[Array, "bt"], Int[Array, "bv"], Int[Array, "bv"]]:
    """Numbers of videos before each caption's own, and of captions before, and tied with, each
    video's best."""
    other = owner[:, None] != column
    is_text, is_video = (owner >= 0)[:, None], column < n
    # `not <=` instead of `>`: NaN counts as better than the truth.
    before_own = other & is_video & ~(scores <= own[:, None])
    before_best = other & is_text & ~(scores <= best)
    return before_own.sum(1), before_best.sum(0), (is_text & (scores == best)).sum(0)


@jax.jit
def merge_top(
    scores: Float[Array, "b bv"],
    start: int | Int[Array, ""],
    n: int | Int[Array, ""],
    best: Float[Array, "b k"],
    where: Int[Array, "b k"],
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The k best of those found so far and of one more tile, whose first column is `start`."""
    columns = jnp.broadcast_to(start + jnp.arange(scores.shape[1], dtype=jnp.int32), scores.shape)
    scores = jnp.where((columns < n) & ~jnp.isnan(scores), scores, -jnp.inf)
    best, chosen = jax.lax.top_k(jnp.concatenate([best, scores], 1), best.shape[1])
    return best, jnp.take_along_axis(jnp.concatenate([where, columns], 1), chosen, 1)
