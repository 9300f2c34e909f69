"""The rows that every reader of a data set yields, and the description of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

Span = tuple[float, float]  # seconds: start, end


class Box(NamedTuple):
    """A person at one moment: sides as fractions of the picture, the set's own action numbers, and
    the person's number within the video (None if the set has none)."""

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
    captions: if only one is used, it is the first
    label:    class or right option, from 0; or the number that is the answer
    name:     of the class, as the set writes it
    question, answers, options: of question answering; options for multiple choice
    moments:  spans in seconds of the row's video that its single caption describes (from several
              annotators, or several moments)
    saliency: how well each 2 seconds of the video fit the caption, 0 to 4
    boxes:    persons in the middle of `span`
    licence:  of this video, if a set's videos differ
    origin:   set/split
    """

    id: str
    media: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    span: Span | None = None
    captions: tuple[str, ...] = ()
    label: int | None = None
    name: str = ""
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
    files: their names; "a | b": either name; "?a": may be absent, then None; with a star: a list of
           all that match
    rows:  the published number; None: unknown here
    sure:  whether a source for that number was found; False: unverified
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
    """A data set. get: where to get its files and media; licence: as far as known; note: anything
    that is not obvious about its files."""

    title: str
    task: str
    splits: Mapping[str, Split]
    get: str
    licence: str
    note: str = ""


Sets = Mapping[str, Set]
