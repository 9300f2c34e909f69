"""What the documents state about the code is true: tables, links, files, entries; and the headers
that tables are made from."""

import importlib
import re

import pytest

from tests import commands, tables
from tests.configs import ROOT
from vtp_jax import __main__ as vtp
from vtp_jax.setup import config

PAGES = sorted([ROOT / "README.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").glob("*.md")])
PARTS = [(kind, name) for kind in tables.HEADER for name in tables.parts(kind)]
FOLDERS = ("vtp_jax", "configs", "docs", "tests", "benchmarks", "launch")
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def prose(text: str) -> str:
    """Markdown without its fenced code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_tables_are_what_the_code_makes():
    stale = [str(page.relative_to(ROOT)) for page, text in tables.pages().items()
             if page.read_text(encoding="utf-8") != text]  # fmt: skip
    assert not stale, f"stale tables; run {tables.COMMAND}"


def test_every_table_is_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert sorted(name for _, name, _ in tables.TABLE.findall(text)) == sorted(tables.TABLES)


@pytest.mark.parametrize("kind, name", PARTS, ids=[f"{kind}/{name}" for kind, name in PARTS])
def test_a_header_has_its_fields_in_order(kind, name):
    """A method: papers as `NAME: title (authors, arXiv NUMBER).`, then the fields, then the
    deviations in a paragraph of their own (docs/a-method-from-a-paper.md)."""
    wrong = list(tables.faults(kind, tables.parts(kind)[name]))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_pages_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def files() -> set[str]:
    """Every file and folder of the repository's folders, relative to its root."""
    found = (p for folder in FOLDERS for p in (ROOT / folder).rglob("*"))
    return {str(p.relative_to(ROOT)) for p in (*found, *ROOT.glob("[!.]*"))}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_in_backticks_exist(page):
    """`configs/demo.py`, or the end of a path: `methods/simvtp.py`; a config may have a switch."""
    known = files()
    for name in re.findall(r"`([\w./]+?)/?(?::\w+)?`", prose(page.read_text(encoding="utf-8"))):
        if name.endswith(".py") or name.split("/")[0] in FOLDERS:
            assert name in known or any(one.endswith(f"/{name}") for one in known), name


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_names_in_backticks_are_in_their_modules(page):
    for name in re.findall(r"`(vtp_jax(?:\.\w+)+)`", prose(page.read_text(encoding="utf-8"))):
        assert resolve(name), name


def resolve(name: str) -> object:
    """The module or the object of a dotted name; None where there is none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        outer, _, last = name.rpartition(".")
        return getattr(resolve(outer), last, None) if outer else None


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_entries_and_targets(page):
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:vtp_jax|benchmarks|launch|tests)[\w.]*\w)", text):
        path = ROOT / module.replace(".", "/")
        main = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert main.exists() and '__name__ == "__main__"' in main.read_text(), module
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert called("make", text) <= targets
    assert called("vtp", text) <= set(vtp.ENTRIES)


def called(command: str, text: str) -> set[str]:
    """The first arguments of a command, at the start of a line or of code."""
    return set(re.findall(rf"^(?:.*`)?{command} ([a-z][\w-]*)", text, re.M))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_parsed_by_their_entries(page, monkeypatch):
    for words in commands.commands(code(page.read_text(encoding="utf-8"))):
        args, overrides = commands.check(words, monkeypatch)
        if getattr(args, "config", None) not in (None, "C"):  # a placeholder
            config.read(args.config, overrides)


def code(text: str) -> str:
    """The fenced code of a page."""
    return "\n".join(re.findall(r"^```\n(.*?)^```", text, re.M | re.S))
