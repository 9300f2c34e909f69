"""Commands in headers and documents, checked against the entries that would run them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from vtp_jax import __main__ as vtp
from vtp_jax.setup import cli

COMMAND = re.compile(r"^(?:Command:)? *(?:vtp |python -m vtp_jax\.)([a-z].*)$", re.M)
CHOICE = re.compile(r"(\w+)(\|\w+)+")  # a|b


def commands(text: str) -> Iterator[list[str]]:
    """The words after `vtp` of each line with a command, without what is optional (in brackets) and
    without an explanation after three spaces. `python -m vtp_jax.train` counts as `vtp train`."""
    for line in COMMAND.findall(text.replace("\\\n", " ")):
        kept = re.split(r" \[|(?<=\S)   +", re.sub(r" {2,}(?=--)", " ", line))[0]
        words = shlex.split(CHOICE.sub(r"\1", kept))
        words[0] = {"data.sets": "sets"}.get(words[0], words[0])
        yield words


class Understood(BaseException):  # which no entry turns into a line
    """Raised in place of running a command, once its arguments have been parsed."""


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """(arguments, overrides) of a command as its entry parses them; raises UserError if the entry
    does not understand it. A launcher, which has no config, renders its script."""
    if words[0] == "launch":
        with contextlib.redirect_stdout(io.StringIO()):
            vtp.load("launch").main([*words[1:], "--dry-run"])
        return None, []
    split, found = cli.split, []

    def stop(*given: Any) -> Any:
        found.append(split(*given))
        raise Understood

    with monkeypatch.context() as patch, pytest.raises(Understood):
        patch.setattr(cli, "split", stop)
        vtp.load(words[0]).main(words[1:])
    return found[0]
