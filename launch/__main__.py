"""Starts training on this machine or on a cluster: local, tpu_vm, gke, slurm, sky.

    vtp launch PLACE --config C --workdir W [--dry-run] [--config.x=value]
    vtp launch PLACE --help

`python -m launch.PLACE` does the same in a checkout where nothing is installed.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .common import fail, run

PLACES = ("local", "tpu_vm", "gke", "slurm", "sky")


def overview() -> Iterator[str]:
    """What is said without a place: every one with the first line of its docstring."""
    yield f"{__doc__}"
    for place in PLACES:
        text = Path(__file__).with_name(f"{place}.py").read_text(encoding="utf-8")
        yield f"  {place:8} {(ast.get_docstring(ast.parse(text)) or '').splitlines()[0]}"


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("\n".join(overview()))
    elif argv[0] in PLACES:
        importlib.import_module(f"{__package__}.{argv[0]}").main(argv[1:])
    else:
        fail(f"vtp launch: no place '{argv[0]}'; known: {', '.join(PLACES)}")


if __name__ == "__main__":
    run(main)
