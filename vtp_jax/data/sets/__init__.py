"""Public data sets, read from their own annotation files.

    rows = sets.read("msrvtt", "train_9k", "data/msrvtt")      the rows of the files, as `Row`s
    found = sets.locate(rows, "data/msrvtt")                   the rows with their video files
    source = sets.load("msrvtt", "train_9k", "data/msrvtt")    a source for the pipeline
    sets.check("msrvtt", "data/msrvtt")                        reports of missing files

`SETS` is the table of all sets; docs/datasets.md is made from it. Nothing here downloads, and
nothing imports TensorFlow: `builders.make` makes a TFDS builder of any set.
"""

from __future__ import annotations

import collections
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from vtp_jax.data import sources
from vtp_jax.data.sets import moments, parse, pretraining, questions, recognition, retrieval
from vtp_jax.data.sets.folder import Folder
from vtp_jax.data.sets.rows import Box, Row, Set, Sets, Span, Split
from vtp_jax.types import UserError

__all__ = [
    "SETS", "Box", "Folder", "Found", "Report", "Row", "Set", "Span", "Split",
    "check", "find", "load", "locate", "read",
]  # fmt: skip

SETS: Sets = {
    **pretraining.SETS,
    **recognition.SETS,
    **retrieval.SETS,
    **questions.SETS,
    **moments.SETS,
}
Place = str | os.PathLike[str] | Folder


class Found(NamedTuple):
    """A row and its video file, relative to the folder. span: the part of the file, None if it is
    the whole file; path: None if there is no such file."""

    row: Row
    path: str | None
    span: Span | None


def find(name: str, split: str) -> Split:
    """The split of a set."""
    splits = find_set(name).splits
    if split not in splits:
        raise UserError(f"{name} has no split '{split}'{suggest(split, splits)}")
    return splits[split]


def find_set(name: str) -> Set:
    if name not in SETS:
        raise UserError(f"no data set '{name}'{suggest(name, SETS)}")
    return SETS[name]


def suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def read(name: str, split: str, root: Place) -> Iterator[Row]:
    """The rows of a split, in the order of its files, which may be anywhere below `root`.

    Raises UserError on missing or invalid files, immediately or when the row is reached.
    """
    chosen, folder, origin = find(name, split), open_folder(root), f"{name}/{split}"
    if lacking := find_lacking(chosen, folder):
        raise UserError(
            f"{origin} needs {lacking[0]}, which is not below {folder.root}; "
            f"where to get it: {SETS[name].get}"
        )
    files = []
    for file in chosen.files:
        found: list[Path] = folder.annotations(file)
        files.append(found if "*" in file else found[0] if found else None)
    return (row._replace(origin=origin) for row in chosen.read(*files))


def open_folder(place: Place) -> Folder:
    return place if isinstance(place, Folder) else Folder(place)


def find_lacking(split: Split, folder: Folder) -> list[str]:
    """The files of a split that are missing."""
    needed = (file for file in split.files if not file.startswith("?"))
    return [file for file in needed if not folder.annotations(file)]


def locate(rows: Iterable[Row], root: Place) -> Iterator[Found]:
    """Each row with its file: the clip cut for it, or else the whole video that contains it."""
    folder = open_folder(root)
    for row in rows:
        if path := folder.find(row.media):
            yield Found(row, path, None)
        elif path := folder.find(row.whole):
            yield Found(row, path, row.span)
        else:
            yield Found(row, None, None)


# The bridge to training.


def load(
    name: str,
    split: str,
    root: str | os.PathLike[str],
    *,
    answers: int | str = 1500,
    max_absent: float = 0.0,
    parts: bool = False,
) -> sources.Source:
    """A split as a source for the pipeline: a clip for each row.

    Captions are the row's; for questions, the question, or, with options, the question followed by
    each option. The label is the class, the right option, or the answer's number among `answers`.
    answers: N, for the N most frequent answers in training (ties in alphabetical order), or a file
    (`read_answers`); an answer that is not among them gets the number after the last. If a row has
    a single moment, the clip has its span; saliency is available only from `read`.

    max_absent: the share of rows whose files may be absent; they keep their places and count as
    unreadable (`missing`). parts: whether a clip may be the `part` of a longer video, which only
    shards support.
    """
    chosen, folder = find(name, split), open_folder(root)
    known: Mapping[str, int] = {}
    if chosen.vocabulary and isinstance(answers, str):
        known = read_answers(Path(answers))
    elif chosen.vocabulary:
        known = count_answers(read(name, chosen.vocabulary, folder), int(answers))
    terms = find_set(name).licence
    clips, absent, longer = [], [], []
    names = {n: answer for answer, n in known.items()}
    for row, path, span in locate(read(name, split, folder), folder):
        if row.boxes:
            raise UserError(f"{name}: a source has no boxes; read them with sets.read")
        if path is None:
            absent.append(row.id)
        elif span is not None:
            longer.append(row.id)
        clip = to_clip(row, path or os.path.basename((row.media or row.whole)[0]), known)
        clips.append(clip._replace(licence=row.licence or terms, part=span))
        if row.name and row.label is not None:
            names[row.label] = row.name
    if not clips:
        raise UserError(f"{name}/{split}: its files have no rows; get them again")
    if longer and not parts:
        raise UserError(
            f"{name}/{split}: {len(longer)} of {len(clips)} rows are parts of longer videos, first "
            f"'{longer[0]}'; cut them into files of such names, or make shards of them: "
            f"`vtp prepare shards --set {name} --split {split}`"
        )
    if len(absent) > max_absent * len(clips):
        raise UserError(
            f"{name}/{split}: {len(absent)} of {len(clips)} videos are not below "
            f"{folder.root}, first '{absent[0]}'; `vtp sets check --set {name}` "
            "names them; allow a share with max_absent"
        )
    every = tuple(names.get(n, f"class {n}") for n in range(max(names, default=-1) + 1))
    return sources.Source(str(folder.root), tuple(clips), names=every)


def read_answers(file: Path) -> dict[str, int]:
    """{answer: its number}, from a text file, VindLU's JSON list or LAVIS' {answer: number}."""
    if file.suffix != ".json":
        return sources.read_answers(file)
    listed = parse.read_json(file)
    if isinstance(listed, list):
        listed = {answer: n for n, answer in enumerate(listed)}
    record = parse.Record(listed, str(file))
    known = {answer: record.count(answer) for answer in record.values}
    if sorted(known.values()) != list(range(len(known))):
        record.fail("the answers must be numbered from 0, each once")
    return known


def count_answers(rows: Iterable[Row], most: int) -> dict[str, int]:
    """{answer: its number} for the `most` most frequent answers."""
    counts = collections.Counter(answer for row in rows for answer in row.answers)
    ranked = sorted(counts, key=lambda answer: (-counts[answer], answer))
    return {answer: n for n, answer in enumerate(ranked[:most])}


def to_clip(row: Row, path: str, known: Mapping[str, int]) -> sources.Clip:
    captions, label = row.captions, row.label
    if row.options:
        captions = tuple(f"{row.question} {option}".strip() for option in row.options)
    elif row.question:
        captions = (row.question,)
    if label is None and known and row.answers:
        label = known.get(row.answers[0], len(known))
    # A caption with several moments has no single span.
    spans = row.moments if len(row.moments) == len(captions) == 1 else ()
    return sources.Clip(path, captions, label, spans, row.id, row.origin)


# What is missing.


class Report(NamedTuple):
    """The state of a split.

    lacking: missing annotation files; wrong: the error in the others, if any
    rows, published: the number of rows, and the published number (None: unknown)
    missing: the names of absent videos, without repetition; parts: rows of which only the whole
    video exists; repeated: rows with the id of an earlier one
    """

    split: str
    lacking: tuple[str, ...] = ()
    wrong: str = ""
    rows: int = 0
    published: int | None = None
    missing: tuple[str, ...] = ()
    parts: int = 0
    repeated: int = 0

    @property
    def complete(self) -> bool:
        sized = self.published is None or self.rows == self.published
        return sized and not (self.lacking or self.wrong or self.missing or self.repeated)


def check(name: str, root: Place, split: str | None = None) -> list[Report]:
    """A report on a split, or on each split of a set. Files are located, not decoded."""
    splits = [split] if split is not None else list(find_set(name).splits)
    folder = open_folder(root)
    return [check_split(name, one, folder) for one in splits]


def check_split(name: str, split: str, folder: Folder) -> Report:
    chosen = find(name, split)
    report = Report(split, published=chosen.rows)
    if lacking := find_lacking(chosen, folder):
        return report._replace(lacking=tuple(lacking))
    ids: set[str] = set()
    missing: dict[str, None] = {}
    rows = parts = 0
    wrong = ""
    try:
        for row, path, span in locate(read(name, split, folder), folder):
            rows += 1
            parts += path is not None and span is not None
            ids.add(row.id)
            if path is None:
                missing[(row.media or row.whole)[0]] = None
    except UserError as error:
        wrong = str(error)
    return report._replace(
        wrong=wrong, rows=rows, missing=tuple(missing), parts=parts, repeated=rows - len(ids)
    )
