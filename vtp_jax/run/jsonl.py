"""Files of JSON lines in a run's folder, whose last line a kill may have cut off."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from etils import epath

from vtp_jax.run import paths

T = TypeVar("T")


class Damaged(NamedTuple):
    """A line that is not what it should be. number: from 1; why: an error's text."""

    number: int
    text: bytes
    why: str


def read(file: epath.Path, make: Callable[[dict[str, Any]], T]) -> tuple[list[T], list[Damaged]]:
    """What `make` makes of the object on each line, and the lines that are no objects, or that
    `make` fails on. Blank lines and a last one that was cut off are in neither; a file that does
    not exist has no lines."""
    good, damaged, number = [], [], 0
    for number, text in enumerate(_bytes(file).split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
            if not isinstance(value, dict):
                raise TypeError(f"a {type(value).__name__}, not an object")
            good.append(make(value))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            damaged.append(Damaged(number, text, str(error)))
    if damaged and damaged[-1].number == number:  # no line end follows it
        damaged.pop()
    return good, damaged


def append(file: epath.Path, value: Mapping[str, Any]) -> None:
    """Adds a line to a file, which is made if it does not exist."""
    line, before = f"{json.dumps(value)}\n", _bytes(file)
    if paths.in_bucket(file) or before[-1:] not in (b"", b"\n"):
        paths.replace(file, whole(file) + line)
        return
    with file.open("a") as opened:
        opened.write(line)


def whole(file: epath.Path) -> str:
    """The text of a file, without a last line that was cut off; empty if it does not exist."""
    text = _bytes(file).decode(errors="replace")
    before, end, last = text.rpartition("\n")
    try:
        json.loads(last)  # only its line end is missing
    except ValueError:
        return before + end
    return f"{text}\n"


def _bytes(file: epath.Path) -> bytes:
    return file.read_bytes() if file.exists() else b""
