"""Text files that people write: lines, tables and JSON, read strictly and with their places.

A file is UTF-8, with or without a byte-order mark. A line ends at LF, CR LF or CR and nowhere else:
`str.splitlines` also splits at U+2028, U+0085 and others, which occur inside captions and
vocabularies. Whatever would be lost in silence, such as the fields of a table beyond its columns or
the first of two equal keys, is a UserError that names the file and the line.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from vtp_jax.types import UserError

# Bytes to which a .gz may expand: so many times its own, and so many more. Text is compressed to a
# third or a tenth; gzip can write a thousand times what it reads.
RATIO, SMALL = 50, 1 << 26
LONGEST = 1 << 30  # characters of a field; Python's csv stops at 131,072 by itself
QUOTES = {  # parts of what Python's csv says, and what it means
    "unexpected end": "a quote is opened here and never closed",
    "expected after": 'text follows a closing quote; double the quotes within a value ("")',
}
WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def unusable(path: str | os.PathLike[str], error: OSError) -> UserError:
    """What the operating system says of a file, in one line."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"no file '{path}'")
    if isinstance(error, IsADirectoryError):
        return UserError(f"'{path}' is a folder; give a file")
    return UserError(f"cannot read '{path}': {error.strerror or error}")


def name(path: str | os.PathLike[str], given: Any, suffix: str = "") -> str:
    """A name that the file `path` has for another file in the same folder. Raises UserError for
    anything that could lead elsewhere, and for names without the suffix."""
    plain = isinstance(given, str) and given not in ("", ".", "..") and not set(given) & set("/\0")
    if not plain or not given.endswith(suffix):
        what = f"name of a {suffix} file" if suffix else "name of a file"
        raise UserError(f"{path} names {given!r:.80}, which is no {what} in its own folder")
    return given


class Expanded(io.RawIOBase):
    """What a .gz holds, up to `RATIO` times its size. Raises UserError where there is more."""

    def __init__(self, path: Path):
        self.path, self.file = path, gzip.GzipFile(path, "rb")
        self.left = RATIO * path.stat().st_size + SMALL

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        count = self.file.readinto(into)
        self.left -= count
        if self.left < 0:
            raise UserError(
                f"{self.path} expands to more than {RATIO} times its size; if you trust it, "
                f"decompress it: gzip -d '{self.path}'"
            )
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def open_bytes(path: Path) -> io.BufferedReader:
    """A file, decompressed if its name ends in .gz."""
    return io.BufferedReader(Expanded(path), 1 << 16) if path.suffix == ".gz" else path.open("rb")


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], newline: str | None = None) -> Iterator[TextIO]:
    """A text file, compressed if its name ends in .gz. Errors of reading it are UserErrors."""
    path = Path(path)
    try:
        with open_bytes(path) as file:
            start = file.read(4)
        for mark, kind in WIDE.items():
            if start.startswith(mark):
                raise UserError(f"{path} is not UTF-8 but {kind} (line 1); save it as UTF-8")
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError:
        raise UserError(undecodable(path)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise unusable(path, error) from None


def undecodable(path: Path) -> str:
    """The message for a file that is not UTF-8, with the place of its first wrong byte."""
    with open_bytes(path) as file:
        data = file.read()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        number = before.count(b"\n") + 1
        byte = f"0x{data[error.start]:02x}"
        return f"{path} is not UTF-8 (line {number}, byte {byte}); save it as UTF-8"
    return f"{path} is not UTF-8; save it as UTF-8"  # it changed in between


def each(path: str | os.PathLike[str], newline: str | None = None) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of every line, without its end; with it if `newline` is ""."""
    with opened(path, newline) as text:
        for number, line in enumerate(text, 1):
            if "\0" in line:
                raise UserError(
                    f"{path}, line {number}: a NUL character; if the file is UTF-16, save it as "
                    "UTF-8"
                )
            yield number, line if newline == "" else line.removesuffix("\n")


def items(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of every line that is not blank, without blanks around it."""
    for number, line in each(path):
        if line := line.removeprefix("\ufeff").strip():  # of files that were joined
            yield number, line


def read(path: str | os.PathLike[str]) -> str:
    """The text of a file."""
    with opened(path) as text:
        return text.read()


# Tables.


def table(
    path: str | os.PathLike[str],
    columns: Sequence[str] = (),
    *,
    delimiter: str = ",",
    strict: bool = True,
) -> tuple[Sequence[str], Iterator[tuple[int, dict[str, str]]]]:
    """The names of the columns, and (line at which it begins, {column: value}) of every row that is
    not blank.

    columns: the names of the columns, if the first line does not have them. A row may lack its last
    values; more values than columns are an error, unless they are empty. strict: whether quotes
    that do not enclose a field are an error.
    """
    rows = fields(path, delimiter, strict)
    named = list(columns)
    if not named:
        number, first = next(rows, (1, []))
        named = [name.strip() for name in first]
        while named and not named[-1]:  # a spreadsheet's empty columns
            named.pop()
        if not named:
            raise UserError(f"{path} is empty; its first line must name the columns")
        counts = collections.Counter(filter(None, named))
        if twice := [name for name, count in counts.items() if count > 1]:
            raise UserError(
                f"{path}, line {number}: two columns are named '{twice[0]}'; rename or remove one"
            )
    hint = "; enclose a value that has commas in quotes" if delimiter == "," else ""

    def values() -> Iterator[tuple[int, dict[str, str]]]:
        for number, row in rows:
            if any(value.strip() for value in row[len(named) :]):
                raise UserError(
                    f"{path}, line {number}: {len(row)} fields, but {len(named)} columns{hint}"
                )
            yield number, dict(zip(named, row, strict=False))

    return named, values()


def fields(
    path: str | os.PathLike[str], delimiter: str, strict: bool
) -> Iterator[tuple[int, list[str]]]:
    """(line at which it begins, fields) of every row that is not blank."""
    csv.field_size_limit(LONGEST)
    text = (line for _, line in each(path, newline=""))
    rows = csv.reader(text, delimiter=delimiter, strict=strict, skipinitialspace=strict)
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            wrong = next((text for part, text in QUOTES.items() if part in str(error)), str(error))
            raise UserError(f"{path}, line {number}: {wrong}") from None
        if any(value.strip() for value in row):
            yield number, row


# JSON.


def parse(text: str | bytes, where: str, advice: str = "", *, line: bool = False) -> Any:
    """The value of JSON text. Two equal keys of an object are an error.

    where: the file, and the place in it; advice: what to do if the text is not JSON; line: whether
    the text is one line, whose number is in `where`.
    """

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            key = next(key for key, count in counts.items() if count > 1)
            raise UserError(f"{where}: the key {key!r:.80} occurs twice; keep one")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{where}: is not UTF-8; save it as UTF-8") from None
    except RecursionError:
        raise UserError(f"{where}: is not JSON (too deep){advice}") from None
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if line else f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{where}: is not JSON ({at}: {error.msg}){advice}") from None
    except ValueError as error:  # a number of too many digits
        raise UserError(f"{where}: is not JSON ({error}){advice}") from None


def read_json(path: str | os.PathLike[str], advice: str = "") -> Any:
    """The value in a JSON file."""
    return parse(read(path), str(path), advice)


def read_object(path: str | os.PathLike[str], advice: str = "") -> Mapping[str, Any]:
    """The object in a JSON file."""
    found = read_json(path, advice)
    if not isinstance(found, dict):
        raise UserError(f"{path} is a {type(found).__name__}; it must be an object{advice}")
    return found


def each_json(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """(line, value) of every line of a file of JSON lines that is not blank."""
    for number, line in each(path):
        if line.strip():
            yield number, parse(line, f"{path}, line {number}", line=True)
