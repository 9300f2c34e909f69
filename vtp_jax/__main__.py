"""Video-text pretraining in JAX: the console command `vtp`, one name for all entries."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from vtp_jax.run import pipes

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
    serve="serve",
    launch="launch.__main__",
)


def source(name: str) -> Path:
    """The file of an entry. A wheel has the launchers in vtp_jax/launch, a checkout beside the
    package: they run where nothing that vtp_jax imports is installed."""
    folder, path = Path(__file__).parent, ENTRIES[name].replace(".", "/") + ".py"
    if name == "launch" and not (folder / "launch").is_dir():
        folder = folder.parent
    return folder / path


def load(name: str) -> ModuleType:
    """The module of an entry."""
    folder = Path(__file__).parent
    if source(name).is_relative_to(folder):
        return importlib.import_module(f"vtp_jax.{ENTRIES[name]}")
    if (root := str(folder.parent)) not in sys.path:
        sys.path.insert(0, root)
    return importlib.import_module(ENTRIES[name])


def overview() -> Iterator[str]:
    """Every entry with the first line of its docstring, read from the file without importing it:
    JAX alone takes a second to import."""
    yield f"{__doc__}\n\nusage: vtp ENTRY ...; vtp ENTRY --help\n"
    for name in ENTRIES:
        about = ast.get_docstring(ast.parse(source(name).read_text(encoding="utf-8"))) or ""
        yield f"  {name:10} {about.splitlines()[0]}"


def dispatch(argv: Sequence[str]) -> None:
    """Runs the entry that argv[0] names. Raises UserError if there is none of that name."""
    from vtp_jax.setup import cli

    cli.choose("vtp", "entry", argv[0], ENTRIES)
    load(argv[0]).main(argv[1:])


def main() -> None:
    """The console command `vtp`."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        with pipes.watched():
            return print("\n".join(overview()))
    if argv[0] == "launch":  # without JAX
        with pipes.watched():
            return load("launch").main(argv[1:])
    try:
        from vtp_jax.setup import cli
    except KeyboardInterrupt:  # JAX alone takes a second to import
        sys.stderr.write("interrupted\n")
        sys.exit(130)  # stop.Exit.INTERRUPTED
    cli.run(dispatch, argv)


if __name__ == "__main__":
    main()
