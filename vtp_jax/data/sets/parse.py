"""Annotation files of all kinds as records that keep their place in a file.

A `Record` validates each value that is taken from it, so that a reader is a list of fields, and an
error in a file is reported in one line: file, row, and what is wrong.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from vtp_jax import lines, pickles
from vtp_jax.data.sets.rows import Span
from vtp_jax.types import UserError

NO_LITERAL = (MemoryError, RecursionError, SyntaxError, TypeError, ValueError)
AGAIN = "; get the file again"


class Record:
    """A row of a file, or a part of one, with its place."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: is a {type(values).__name__}; it must be an object")
        self.values = values
        self.where = where

    def fail(self, wrong: str) -> NoReturn:
        raise UserError(f"{self.where}: {wrong}")

    def get(self, *names: str) -> Any:
        """The value of the first of the names that the row has."""
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        found = ", ".join(map(str, self.values))
        self.fail(f"has no {' or '.join(map(repr, names))}; it has {found or 'nothing'}")

    def text(self, *names: str) -> str:
        """Text, or a whole number as text, stripped. Must not be empty."""
        value = self.get(*names)
        text = str(value).strip() if isinstance(value, (str, int)) else ""
        return text or self.fail(f"{names[0]!r} is {value!r:.60}; it must be text")

    def texts(self, *names: str) -> tuple[str, ...]:
        """A list of texts, or a single one. Empty ones are dropped, but one must remain."""
        value = self.get(*names)
        listed = value if isinstance(value, (list, tuple)) else [value]
        texts = tuple(t.strip() for t in listed if isinstance(t, str) and t.strip())
        return texts or self.fail(f"{names[0]!r} is {value!r:.60}; it must be texts")

    def number(self, *names: str) -> float:
        return number(self.get(*names), f"{self.where}: {names[0]!r}")

    def count(self, *names: str) -> int:
        """A whole number, 0 or more."""
        value = self.get(*names)
        if not re.fullmatch(r"\d{1,18}", str(value).strip()):
            self.fail(f"{names[0]!r} is {value!r:.60}; it must be a whole number, 0 or more")
        return int(value)

    def seconds(self, *names: str) -> float:
        """hours:minutes:seconds, or only seconds."""
        return seconds(self.get(*names), f"{self.where}: {names[0]!r}")

    def spans(self, *names: str) -> tuple[Span, ...]:
        """A list of [start, end]."""
        return tuple(span(value, f"{self.where}: {names[0]!r}") for value in self.listed(*names))

    def listed(self, *names: str) -> list[Any]:
        """A list, or the text of a Python list."""
        value = self.get(*names)
        if isinstance(value, str):
            with contextlib.suppress(*NO_LITERAL):
                value = ast.literal_eval(value)
        if not isinstance(value, (list, tuple)):
            self.fail(f"{names[0]!r} is {value!r:.60}; it must be a list")
        return list(value)

    def part(self, *names: str) -> Record:
        return Record(self.get(*names), f"{self.where}, {names[0]!r}")

    def parts(self, *names: str) -> Iterator[Record]:
        for n, value in enumerate(self.listed(*names), 1):
            yield Record(value, f"{self.where}, {names[0]!r} {n}")


def number(value: Any, where: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not abs(found) < float("inf") or isinstance(value, bool):
        raise UserError(f"{where} is {value!r:.60}; it must be a number")
    return found


def seconds(value: Any, where: str) -> float:
    total = 0.0
    for part in str(value).split(":"):
        total = 60 * total + number(part, where)
    return total


def span(value: Any, where: str) -> Span:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise UserError(f"{where} holds {value!r:.60}; it must be [start, end]")
    return seconds(value[0], where), seconds(value[1], where)


# Files.


def read_text(file: Path) -> str:
    return lines.read(file)


def read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of every line that is not empty, stripped."""
    return ((f"{file}, line {n}", line) for n, line in lines.items(file))


def read_json(file: Path) -> Any:
    return lines.read_json(file, AGAIN)


def read_table(file: Path) -> Any:
    """The plain data of a JSON file, or of a pickle, which is read without executing it."""
    return read_json(file) if file.suffix == ".json" else pickles.read(file)


def parse_json(text: str | bytes, where: str) -> Any:
    return lines.parse(text, where, AGAIN, line=True)


def read_object(file: Path) -> Record:
    """The object in a JSON file."""
    return Record(read_json(file), str(file))


def read_list(file: Path) -> Iterator[Record]:
    """The objects of a JSON list, or of JSON lines."""
    if file.suffix == ".jsonl":
        for n, line in lines.items(file):  # line by line: some have millions
            where = f"{file}, line {n}"
            yield Record(parse_json(line, where), where)
        return
    items = read_json(file)
    if not isinstance(items, list):
        raise UserError(f"{file} is a {type(items).__name__}; it must be a list")
    for n, item in enumerate(items, 1):
        yield Record(item, f"{file}, entry {n}")


def read_csv(file: Path, *columns: str, delimiter: str = ",") -> Iterator[Record]:
    """The rows of a table. Its columns are named by its first line, or, if there is no such line,
    by `columns`."""
    _, rows = lines.table(file, columns, delimiter=delimiter, strict=False)
    return (Record(row, f"{file}, line {number}") for number, row in rows)


def read_column(file: Path, column: str) -> list[str]:
    """The names in a .txt file, one per line, or in a column of a .csv file."""
    if file.suffix == ".csv":
        return [row.text(column) for row in read_csv(file)]
    return [line for _, line in read_lines(file)]


def read_parquet(file: Path, column: str) -> Iterator[Record]:
    """A column of objects of a parquet file; the others are not read."""
    for n, batch in enumerate(open_parquet(file).iter_batches(64, columns=[column])):
        for i, value in enumerate(batch.column(0).to_pylist(), 64 * n + 1):
            where = f"{file}, row {i}"
            yield Record(parse_json(value, where) if isinstance(value, str) else value, where)


def read_blobs(file: Path, column: str) -> Iterator[bytes]:
    """A column of bytes of a parquet file."""
    for batch in open_parquet(file).iter_batches(4, columns=[column]):
        yield from batch.column(0).to_pylist()


def open_parquet(file: Path) -> Any:
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{file}: parquet needs pyarrow; pip install 'vtp_jax[tfds]'") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} is not parquet: {error}") from None
