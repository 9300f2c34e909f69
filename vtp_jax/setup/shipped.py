"""Configs that come with the package, found by name: `simvtp/pretrain_webvid`.

In a checkout they are the files of configs/; a wheel carries them in vtp_jax/configs. They are
loaded by path and are not importable: another package may be called `configs`.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import vtp_jax
from vtp_jax.types import UserError

PACKAGE = Path(vtp_jax.__file__).parent
HEAD = re.compile(r"^( +)switch +(\S)")  # of the table of switches


def names() -> dict[str, Path]:
    """The file of every config by its name, the path below the folder without `.py`."""
    installed = PACKAGE / "configs"
    folder = installed if installed.is_dir() else PACKAGE.parent / "configs"
    files = sorted(folder.rglob("*.py"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def about(path: Path) -> str:
    """The first sentence of a config's docstring, on one line; the file is not executed."""
    first = docstring(path).split("\n\n")[0]
    return " ".join(first.split())


def switches(path: Path) -> list[str]:
    """The switches of a config: the names in the first column of the table `switch ...` in its
    docstring, of which the next column begins where its heading does."""
    lines = iter(docstring(path).splitlines())
    head = next((found for line in lines if (found := HEAD.match(line))), None)
    if head is None:
        return []
    rows = itertools.takewhile(str.strip, lines)
    cells = (row[head.end(1) : head.start(2)] for row in rows)
    return [name for cell in cells for name in cell.replace(",", " ").split()]


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def execute(path: Path) -> ModuleType:
    """The module that a Python file defines. Raises UserError if it is not a Python file, and
    whatever executing it raises."""
    name = f"vtp_config:{path.resolve()}"  # the path: one config may load another
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"config {path}: neither a .py nor a .json file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses resolve their annotations there
    spec.loader.exec_module(module)
    return module


@functools.cache
def module(name: str) -> ModuleType:
    """The module of a shipped config, for a config that builds on another one."""
    return execute(names()[name])
