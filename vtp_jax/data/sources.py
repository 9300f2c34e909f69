"""Lists of videos and their captions: what there is, before anything is read.

Captions come as CSV (named columns), as JSON lines (the same names), or as SimVTP's JSON, {path:
caption} or {path: [captions]}. Paths are relative to `root`. Several captions of one video are
several rows or a list; they stay in the order of the file.
"""

from __future__ import annotations

import csv
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vtp_jax.types import UserError

VIDEOS = frozenset(
    (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
)


class Clip(NamedTuple):
    """A video, by its path under the source's root, and its captions."""

    path: str
    captions: tuple[str, ...]


class Source(NamedTuple):
    """Videos with captions. A clip's position in `clips` is its id in batches."""

    root: str
    clips: tuple[Clip, ...]

    def file(self, index: int) -> str:
        return os.path.join(self.root, self.clips[index].path)


def load(
    root: str | os.PathLike[str],
    captions: str | os.PathLike[str],
    *,
    path_column: str = "path",
    caption_column: str = "caption",
    max_absent: float = 0.0,
) -> Source:
    """The videos under `root` that the file `captions` (.csv, .jsonl or .json) names.

    max_absent: the share of named files that may be absent. They keep their places in the list and
    count as unreadable (`missing`) when their turn comes. Anything else wrong is a UserError.
    """
    root, captions = Path(root), Path(captions)
    if not root.is_dir():
        raise UserError(f"no folder '{root}'; `root` must be the folder that holds the videos")
    merged: dict[str, list[str]] = {}
    for path, caption in read_captions(captions, path_column, caption_column):
        merged.setdefault(path, []).append(caption)
    if not merged:
        raise UserError(f"{captions} lists no captions; it needs a row for every video")
    absent = [path for path in merged if not (root / path).is_file()]
    if len(absent) > max_absent * len(merged):
        if len(absent) == len(merged) and next(find_videos(root), None) is None:
            raise UserError(f"the folder {root} holds no videos; put them there or mend `root`")
        raise UserError(
            f"{captions} names {len(absent)} of {len(merged)} files that are not in {root}, "
            f"first '{absent[0]}'; mend `root` or the paths, or allow a share with max_absent"
        )
    return Source(str(root), tuple(Clip(path, tuple(texts)) for path, texts in merged.items()))


def from_files(
    paths: Sequence[str | os.PathLike[str]], captions: Sequence[str] | None = None
) -> Source:
    """A source of the given files, or of all videos in the given folders, sorted by name.

    captions: one for each path, or None where there are none, as for looking at reconstructions.
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


def find_videos(folder: Path) -> Iterator[Path]:
    """Every file below `folder` whose name ends like a video's."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, n) for n in names if Path(n).suffix.lower() in VIDEOS)


def read_captions(
    file: Path, path_column: str = "path", caption_column: str = "caption"
) -> Iterator[tuple[str, str]]:
    """(path, caption) pairs of a caption file, in its order."""
    readers = {".csv": read_csv, ".jsonl": read_jsonl, ".json": read_json}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{file}: unknown format; captions come as .csv, .jsonl or .json")
    if not file.is_file():
        raise UserError(f"no caption file '{file}'; give one as .csv, .jsonl or .json")
    try:
        for where, path, caption in reader(file, path_column, caption_column):
            if not (isinstance(path, str) and path):
                raise UserError(f"{file}, {where}: the path is {path!r}; it must be text")
            if not (isinstance(caption, str) and caption.strip()):
                raise UserError(f"{file}, {where}: '{path}' has no caption; write one or drop it")
            yield path, caption.strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read as {file.suffix[1:].upper()}: {error}") from None


def read_csv(file: Path, *columns: str) -> Iterator[tuple[str, Any, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        table = csv.DictReader(text)
        known = list(table.fieldnames or ())
        if not known:
            raise UserError(f"{file} is empty; its first line must name the columns")
        check_columns(file, known, columns)
        for row in table:
            yield f"line {table.line_num}", row[columns[0]], row[columns[1]]


def read_jsonl(file: Path, *columns: str) -> Iterator[tuple[str, Any, Any]]:
    with file.open(encoding="utf-8-sig") as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, Mapping):
                raise UserError(
                    f"{file}, line {number}: not an object with {' and '.join(columns)}"
                )
            check_columns(file, list(row), columns)
            yield f"line {number}", row[columns[0]], row[columns[1]]


def read_json(file: Path, *_: str) -> Iterator[tuple[str, Any, Any]]:
    table = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(table, Mapping):
        raise UserError(f"{file} must be {{path: caption}}, not a {type(table).__name__}")
    for n, (path, captions) in enumerate(table.items(), 1):
        for caption in captions if captions and isinstance(captions, list) else [captions]:
            yield f"entry {n}", path, caption


def check_columns(file: Path, known: Sequence[Any], columns: Sequence[str]) -> None:
    names = [str(k) for k in known if k is not None]
    for column in columns:
        if column not in names:
            close = difflib.get_close_matches(column, names, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise UserError(f"{file} has no column '{column}'; it has {', '.join(names)}{hint}")
