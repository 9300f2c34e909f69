"""The pictures of a run: restored videos, and captions with the videos that they retrieve."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image

from vtp_jax import evals
from vtp_jax.evals import restoration, retrieval
from vtp_jax.run import paths, sharding
from vtp_jax.setup import build
from vtp_jax.show import draw
from vtp_jax.show.draw import Answer, Restored, Words
from vtp_jax.types import Stream, UserError

STATISTICS = {
    "none": "the net predicts pixels: nothing is known of hidden cubes but what it restored",
    "visible": "brightness and contrast of hidden cubes come from the visible cubes around them",
    "true": "hidden cubes were given their TRUE mean and deviation (the reference's way): "
    "this shows more than the net restored",
    "normalised": "hidden cubes are the bare normalised prediction around mid-grey",
}
AT_ONCE = 8  # videos restored in one call


def restore(
    run: build.Run, stream: Stream, count: int, statistics: str | None = None, seed: int = 0
) -> list[Restored]:
    """The first `count` readable videos of the stream as the net restores them.

    statistics: one of STATISTICS; by default "none" if the net predicts pixels, else "visible".
    Masks are a function of `seed` and of the position in the stream.
    """
    ways = math.prod(run.mesh.shape.values())
    size = -(-AT_ONCE // ways) * ways
    rows = first_rows(stream, count)
    if rows["video"].ndim == 6:
        rows["video"] = rows["video"][:, 0]  # the first view
    reconstruct = jax.jit(run.method.encode["reconstruct"])
    clips = []
    for start in range(0, len(rows["valid"]), size):
        batch = {k: fill(v[start : start + size], size) for k, v in rows.items()}
        key = jax.random.fold_in(jax.random.key(seed), start)
        with sharding.activate(run.mesh):
            placed = sharding.put(batch, run.mesh)
            made = jax.device_get(reconstruct(run.state.params, run.state.extra, placed, key))
        kinds = made["restored"]
        kind = statistics or restoration.blind(kinds)
        if kind not in kinds:
            known = ", ".join(sorted(kinds))
            raise UserError(f"statistics '{kind}': with the run's target there are only {known}")
        for i in np.flatnonzero(batch["valid"]):
            words = None
            if "predicted_text" in made:  # absent from methods of video alone
                texts = (made[k][i] for k in ("text", "predicted_text", "text_hidden"))
                words = words_of(run, batch["text_mask"][i], *texts)
            clips.append(
                Restored(
                    int(batch["id"][i]),
                    to_bytes(made["video"][i]),
                    made["hidden"][i],
                    to_bytes(kinds[kind][i]),
                    words,
                    to_bytes(restoration.interpolate(made["video"][i], made["hidden"][i])),
                    kind,
                )
            )
    return clips


def words_of(
    run: build.Run,
    text_mask: Bool[np.ndarray, "l"],
    text: Int[np.ndarray, "l"],
    predicted_text: Int[np.ndarray, "l"],
    text_hidden: Bool[np.ndarray, "l"],
) -> Words | None:
    """A row's words, or None without a caption. Each token is decoded on its own."""
    true = run.data.decode(text[:, None])
    predicted = run.data.decode(predicted_text[:, None])
    shown = [i for i in np.flatnonzero(text_mask) if true[i]]
    if not shown:
        return None
    return Words(
        [true[i] for i in shown],
        [predicted[i] for i in shown],
        [bool(text_hidden[i]) for i in shown],
    )


def storyboard(clip: Restored, title: str = "") -> Image.Image:
    """The storyboard of a clip, with a note on the statistics that were used."""
    return draw.storyboard(clip, STATISTICS[clip.statistics], title)


def first_rows(stream: Stream, count: int) -> dict[str, np.ndarray]:
    """The first `count` valid rows of a stream, or all of them if there are fewer. Raises UserError
    if none is valid."""
    parts: list[dict[str, np.ndarray]] = []
    missing = count
    for batch in stream.batches():
        chosen = np.flatnonzero(batch["valid"])[:missing]
        parts.append({k: np.asarray(v)[chosen] for k, v in batch.items()})
        missing -= len(chosen)
        if not missing:
            break
    if missing == count:
        raise UserError("none of the videos can be read; `vtp prepare check` lists the causes")
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def fill(rows: Shaped[np.ndarray, "n ..."], size: int) -> Shaped[np.ndarray, "b ..."]:
    """Pads with rows of zeros, which are not valid, to `size` rows."""
    return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def to_bytes(pixels: Float[np.ndarray, "t h w c"]) -> UInt8[np.ndarray, "t h w c"]:
    """[0, 1] -> 0..255, clipped."""
    return (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)


def ask(run: build.Run, streams: Mapping[str, Stream], stream: str, k: int = 5) -> list[Answer]:
    """The k nearest videos of each caption among the stream's, in the stream's order."""
    embed = retrieval.embedder(
        encode=run.method.encode, streams=streams, mesh=run.mesh, stream=stream
    )
    videos, texts = embed(run.state)
    owner = retrieval.owners(texts.id, videos.id, stream)
    known = np.flatnonzero(owner >= 0)
    ranks = retrieval.rank(texts.vector[known], videos.vector, owner[known]).t2v
    ranks = np.minimum(ranks, len(videos.id) - 1)  # one that is not a number is the last
    scores, found = retrieval.top(texts.vector[known], videos.vector, k)
    captions = captions_of(run, streams[retrieval.captions_of(streams, stream)])
    return [
        Answer(captions[i], int(texts.id[i]), int(r) + 1, videos.id[f].tolist(), s.tolist())
        for i, r, f, s in zip(known, ranks, found, scores, strict=True)
    ]


def captions_of(run: build.Run, stream: Stream) -> list[str]:
    """The captions of a stream's valid rows, decoded from the tokens that the net reads."""
    lines: list[str] = []
    for batch in stream.batches():
        lines += run.data.decode(np.asarray(batch["text"])[batch["valid"]])
    return lines


def choose(asked: Sequence[Answer], count: int) -> list[Answer]:
    """At most `count` answers to show: failures first, the worst ahead, then successes. Failures
    take up to two thirds, and more if there are too few successes."""
    failed = sorted((a for a in asked if a.rank > 1), key=lambda a: -a.rank)
    right = [a for a in asked if a.rank == 1]
    first = failed[: max(count - len(right), -(-2 * count // 3))]
    return first + right[: count - len(first)]


def thumbnails(stream: Stream, ids: set[int]) -> dict[int, UInt8[np.ndarray, "h w c"]]:
    """The middle frame of each of the videos `ids`."""
    found = {}
    for batch in stream.batches():
        for i in np.flatnonzero(batch["valid"]):
            if (id_ := int(batch["id"][i])) in ids:
                video = np.asarray(batch["video"][i])
                video = video[0] if video.ndim == 5 else video
                found[id_] = np.array(video[len(video) // 2])
        if len(found) == len(ids):
            break
    return found


def write(
    run: build.Run,
    streams: Mapping[str, Stream],
    stream: str,
    out: paths.PathLike,
    *,
    statistics: str | None = None,
    clips: int = 6,
    questions: int = 9,
) -> dict[str, Any]:
    """Draws the first `clips` videos of a stream and the answers to `questions` of its captions.

    Writes images and `index.json` into `out`; returns the index: {"step", "stream", "statistics",
    "note", "reconstructions": [{"title", "picture", "animation", "words_right", "words_hidden"}],
    "retrieval": [{"caption", "rank", "picture"}]}, where file names are relative to `out`. Raises
    UserError if the method can neither restore videos nor retrieve them.
    """
    verbs = set(run.method.encode)
    if not {"video", "text"} <= verbs:
        questions = 0
    if questions:
        captions = retrieval.captions_of(streams, stream)
        if "text" not in evals.structure("visualize", streams, captions):
            questions = 0
    if "reconstruct" not in verbs:
        if not questions:
            raise UserError(
                "nothing to draw: the method restores no videos (no encode 'reconstruct'), and "
                "there is no retrieval (encode 'video' and 'text', and a stream with captions)"
            )
        clips = 0
    out = paths.path(out)
    out.mkdir(parents=True, exist_ok=True)
    titles = streams[stream].table.get("path", [])
    restored = restore(run, streams[stream], clips, statistics) if clips else []
    used = restored[0].statistics if restored else "none"
    index: dict[str, Any] = {
        "step": int(run.state.step),
        "stream": stream,
        "statistics": used,
        "note": STATISTICS[used],
        "reconstructions": [],
        "retrieval": [],
    }
    for n, clip in enumerate(restored):
        title = Path(titles[clip.id]).name if titles else f"video {clip.id}"
        names = dict(picture=f"restored_{n:02}.png", animation=f"restored_{n:02}.webp")
        draw.save(storyboard(clip, title), out / names["picture"])
        draw.save_animation(draw.animation(clip, STATISTICS[used]), out / names["animation"])
        words = clip.words
        index["reconstructions"].append(
            dict(
                title=title,
                **names,
                words_right=words.right() if words else 0,
                words_hidden=sum(words.hidden) if words else 0,
            )
        )
    asked = ask(run, streams, stream) if questions else []
    shown = choose(asked, questions)
    frames = thumbnails(streams[stream], {i for a in shown for i in (a.own, *a.found)})
    for n, answer in enumerate(shown):
        picture = f"retrieval_{n:02}.png"
        draw.save(draw.answers(answer, frames), out / picture)
        index["retrieval"].append(dict(caption=answer.caption, rank=answer.rank, picture=picture))
    (out / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return index
