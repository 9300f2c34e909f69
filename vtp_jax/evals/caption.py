"""Captions that a method generates, compared with those of the data token by token.

The rule: a line is its tokens without the special ones (start, end, padding). exact: the share of
videos whose line is one of their captions. f1: the mean over videos of the best F1 with one of
their captions, of tokens regardless of order (SQuAD's, arXiv 1606.05250). Neither is BLEU or CIDEr:
they show whether generation is learnt and do not compare with published numbers. If a video has
several views, the middle one is captioned.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from vtp_jax import evals
from vtp_jax.types import Batch, Evaluator, State, Stream, UserError

Line = tuple[int, ...]
LINES = ("id", "valid", "text", "maskable")  # the keys of a caption's row that are read


def make(
    *,
    encode: Mapping[str, Callable[..., Mapping[str, Any]]],
    streams: Mapping[str, Stream],
    mesh: Mesh,
    check: evals.Check = evals.unchecked,
    stream: str = "val",
    generate: str = "generate",
) -> Evaluator:
    """The texts that `encode[generate]`, which returns `ids` i32 "b l", generates for the videos of
    `stream`, against `<stream>/captions`, whose `id` is that of the caption's video.

    Yields exact and f1 (fractions in [0, 1]), tokens (the mean length of the generated lines),
    n_videos, and n_left_out: those that are unreadable or have no caption. Raises UserError if
    there is no such stream or function.
    """
    known = f"{stream}/captions"
    evals.need("caption", streams, stream, known)
    write = writer(evals.verb("caption", encode, generate, "ids"), mesh)
    lines = evals.jitted(lambda params, extra, batch: [batch[key] for key in LINES], mesh)
    check("caption", write, stream)
    check("caption", lines, known)

    def run(state: State) -> Iterator[tuple[str, float]]:
        rows = (row for _, row in evals.over("caption", streams, known, lines, state, mesh))
        captions, special = read(rows)
        pairs: list[tuple[Line, Sequence[Line]]] = []
        for _, found in evals.over("caption", streams, stream, write, state, mesh):
            pairs += [
                (tuple(int(t) for t in ids if t not in special), captions[int(i)])
                for i, valid, ids in zip(*found, strict=True)
                if valid and any(captions.get(int(i), ()))  # one of no words is right for nothing
            ]
        if not pairs:
            raise UserError(f"caption: no video of '{stream}' could be read and has a caption")
        yield "exact", float(np.mean([line != () and line in known for line, known in pairs]))
        yield "f1", float(np.mean([max(f1(line, one) for one in known) for line, known in pairs]))
        yield "tokens", float(np.mean([len(line) for line, _ in pairs]))
        yield "n_videos", float(len(pairs))
        yield "n_left_out", float(streams[stream].rows - len(pairs))

    protocol = (
        f"captions of the {streams[stream].rows} videos of '{stream}' by encode '{generate}', "
        f"against all their captions in '{stream}/captions', without special tokens: the share "
        "that is one of them, and the best F1 of tokens regardless of order. Of several views of a "
        "video, the middle one. Videos that are unreadable or have no caption are left out and "
        "counted."
    )
    return Evaluator(run, protocol)


def writer(encode: Callable[..., Mapping[str, Any]], mesh: Mesh) -> Callable[..., Any]:
    """(params, extra, batch) -> (id, valid, ids), replicated on all devices."""

    def f(params: Any, extra: Any, batch: Batch) -> tuple[Array, Array, Array]:
        video = batch["video"]
        if video.ndim == 6:
            batch = {**batch, "video": video[:, video.shape[1] // 2]}
        return batch["id"], batch["valid"], encode(params, extra, batch)["ids"]

    return evals.jitted(f, mesh)


def read(batches: Iterable[Sequence[Any]]) -> tuple[dict[int, list[Line]], set[int]]:
    """The captions by their video's id, and the special tokens: those never to be masked. batches:
    of LINES, from all processes, since a video's captions may be on another one."""
    captions: dict[int, list[Line]] = collections.defaultdict(list)
    special: set[int] = set()
    for rows in batches:
        _, _, text, own = rows
        special |= set(text[~own].tolist())
        for i, valid, ids, mine in zip(*rows, strict=True):
            if valid:
                captions[int(i)].append(tuple(ids[mine].tolist()))
    return dict(captions), special


def f1(line: Line, other: Line) -> float:
    """The harmonic mean of precision and recall of the tokens, with their multiplicities."""
    common = (collections.Counter(line) & collections.Counter(other)).total()
    return 2 * common / max(len(line) + len(other), 1)
