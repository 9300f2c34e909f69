"""The tables in README.md and docs/ that are made from code: `make tables` writes them,
test_docs.py compares.

    python -m tests.tables

A table lies between `<!-- table NAME: python -m tests.tables -->` and `<!-- end of the table -->`;
its NAME is a key of TABLES. What it is made from:

    methods    headers of vtp_jax/methods/*.py (`HEADER`), and the configs that train each paper
    names      of the same papers, in a sentence
    tasks      headers of vtp_jax/tasks/*.py
    bases      the cases of tests/methods/cases.py
    formats    the file formats of vtp_jax.convert
    sets       vtp_jax.data.sets
    learning   benchmarks/results/learning.jsonl
    parity     the steps and formats of vtp_jax.convert, and benchmarks/results/parity.json
    steps      the training steps of vtp_jax.convert
    house      the first sentence of every docstring in vtp_jax
    rooms      the directions of imports in tests/test_imports.py
    python     the docstrings of vtp_jax.api
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import learning, parity
from tests import test_imports
from tests.configs import ROOT, config_files
from tests.methods.cases import CASES
from vtp_jax import __main__ as vtp
from vtp_jax import api
from vtp_jax.convert.families import FORMATS
from vtp_jax.data.sets import __main__ as sets
from vtp_jax.setup import config
from vtp_jax.show import draw

COMMAND = "python -m tests.tables"
TABLE = re.compile(rf"(<!-- table (\w+): {COMMAND} -->\n).*?(<!-- end of the table -->)", re.S)
PAPER = re.compile(r"^(\S.*?): [^()]*\([^()]*arXiv (\d{4}\.\d{5})\)\.", re.M | re.S)
HEADER = dict(
    methods=("Code", "Data", "Parity", "Idea", "Command", "Published"),
    tasks=("Needs", "Batch", "Evaluator"),
)


def parts(kind: str) -> dict[str, Path]:
    """{name: file} of the methods or the tasks."""
    return {p.stem: p for p in sorted((ROOT / "vtp_jax" / kind).glob("[a-z]*.py"))}


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def header(path: Path) -> dict[str, str]:
    """{field: text} of a header. A field is `Name:` with its text from column 11 on."""
    field = r"\n([A-Z]\w+): +(?<=\n.{11})(\S.*(?:\n {11}.*)*)"
    return {name: " ".join(text.split()) for name, text in re.findall(field, docstring(path))}


class Paper(NamedTuple):
    name: str
    arxiv: str


def papers(path: Path) -> list[Paper]:
    """The papers of a method file: `NAME: title (authors, arXiv NUMBER).`, before its fields."""
    title = docstring(path).partition("\n\n")[0]
    return [Paper(*found) for found in PAPER.findall(title.replace("arXiv\n", "arXiv "))]


def faults(kind: str, path: Path) -> Iterator[str]:
    """What is wrong with the header of a method or a task, in a line each."""
    where, wanted, found = path.relative_to(ROOT), HEADER[kind], tuple(header(path))
    if found[: len(wanted)] != wanted:
        yield (
            f"{where}: the fields of the header must be {', '.join(wanted)}, in this order, each "
            f"with its text from the 12th character on; found: {', '.join(found) or 'none'}"
        )
    if kind == "methods" and not papers(path):
        yield f"{where}: the header must begin with `NAME: title (authors, arXiv NUMBER).`"
    if kind == "methods" and not re.search(r"^Deviations", docstring(path), re.M):
        yield f"{where}: the header must have a paragraph that begins with `Deviations`"


@functools.cache
def configs() -> Mapping[str, list[str]]:
    """{arXiv number: the configs that train it}. A config belongs to the paper of its method; if
    that file has several papers, to the one that the config's header cites."""
    found: dict[str, list[str]] = {}
    for path in config_files():
        method = config.load(str(ROOT / path)).method["name"]
        known = papers(parts("methods")[method])
        cited = [one for one in known if one.arxiv in docstring(ROOT / path)]
        meant = known if len(known) == 1 else cited
        if len(meant) != 1:
            numbers = " or ".join(one.arxiv for one in known) or "none"
            raise ValueError(f"{path}: its header must cite one paper of {method}.py: {numbers}")
        found.setdefault(meant[0].arxiv, []).append(path)
    return found


def name_of(path: str) -> str:
    return path.removeprefix("configs/").removesuffix(".py")


def rows(head: Sequence[str], cells: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for line in cells:
        yield f"| {' | '.join(line)} |"


def methods() -> Iterator[str]:
    def cells() -> Iterator[Sequence[str]]:
        for name, path in parts("methods").items():
            fields = header(path)
            for paper in papers(path):
                trained = (f"`{name_of(c)}`" for c in configs().get(paper.arxiv, ()))
                link = f"[{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
                file = f"`{name}.py`"
                shown = (paper.name, link, file, fields["Data"], "<br>".join(trained))
                yield *shown, fields["Parity"]

    return rows(("method", "paper", "file", "data", "configs", "parity"), cells())


def names() -> Iterator[str]:
    """The sentence of README.md that follows the paragraph on SimVTP."""
    *some, last = (one.name for path in parts("methods").values() for one in papers(path)
                   if one.name != "SimVTP")  # fmt: skip
    methods = f"{', '.join(some)} and {last} are built from the same parts:"
    yield from textwrap.wrap(f"{methods} [docs/methods.md](docs/methods.md).", 110)


def tasks() -> Iterator[str]:
    found = ((f"`{name}`", *map(header(path).get, HEADER["tasks"]))
             for name, path in parts("tasks").items())  # fmt: skip
    return rows(("task", "what it needs of a method", "batch", "evaluator"), found)


def matrix() -> Iterator[str]:
    def cells() -> Iterator[Sequence[str]]:
        for name, case in sorted(CASES.items()):
            if case.tasks:
                shown = [", ".join(f"`{one}`" for one in some) for some in case.tasks]
                yield name, *(text or "no" for text in shown[:3]), *shown[3:5]

    head = ("`retrieve`", "`classify`", "`answer`")
    return rows(("method", *head, "never read by `classify`", "nor with `mean_norm`"), cells())


def file_formats() -> Iterator[str]:
    found = ((f"`{name}`", one.about, f"{one.proof.tolerance:.0e}")
             for name, one in FORMATS.items() if one.proof)  # fmt: skip
    return rows(("format", "weights of", "tolerance"), found)


def sentence(path: Path) -> str:
    """The first sentence of a file's docstring, without the full stop."""
    text = " ".join(docstring(path).partition("\n\n")[0].split())
    return re.split(r"\.(?: |$)", text, maxsplit=1)[0]


def house() -> Iterator[str]:
    """The entries, the parts in the root, and every room with its files."""
    root = ROOT / "vtp_jax"

    def shown(path: Path, name: str, indent: int = 4) -> str:
        return f"{' ' * indent}{name:{28 - indent}}{sentence(path)}"

    yield from ("```", "vtp_jax/", "  entries, run by `vtp`")
    entries = [f"{module.replace('.', '/')}.py" for module in vtp.ENTRIES.values()]
    yield from (
        shown(vtp.source(name), file) for name, file in zip(vtp.ENTRIES, entries, strict=True)
    )
    yield "  parts in the root: the contract, pure functions, and the interface from Python"
    parts = sorted(p for p in root.glob("[a-z]*.py") if p.name not in entries)
    yield from (shown(path, path.name) for path in parts)
    for room in sorted(root.glob("*/__init__.py")):
        yield shown(room, f"{room.parent.name}/", indent=2)
        files = {p.name: p for p in room.parent.glob("[a-z]*.py")}
        folders = {f"{p.parent.name}/": p for p in room.parent.glob("*/__init__.py")}
        yield from (shown(path, name) for name, path in sorted((files | folders).items()))
    yield "```"


def rooms() -> Iterator[str]:
    """What rooms may import, besides themselves; rooms with the same rights share a line."""
    found: dict[frozenset[str], list[str]] = {}
    for room, others in test_imports.ALLOWED.items():
        found.setdefault(frozenset(others), []).append(room)
    lines = ([", ".join(f"`{one}`" for one in sorted(names)) for names in (some, others)]
             for others, some in found.items())  # fmt: skip
    return rows(("rooms", "may import"), ((some, others or "nothing") for some, others in lines))


def python() -> Iterator[str]:
    """The interface from Python, by its docstrings: functions, methods and what they return."""
    yield from described("vtp_jax.load", api.load, "##")
    yield from described("Model", api.Model, "##", sign=False)
    for name, member in vars(api.Model).items():
        if not name.startswith("_"):
            yield from described(f"model.{name}", member, "###")
    for kind in (api.Hit, api.Guess, api.Index, draw.Restored):
        yield from described(kind.__name__, kind, "###", sign=False)
        yield from ("", f"Fields: {', '.join(f'`{one}`' for one in kind._fields)}.")


def described(name: str, thing: Any, head: str, sign: bool = True) -> Iterator[str]:
    """A heading, the signature and the docstring, of which a line is a paragraph's part."""
    function = getattr(thing, "fget", thing)
    yield from ("", f"{head} {name}", "")
    if sign and not isinstance(thing, property):
        takes = inspect.signature(function)
        shown = [p.replace(annotation=p.empty) for p in takes.parameters.values()
                 if p.name != "self"]  # fmt: skip
        yield from (
            "```python",
            f"{name}{takes.replace(parameters=shown, return_annotation=takes.empty)}",
            "```",
            "",
        )
    yield from (inspect.getdoc(function) or "").splitlines()


TABLES: Mapping[str, Callable[[], Iterator[str]]] = dict(
    methods=methods,
    names=names,
    tasks=tasks,
    bases=matrix,
    formats=file_formats,
    sets=sets.table,
    learning=learning.table,
    parity=parity.table,
    steps=parity.steps,
    house=house,
    python=python,
    rooms=rooms,
)


def pages() -> dict[Path, str]:
    """{page: its text with the tables made again}, of all pages that have one."""
    found = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if TABLE.search(text):
            found[page] = TABLE.sub(lambda m: "\n".join((m[1], *TABLES[m[2]](), "", m[3])), text)
    return found


def main() -> None:
    files = ((kind, path) for kind in HEADER for path in parts(kind).values())
    if wrong := [line for kind, path in files for line in faults(kind, path)]:
        raise SystemExit("\n".join(wrong))
    for page, text in pages().items():
        if page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
