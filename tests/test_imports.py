"""The allowed directions of imports, read from the syntax trees; and no TensorFlow outside
`vtp_jax.data`."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "vtp_jax"
FILES = sorted(ROOT.rglob("*.py"))
BASE = {"types", "tree", "schedules"}
PARTS = {"nn", "masking", "augment", "objectives"}
# room -> what it may import besides itself. A room that is not listed holds entries: they may
# import everything, and nothing below them may import them.
ALLOWED = {
    "types": set(),
    "tree": {"types"},
    "schedules": {"types"},
    **{part: BASE | PARTS for part in PARTS},
    "methods": BASE | PARTS,
    "tasks": BASE | PARTS | {"lines"},
    "lines": {"types"},
    "pickles": {"types"},
    "progress": set(),
    "data": {"types", "lines", "pickles", "progress"},
    "run": BASE | {"lines", "progress"},
    "evals": {"types", "run"},
    "setup": BASE | {"lines", "nn", "data", "evals", "run"},
    "show": {"types", "lines", "run", "evals", "setup"},
    "measure": BASE | {"lines", "data", "run", "setup"},
    "convert": (
        BASE | PARTS | {"data", "lines", "pickles", "methods", "tasks", "run", "setup", "reference"}
    ),
    "reference": {"types"},  # conversions are checked against it: it shares nothing
}


def room_of(name: str) -> str:
    """The room of a module of `vtp_jax`."""
    _, *parts = name.split(".")
    return "reference" if parts[:2] == ["convert", "reference"] else (parts or ["__init__"])[0]


def room(path: Path) -> str:
    return "entries" if path.stem == "__main__" else room_of(module(path))


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:  # ruff's TID252: none is relative
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_allowed_directions(path):
    names = set(imported(path))
    assert not any(n == "configs" or n.startswith("configs.") for n in names)
    if room(path) != "data":
        assert not any(n.split(".")[0] == "tensorflow" for n in names)
    ours = {room_of(n) for n in names if n.startswith("vtp_jax.")}
    if room(path) in ALLOWED:
        assert ours <= ALLOWED[room(path)] | {room(path)}, path
    if room(path) == "reference":  # numpy alone
        assert not {n.split(".")[0] for n in names} & {"jax", "flax", "torch"}, path
    if room(path) == "methods":  # one method never imports another
        others = {n for n in names if n.split(".")[:2] == ["vtp_jax", "methods"]}
        assert not others, path


def module(path: Path) -> str:
    parts = ["vtp_jax", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


def test_imports_have_no_cycle():
    known = {module(path): path for path in FILES}
    graph = {name: {n for n in imported(path) if n in known} for name, path in known.items()}
    # A package that is named only on the way to one of its modules imports nothing.
    packages = {name for name in known if known[name].stem == "__init__"}
    graph = {name: others - packages - {name} for name, others in graph.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_everything_imports_without_tensorflow():
    modules = [
        ".".join(["vtp_jax", *p.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        for p in FILES
        if p.parent.name != "pytorch" or p.stem == "__init__"  # the shipped module needs torch
    ]
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "import importlib\n"
        f"[importlib.import_module(m) for m in {modules!r}]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
