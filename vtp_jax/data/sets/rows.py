"""What every reader of a data set yields, and what describes a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

Span = tuple[float, float]  # seconds: start, end


class Box(NamedTuple):
    """A person at one moment: sides as fractions of the picture, the set's own numbers of actions,
    and the person's number within the video (None where the set has none)."""

    left: float
    top: float
    right: float
    bottom: float
    actions: tuple[int, ...]
    person: int | None = None


class Row(NamedTuple):
    """One example of a set's own annotation files.

    id:       unique in its split
    media:    possible names of a file that shows only this row, without suffixes
    whole:    possible names of a longer file that contains the row as its part `span`
    captions: where only one is used, it is the first
    label:    class or right option, from 0; or the number that is the answer
    question, answers, options: of question answering; options where one is to be chosen
    moments:  seconds in the row's video during which the one caption holds (several annotators', or
              several moments)
    saliency: the fit of each 2 seconds of the video to the caption, 0 to 4
    boxes:    persons in the middle of `span`
    licence:  of this video, where a set's videos differ
    origin:   set/split
    """

    id: str
    media: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    span: Span | None = None
    captions: tuple[str, ...] = ()
    label: int | None = None
    question: str = ""
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    moments: tuple[Span, ...] = ()
    saliency: tuple[float, ...] = ()
    boxes: tuple[Box, ...] = ()
    licence: str = ""
    origin: str = ""


class Split(NamedTuple):
    """A split of a set.

    read:  the files, in order -> rows
    files: their names; "a | b": either name; "?a": may be absent, which reads as None; with a star:
           all that match, as a list
    rows:  the published number; None: not known here
    sure:  whether a source for that number was found; False: from memory
    vocabulary: for open questions, the split in which answers are counted
    labelled: whether rows have labels, or answers that become labels
    """

    read: Callable[..., Iterator[Row]]
    files: tuple[str, ...]
    rows: int | None = None
    sure: bool = True
    vocabulary: str = ""
    labelled: bool = False


class Set(NamedTuple):
    """A data set. get: where its files and media are; licence: as far as it is known; note: what is
    not obvious about its files."""

    title: str
    task: str
    splits: Mapping[str, Split]
    get: str
    licence: str
    note: str = ""


Sets = Mapping[str, Set]
