"""What every reader of a data set yields, and what describes a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

Span = tuple[float, float]  # seconds: start, end


class Box(NamedTuple):
    """A person at one moment: sides as fractions of the picture, the set's own numbers of what the
    person does, and who it is within the video (None where that is not told)."""

    left: float
    top: float
    right: float
    bottom: float
    actions: tuple[int, ...]
    person: int | None = None


class Row(NamedTuple):
    """One example, as a set's own annotation files tell it.

    id:       unique in its split
    media:    what a file that shows this row and nothing else may be called; the suffix is free
    whole:    what a longer file may be called, of which the row is the part `span`
    captions: the first is the one that is used where only one is
    label:    class or right option, from 0; or the number that counts as answer
    question, answers, options: of question answering; options where one is to be chosen
    moments:  seconds in the row's video during which the one caption holds (several annotators', or
              several moments)
    saliency: how well each 2 seconds of the video fit the caption, 0 to 4
    boxes:    persons in the middle of `span`
    licence:  of this video, where its set's is not the same for all
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
    files: what they are called; "a | b": by either name; "?a": may be absent, which reads as None;
           with a star: all that match, as a list
    rows:  how many the split has by what was published; None: not known here
    sure:  whether a source for that number was found; False: from memory
    vocabulary: of open questions, the split in which answers are counted
    labelled: whether rows have labels, or answers that become labels
    """

    read: Callable[..., Iterator[Row]]
    files: tuple[str, ...]
    rows: int | None = None
    sure: bool = True
    vocabulary: str = ""
    labelled: bool = False


class Set(NamedTuple):
    """A data set. get: how to come by its files and media; licence: as far as it is known; note:
    what is not obvious about its files."""

    title: str
    task: str
    splits: Mapping[str, Split]
    get: str
    licence: str
    note: str = ""


Sets = Mapping[str, Set]
