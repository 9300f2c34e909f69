"""Lists of videos with their captions and labels, before any video is read.

Formats: CSV and TSV (named columns); JSON lines (the same names); SimVTP's JSON, {path: caption} or
{path: [captions]}; .txt, and .csv without a header, `path label` on each line (the lists of
Kinetics and VideoMAE). Paths are relative to `root`. Several captions of one video are several rows
or a list, in the order of the file. Labels are whole numbers from 0.
"""

from __future__ import annotations

import bisect
import difflib
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vtp_jax import lines
from vtp_jax.types import UserError

VIDEOS = frozenset(
    (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
)

# Lines of lists without captions. The first is VideoMAE's form for pretraining, without classes.
PAIRS = [
    re.compile(rf"(?P<path>.*\S){between}(?P<label>{label})")
    for between, label in ((r"\s+0\s+-1", ""), (r"\s*,\s*", r"\d+"), (r"\s+", r"\S+"))
]
LISTS = (".csv", ".tsv", ".jsonl", ".json")  # of lists with captions
KNOWN, SPAN = ("id", "source", "licence"), ("start", "end")  # columns that a file may have


class Clip(NamedTuple):
    """A video, by its path under the source's root, its captions and its class.

    spans: (start, end) of each caption, in seconds, if known; id: a name, if other than the path;
    source, licence: its origin and terms; part: (start, end), in seconds, if the clip is a part of
    the video, otherwise None
    """

    path: str
    captions: tuple[str, ...]
    label: int | None = None
    spans: tuple[tuple[float, float], ...] = ()
    id: str = ""
    source: str = ""
    licence: str = ""
    part: tuple[float, float] | None = None


class Facts(NamedTuple):
    """Facts about all clips of a source. captions: the smallest number of captions of a clip;
    classes: an upper bound of the labels, which are below it; 0 if there are none."""

    captions: int
    classes: int


class Source(NamedTuple):
    """Videos with captions. A clip's position in `clips`, which may be read lazily from disk, is
    its id in batches. facts: None if they are unknown until every clip has been read. names:
    of the classes, in their order; empty if unknown."""

    root: str
    clips: Sequence[Clip]
    facts: Facts | None = None
    names: tuple[str, ...] = ()

    def file(self, index: int) -> str:
        return os.path.join(self.root, self.clips[index].path)

    def survey(self) -> Facts:
        """The facts, computed from all clips if necessary."""
        if self.facts is not None:
            return self.facts
        classes = (-1 if clip.label is None else clip.label for clip in self.clips)
        fewest = min((len(clip.captions) for clip in self.clips), default=0)
        return Facts(fewest, max(classes, default=-1) + 1)


class Joined(Sequence[Clip]):
    """The clips of several sources, concatenated, by their full paths."""

    def __init__(self, parts: Sequence[Source]):
        self.parts = parts
        self.starts = list(itertools.accumulate((len(p.clips) for p in parts), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def find(self, index: int) -> tuple[int, int]:
        """(the number of a clip's source, its index there)."""
        part = bisect.bisect_right(self.starts, index) - 1
        return part, index - self.starts[part]

    def __getitem__(self, index: Any) -> Any:
        part, own = self.find(range(len(self))[index])
        source = self.parts[part]
        return source.clips[own]._replace(path=source.file(own))


def join(parts: Sequence[Source]) -> Source:
    """Several sources as one. A label means the same class in all of them."""
    facts = [part.survey() for part in parts]
    known = Facts(min(f.captions for f in facts), max(f.classes for f in facts))
    names = max((part.names for part in parts), key=len, default=())
    return Source("", Joined(parts), known, names)


def load(
    root: str | os.PathLike[str],
    list: str | os.PathLike[str] | None = None,
    *,
    path_column: str = "path",
    caption_column: str | None = "caption",
    label_column: str | None = None,
    answers: str | os.PathLike[str] | None = None,
    max_absent: float = 0.0,
) -> Source:
    """The videos under `root` that the file `list` (.csv, .tsv, .jsonl, .json or .txt) names; or,
    without one, those of `list_folder`. A list that is not here is looked for in `root`.

    caption_column: None without captions; label_column: None without classes.
    answers: a file with one answer per line. Captions are then questions, each row is a clip of its
    own, and labels are answers in words, numbered as in the file; an answer that is not in the file
    gets the number after the last.
    max_absent: the share of named files that may be absent. They keep their places in the list and
    count as unreadable (`missing`) when they are read. Any other error raises UserError.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no folder '{root}'; `root` must be the folder that holds the videos")
    file = find_list(root) if list is None else Path(list)
    if file is None:
        return list_folder(root)
    if not file.exists() and (root / file).is_file():
        file = root / file
    columns = dict(path=path_column, caption=caption_column, label=label_column)
    known = None if answers is None else read_answers(Path(answers))
    merged: dict[str, Clip] = {}
    rows = read_rows(file, {k: name for k, name in columns.items() if name}, known)
    for number, row in enumerate(rows):
        path, label = row["path"], row.get("label")
        if not is_inside(root, path):
            raise UserError(
                f"{file}, {row['where']}: '{path}' leads out of {root}; set `root` to a folder "
                "that holds all the videos"
            )
        key = path if known is None else f"{path}?{number}"
        clip = merged.setdefault(key, Clip(path, (), label, **row["known"]))
        if clip.label != label:
            raise UserError(
                f"{file}, {row['where']}: '{path}' has labels {clip.label} and {label}; keep one"
            )
        merged[key] = clip._replace(
            captions=clip.captions + tuple(filter(None, [row["caption"]])),
            spans=clip.spans + tuple(filter(None, [row["span"]])),
        )
    if not merged:
        raise UserError(f"{file} lists no videos; it needs a row for every video")
    for clip in merged.values():
        if clip.captions and clip.spans and len(clip.spans) != len(clip.captions):
            raise UserError(
                f"{file}: {len(clip.captions)} captions of '{clip.path}', but {len(clip.spans)} "
                "with start and end; give all of them, or none"
            )
    absent = [clip.path for clip in merged.values() if not (root / clip.path).is_file()]
    if len(absent) > max_absent * len(merged):
        if len(absent) == len(merged) and next(find_videos(root), None) is None:
            raise UserError(f"the folder {root} holds no videos; put them there or correct `root`")
        raise UserError(
            f"{file} names {len(absent)} of {len(merged)} files that are not in {root}, such as "
            f"'{absent[0]}'; correct `root` or the paths, or allow a share with max_absent"
        )
    return Source(str(root), tuple(merged.values()), names=tuple(known or ()))


def find_list(root: Path) -> Path | None:
    """The one list in a folder, next to its videos; None if there is none."""
    found = [p for p in sorted(root.iterdir()) if p.suffix.lower() in LISTS and p.is_file()]
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise UserError(f"the folder {root} holds several lists ({names}); name one with `list`")
    return found[0] if found else None


def list_folder(root: Path) -> Source:
    """All videos of a folder, by name, with the captions that are written beside them: those of
    a/b.mp4 in a/b.txt, one a line."""
    clips, bare = [], []
    for file in sorted(find_videos(root)):
        beside = file.with_suffix(".txt")
        captions = [line for _, line in lines.items(beside)] if beside.is_file() else []
        path = file.relative_to(root).as_posix()
        clips.append(Clip(path, tuple(captions)))
        if not captions:
            bare.append(path)
    if not clips:
        raise UserError(f"the folder {root} holds no videos; put them there or correct `root`")
    if bare:
        raise UserError(
            f"{len(bare)} of {len(clips)} videos in {root} have no caption, such as '{bare[0]}'; "
            "name a list of captions with `list`, or write them beside the videos (a.txt for a.mp4)"
        )
    return Source(str(root), tuple(clips))


def is_inside(root: Path, path: str) -> bool:
    """Whether a path relative to `root` stays below it, judged by its text only."""
    if ".." not in path and not os.path.isabs(path):
        return True
    top, whole = os.path.abspath(root), os.path.abspath(root / path)
    return os.path.commonpath([top, whole]) == top


def from_files(
    paths: Sequence[str | os.PathLike[str]], captions: Sequence[str] | None = None
) -> Source:
    """A source of the given files, or of all videos in the given folders, sorted by name.

    captions: one for each path, or None if there are none, as for viewing reconstructions.
    """
    files: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(str(p) for p in find_videos(path))
            if not found:
                raise UserError(f"the folder {path} holds no videos ({', '.join(sorted(VIDEOS))})")
            files += found
        elif path.is_file():
            files.append(str(path))
        else:
            raise UserError(f"no file or folder '{path}'")
    if captions is not None and len(captions) != len(files):
        raise UserError(f"{len(captions)} captions for {len(files)} videos; give one for each")
    texts = [(c,) for c in captions] if captions is not None else [()] * len(files)
    return Source("", tuple(Clip(f, t) for f, t in zip(files, texts, strict=True)))


def in_a_row(source: Source, count: int) -> Source:
    """Longer videos, each of `count` adjacent clips of a source, with the path of its first clip
    and the first captions of all its clips, in order. count=1 returns the source unchanged."""
    if count == 1:
        return source
    rows = [source.clips[i : i + count] for i in range(0, len(source.clips), count)]
    return Source(
        source.root,
        tuple(Clip(row[0].path, tuple(c.captions[0] for c in row)) for row in rows),
    )


def find_videos(folder: Path) -> Iterator[Path]:
    """Every file below `folder` whose name has the suffix of a video. Links to folders are
    followed, but no folder is entered twice."""
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (place := (status.st_dev, status.st_ino)) in seen:
            folders.clear()
            continue
        seen.add(place)
        yield from (Path(parent, n) for n in names if Path(n).suffix.lower() in VIDEOS)


def read_captions(
    file: Path, path_column: str = "path", caption_column: str = "caption"
) -> Iterator[tuple[str, str]]:
    """(path, caption) pairs of a caption file, in its order."""
    for row in read_rows(file, dict(path=path_column, caption=caption_column)):
        yield row["path"], row["caption"]


def read_answers(file: Path) -> dict[str, int]:
    """{answer: its number}, from a file with one answer per line."""
    if not file.exists():
        raise UserError(f"no file of answers '{file}'; write one answer per line")
    answers: dict[str, int] = {}
    for number, answer in lines.items(file):
        if answer in answers:
            raise UserError(f"{file}, line {number}: '{answer}' is repeated; remove one")
        answers[answer] = len(answers)
    if not answers:
        raise UserError(f"{file} is empty; write one answer per line")
    return answers


def read_rows(
    file: Path, columns: Mapping[str, str], answers: Mapping[str, int] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a file, in its order: path; caption and label, None unless `columns` names their
    column; and the values of the columns `KNOWN` and `SPAN`, if any. answers: the numbers of
    answers, if labels are words."""
    readers = {
        ".csv": read_csv,
        ".tsv": read_tsv,
        ".jsonl": read_jsonl,
        ".json": read_json,
        ".txt": read_txt,
    }
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{file}: unknown format; known: {', '.join(readers)}")
    if not file.exists():
        raise UserError(f"no file '{file}'; give a list of videos as {', '.join(readers)}")
    for where, found in reader(file, columns):
        row = {k: found.get(k) if k in columns else None for k in ("path", "caption", "label")}
        path, caption, label = row.values()
        if not (isinstance(path, str) and path):
            raise UserError(f"{file}, {where}: the path is {path!r}; it must be text")
        if "caption" in columns:
            if not (isinstance(caption, str) and caption.strip()):
                raise UserError(
                    f"{file}, {where}: '{path}' has no caption; write one or remove the row"
                )
            row["caption"] = clean(caption.strip())
        if "label" in columns and answers is not None:
            row["label"] = answers.get(str(label).strip(), len(answers))
        elif "label" in columns:
            row["label"] = to_label(label, f"{file}, {where}: the label of '{path}'")
        row["span"] = to_span([found.get(name) for name in SPAN], f"{file}, {where}")
        row["where"] = where
        row["known"] = {k: clean(str(found[k]).strip()) for k in KNOWN if found.get(k)}
        yield row


def to_label(value: Any, where: str) -> int:
    text = str(value)
    if not text.isdecimal() or len(text) > 9:  # labels are int32
        raise UserError(f"{where} is {value!r:.60}; it must be a whole number, 0 or more")
    return int(text)


def to_span(given: Sequence[Any], where: str) -> tuple[float, float] | None:
    """(start, end), or None if a row has neither."""
    if None in given or not any(str(at).strip() for at in given):
        return None
    try:
        start, end = (float(str(at)) for at in given)
    except ValueError:
        start = end = math.nan
    if not 0 <= start <= end < math.inf:
        raise UserError(f"{where}: start and end are {given}; they must be seconds, in this order")
    return start, end


Rows = Iterator[tuple[str, dict[str, Any]]]  # (place in the file, the row's values)


def read_csv(file: Path, columns: Mapping[str, str], delimiter: str = ",") -> Rows:
    _, first = next(lines.items(file), (1, ""))
    if re.search(r"[,\s]-?\d+$", first) and columns["path"] not in re.split(r"\W+", first):
        yield from read_txt(file, columns)  # without a header, as VideoMAE's lists
        return
    known, rows = lines.table(file, delimiter=delimiter)
    check_columns(str(file), known, columns.values())
    for number, row in rows:
        yield f"line {number}", pick(row, columns)


def read_tsv(file: Path, columns: Mapping[str, str]) -> Rows:
    return read_csv(file, columns, "\t")


def read_jsonl(file: Path, columns: Mapping[str, str]) -> Rows:
    for number, row in lines.each_json(file):
        if not isinstance(row, Mapping):
            names = " and ".join(columns.values())
            raise UserError(f"{file}, line {number}: not an object with {names}")
        check_columns(f"{file}, line {number}", list(row), columns.values())
        yield f"line {number}", pick(row, columns)


def pick(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The columns that `columns` names, by their role, and those with a fixed name."""
    more = {name: row[name] for name in (*KNOWN, *SPAN) if name in row}
    return more | {k: row.get(name) for k, name in columns.items()}


def read_json(file: Path, columns: Mapping[str, str]) -> Rows:
    if "label" in columns:
        raise UserError(f"{file}: {{path: caption}} holds no labels; use .csv, .jsonl or .txt")
    table = lines.read_json(file)
    if not isinstance(table, Mapping):
        raise UserError(f"{file} must be {{path: caption}}, not a {type(table).__name__}")
    for n, (path, captions) in enumerate(table.items(), 1):
        for caption in captions if captions and isinstance(captions, list) else [captions]:
            yield f"entry {n}", dict(path=path, caption=caption)


def read_txt(file: Path, columns: Mapping[str, str]) -> Rows:
    if "caption" in columns:
        raise UserError(
            f"{file}: `path label` lines hold no captions; set caption_column=None, or write a "
            "first line that names the columns"
        )
    for number, line in lines.items(file):
        found = next(filter(None, (form.fullmatch(line) for form in PAIRS)), None)
        path, label = found.groups() if found else ("", line)
        yield f"line {number}", dict(path=path, label=label or None)


def clean(text: str) -> str:
    """Text that UTF-8 can encode: lone surrogates, which JSON may have, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_columns(where: str, names: Sequence[str], columns: Iterable[str]) -> None:
    for column in columns:
        if column not in names:
            close = difflib.get_close_matches(column, names, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise UserError(f"{where} has no column '{column}'; it has {', '.join(names)}{hint}")
