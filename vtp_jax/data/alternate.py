"""Training on sources of different structure, such as images and clips: their batches alternate.

The source of a step, and the number of its earlier batches, are functions of (seed, step): a run
that starts at step k gets the same batches as an uninterrupted one.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vtp_jax.types import Batch, Spec, Stream

TURN = 4  # purpose of a random generator; those of the other modules differ


class Training(NamedTuple):
    """One source's share of training. The fields are those of `types.Data`; classes: the number of
    classes."""

    spec: Spec
    batches: Callable[[int], Iterator[Batch]]
    rows: int
    classes: int
    counts: Callable[[int], Mapping[str, int]]


def alternate(parts: Sequence[Training], turns: Sequence[int], seed: int) -> Training:
    """Several sources as one: in every sum(turns) steps, part k has turns[k], in a new random
    order. `id` and `label` are numbered across the sources. The spec is that of the first."""
    if len(parts) == 1:
        return parts[0]

    def batches(first: int) -> Iterator[Batch]:
        _, done = turn(turns, seed, first)
        own = [part.batches(start) for part, start in zip(parts, done, strict=True)]
        for step in itertools.count(first):
            k, _ = turn(turns, seed, step)
            yield number_on(next(own[k]), parts[:k])

    def counts(step: int) -> dict[str, int]:
        _, done = turn(turns, seed, step)
        total: collections.Counter[str] = collections.Counter()
        for part, own in zip(parts, done, strict=True):
            total.update(part.counts(own))
        return dict(total)

    rows, classes = (sum(getattr(part, name) for part in parts) for name in ("rows", "classes"))
    return Training(parts[0].spec, batches, rows, classes, counts)


def label_on(stream: Stream, classes: int) -> Stream:
    """An evaluation stream for the classes of a source that comes after others, which have
    `classes` in all: labels in its batches and its table are shifted to those of training."""
    if not classes:
        return stream

    def batches() -> Iterator[Batch]:
        for batch in stream.batches():
            k = batch.get("label")
            yield batch if k is None else {**batch, "label": np.where(k < 0, k, k + classes)}

    labels = [None if k is None else k + classes for k in stream.table["label"]]
    return stream._replace(batches=batches, table={**stream.table, "label": labels})


def turn(turns: Sequence[int], seed: int, step: int) -> tuple[int, list[int]]:
    """(the source of a step, the number of earlier steps of each source)."""
    cycle, place = divmod(step, sum(turns))
    order = orders(tuple(turns), seed, cycle)
    had = [cycle * n + order[:place].count(k) for k, n in enumerate(turns)]
    return order[place], had


@functools.lru_cache(maxsize=4)
def orders(turns: tuple[int, ...], seed: int, cycle: int) -> list[int]:
    rng = np.random.default_rng([TURN, seed, cycle])
    return rng.permutation(np.repeat(np.arange(len(turns)), turns)).tolist()


def number_on(batch: Batch, before: Sequence[Training]) -> Batch:
    """The batch with `id` and `label` numbered after all sources in `before`; -1 stays -1."""
    shift = dict(id=sum(p.rows for p in before), label=sum(p.classes for p in before))
    found = {
        k: np.where(batch[k] < 0, batch[k], batch[k] + n) for k, n in shift.items() if k in batch
    }
    return {**batch, **{k: x.astype(np.int32) for k, x in found.items()}}
