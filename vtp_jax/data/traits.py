"""What the clips of a set are like, from the headers of some of them and the words of their
captions: for choices that a config leaves to its data."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from vtp_jax.data import open as sets
from vtp_jax.data import records, shapes, sources, video
from vtp_jax.data.look import Reader
from vtp_jax.types import UserError

SAMPLED = 32  # clips whose headers are read
# Clips whose captions are read: of a list in memory, and of shards, whose records are.
LISTED, WORDED = 50_000, 5_000


class Trait(NamedTuple):
    """Of a clip: its frames, frames per second (0 if unknown), and pixels of its picture."""

    frames: float
    rate: float
    height: float
    width: float


def trait(reader: Reader) -> Trait:
    """From the header of a file or of a record. Raises video.Unreadable."""
    if isinstance(reader, sets.Member):
        return trait(reader.reader)
    if isinstance(reader, sets.Drawing):
        plan = reader.plan
        return Trait(len(reader.numbers) * plan.frames, shapes.RATE, plan.side, plan.side)
    if isinstance(reader, records.Kept):
        found = reader.header.record
        return Trait(found.frames, found.rate, found.height, found.width)
    assert isinstance(reader, sets.File)
    found = video.probe(reader.path)
    return Trait(found.frames, found.rate, found.height, found.width)


def typical(clips: sets.Clips) -> Trait:
    """The median of each trait over a sample. Raises UserError if no clip of it can be read."""
    found = []
    for index in spread(len(clips.source.clips), SAMPLED):
        with contextlib.suppress(video.Unreadable):
            found.append(trait(clips.open(index)))
    if not found:
        raise UserError(
            f"none of {min(SAMPLED, len(clips.source.clips))} videos can be read, such as "
            f"'{clips.source.file(0)}'; see `vtp prepare check`"
        )
    return Trait(*np.median(np.asarray(found, float), axis=0).tolist())


def captions(source: sources.Source) -> list[str]:
    """The captions of all clips, or of some of a large set."""
    most = LISTED if isinstance(source.clips, tuple) else WORDED
    some = spread(len(source.clips), most)
    return [text for index in some for text in sets.known_clip(source, index).captions]


def check_length(where: str, words: sets.Words, source: sources.Source) -> None:
    """Reports how many captions are longer than `text.length`, which cuts them."""
    found = captions(source)
    counts = words.tokenizer.count(found)
    if cut := int((counts > words.length).sum()):
        logging.warning(
            "%s: %d of %d captions are longer than %d tokens and are cut; "
            "--config.data.text.length=%d keeps all",
            where, cut, len(found), words.length, rounded(int(counts.max())),
        )  # fmt: skip


def rounded(count: int) -> int:
    """A number of tokens, rounded up to a multiple of eight."""
    return -(-count // 8) * 8


def spread(count: int, most: int) -> Sequence[int]:
    """All numbers below `count`, or `most` of them, evenly spaced."""
    if count <= most:
        return range(count)
    return np.linspace(0, count - 1, most).astype(int).tolist()
