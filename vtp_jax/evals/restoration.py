"""Restoration: how well hidden pixels and hidden words are restored, with the other modality and
without it (SimVTP's claim that each helps to restore the other)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float
from scipy import sparse
from scipy.sparse.linalg import spsolve

from vtp_jax import evals
from vtp_jax.types import Batch, Encoded, Evaluator, State, Stream, UserError

WORDS = dict(words_right="predicted_text", words_right_without_video="predicted_text_alone")


def make(
    *,
    encode: Mapping[str, Callable[..., Encoded]],
    streams: Mapping[str, Stream],
    mesh: Mesh,
    check: evals.Check = evals.unchecked,
    stream: str = "val",
    seed: int = 0,
) -> Evaluator:
    """Yields restored_db, the PSNR of hidden pixels, and interpolated_db, that of `interpolate`;
    and, of methods that read captions, restored_db_without_caption, words_right (the share of
    hidden words that are restored) and words_right_without_video.

    Batch i has the key fold_in(key(seed), i) in every run. PSNR, in dB with a peak of 1, is
    computed for each clip over its hidden pixels and averaged over clips; words are counted over
    the stream. Normalised cubes get the statistics of visible cubes. With a second view of a clip,
    the first one counts.
    """
    evals.need("restoration", streams, stream)
    verb = evals.verb("restoration", encode, "reconstruct", "video", "hidden", "restored")

    def first_view(params: Any, extra: Any, batch: Batch, key: Any) -> tuple[Any, Encoded]:
        video = batch["video"]
        video = video[:, 0] if video.ndim == 6 else video
        return batch["valid"], verb(params, extra, dict(batch, video=video), key)

    restore = evals.jitted(first_view, mesh)
    check("restoration", lambda *args: restore(*args, jax.random.key(seed)), stream)

    def run(state: State) -> Iterator[tuple[str, float]]:
        keys = (jax.random.fold_in(jax.random.key(seed), i) for i in itertools.count())

        def f(*args: Any) -> tuple[Any, Encoded]:
            return restore(*args, next(keys))

        psnr: dict[str, list[float]] = {}
        right, asked = dict.fromkeys(WORDS, 0), 0
        for _, (valid, found) in evals.over("restoration", streams, stream, f, state, mesh):
            for i in np.flatnonzero(valid):
                row = jax.tree.map(lambda x, i=i: np.asarray(x[i]), found)
                hidden, true = row["hidden"], row["video"]
                if not hidden.any():
                    raise UserError("restoration: the method hides nothing (its mask ratio is 0)")
                kind = blind(row["restored"])
                clips = {"restored_db": row["restored"][kind]}
                if "restored_alone" in row:
                    clips["restored_db_without_caption"] = row["restored_alone"][kind]
                clips["interpolated_db"] = interpolate(true, hidden)
                for name, clip in clips.items():
                    psnr.setdefault(name, []).append(decibels(clip[hidden], true[hidden]))
                if "text_hidden" in row:
                    words = row["text_hidden"]
                    asked += int(words.sum())
                    for name, key in WORDS.items():
                        right[name] += int((row[key] == row["text"])[words].sum())
        for name, values in psnr.items():
            yield name, float(np.mean(values))
        if asked:
            yield from ((name, count / asked) for name, count in right.items())

    protocol = (
        f"hidden pixels and words of the {streams[stream].rows} clips of '{stream}', masks as "
        f"in training, batch i with the key fold_in(key({seed}), i); PSNR of each clip's hidden "
        "pixels (peak 1), averaged over clips; interpolated: the smoothest filling (Laplace's "
        "equation) of each frame from its visible pixels; without the caption, or the video: "
        "neither attends to the other"
    )
    return Evaluator(run, protocol)


def blind(restored: Mapping[str, Any]) -> str:
    """The name of the reconstruction that uses no statistics of hidden cubes."""
    return "none" if "none" in restored else "visible"


def decibels(a: Float[np.ndarray, "n c"], b: Float[np.ndarray, "n c"]) -> float:
    """The PSNR of values in [0, 1], at most 120 dB."""
    return float(-10 * np.log10(max(np.mean((a.astype(np.float64) - b) ** 2), 1e-12)))


def interpolate(
    video: Float[np.ndarray, "t h w c"], hidden: Bool[np.ndarray, "t h w"]
) -> Float[np.ndarray, "t h w c"]:
    """The video with the hidden pixels of each frame filled in from its visible ones: the harmonic
    function (each hidden pixel is the mean of its neighbours), which is exact, and the smoothest
    there is. A frame without visible pixels becomes mid-grey."""
    filled, done = video.astype(np.float64), np.zeros(len(video), bool)
    for t in range(len(video)):
        if done[t]:
            continue
        same = (hidden == hidden[t]).all(axis=(1, 2))  # frames of one mask are solved together
        filled[same], done = fill(filled[same], hidden[t]), done | same
    return filled


def fill(
    frames: Float[np.ndarray, "t h w c"], hidden: Bool[np.ndarray, "h w"]
) -> Float[np.ndarray, "t h w c"]:
    """Frames of one mask, filled in."""
    if not hidden.any():
        return frames
    if hidden.all():
        return np.full_like(frames, 0.5)
    (h, w), index = hidden.shape, np.flatnonzero(hidden)
    column = np.full(h * w, -1)
    column[index] = np.arange(len(index))
    y, x = np.divmod(index, w)
    flat = frames.transpose(1, 2, 0, 3).reshape(h * w, -1)
    known, count = np.zeros((len(index), flat.shape[1])), np.zeros(len(index))
    rows, columns = [], []
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        inside = (y + dy >= 0) & (y + dy < h) & (x + dx >= 0) & (x + dx < w)
        place = np.where(inside, (y + dy) * w + x + dx, 0)
        unknown = inside & (column[place] >= 0)
        visible = inside & ~unknown
        known[visible] += flat[place[visible]]
        count += inside
        rows.append(np.flatnonzero(unknown))
        columns.append(column[place[unknown]])
    row, col = np.concatenate(rows), np.concatenate(columns)
    matrix = sparse.diags(count) - sparse.coo_matrix(
        (np.ones(len(row)), (row, col)), shape=(len(index), len(index))
    )
    found = flat.copy()
    found[index] = spsolve(matrix.tocsc(), known).reshape(len(index), -1)
    return found.reshape(h, w, len(frames), -1).transpose(2, 0, 1, 3)
