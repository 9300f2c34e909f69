"""Configs that come with the package, found by name: `simvtp/pretrain_webvid`.

In a checkout they are the files of configs/; a wheel carries them in vtp_jax/configs. They are
loaded by path and are not importable: another package may be called `configs`.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import vtp_jax
from vtp_jax.types import UserError

PACKAGE = Path(vtp_jax.__file__).parent


def names() -> dict[str, Path]:
    """The file of every config by its name, the path below the folder without `.py`."""
    installed = PACKAGE / "configs"
    folder = installed if installed.is_dir() else PACKAGE.parent / "configs"
    files = sorted(folder.rglob("*.py"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


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
