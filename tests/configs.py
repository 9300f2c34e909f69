"""Every config of the project, for tests that hold for all of them."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from vtp_jax import cli

ROOT = Path(__file__).parent.parent


def config_files() -> list[str]:
    """All files of configs/ that define get_config, relative to the root."""
    files = sorted((ROOT / "configs").rglob("*.py"))
    return [
        str(f.relative_to(ROOT)) for f in files if "def get_config" in f.read_text(encoding="utf-8")
    ]


def switches(path: str) -> list[str]:
    """The switches a config knows: what it passes to parse_arg."""
    text = (ROOT / path).read_text(encoding="utf-8")
    found = re.search(r"parse_arg\(\s*arg, ([^)]*)\)", text)
    return re.findall(r'"(\w+)"', found[1]) if found else []


def tiny_configs() -> list[str]:
    return [f"{path}:tiny" for path in config_files()]


def one_for_each(*, tasks: bool) -> list[str]:
    """The first tiny config of each method, or of each method and task: two configs of one show
    nothing more where compiling is dear."""
    configs = {p: cli.load_config(str(ROOT / p)) for p in tiny_configs()}
    names = {p: c.task.name if "task" in c else "" for p, c in configs.items()}
    chosen: dict[tuple[str, str], str] = {}
    for path, c in configs.items():
        if tasks or not names[path]:
            chosen.setdefault((c.method.name, names[path]), path)
    return list(chosen.values())


def slow_unless(quick: Collection[str], why: str) -> list[Any]:
    """All tiny configs as parameters of a test, marked slow but for those in `quick`."""
    marks = pytest.mark.slow(reason=why)
    return [p if p in quick else pytest.param(p, marks=marks) for p in tiny_configs()]
