"""Video-text pretraining in JAX: the console command `vtp`, one name for all entries."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ENTRIES = dict(
    train="train",
    configs="configs_list",
    evaluate="evaluate",
    visualize="visualize",
    report="report",
    prepare="prepare",
    sets="data.sets.__main__",
    convert="convert.__main__",
    plan="plan",
    bench="bench",
    parity="parity",
    demo="demo",
)


def overview() -> Iterator[str]:
    """Every entry with the first line of its docstring, read from the file without importing it:
    JAX alone takes a second to import."""
    yield f"{__doc__}\n\nusage: vtp ENTRY ...; vtp ENTRY --help\n"
    for name, module in ENTRIES.items():
        path = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        yield f"  {name:10} {about.splitlines()[0]}"


def dispatch(argv: Sequence[str]) -> None:
    """Runs the entry that argv[0] names. Raises UserError if there is none of that name."""
    from vtp_jax.setup import cli

    module = cli.choose("vtp", "entry", argv[0], ENTRIES)
    importlib.import_module(f"vtp_jax.{module}").main(argv[1:])


def main() -> None:
    """The console command `vtp`."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print("\n".join(overview()))
        return
    from vtp_jax.setup import cli

    cli.run(dispatch, argv)


if __name__ == "__main__":
    main()
