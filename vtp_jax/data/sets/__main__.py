"""Lists the supported data sets, and reports what is missing of one.

vtp sets list
vtp sets list --set msrvtt
vtp sets check --set msrvtt --root data/msrvtt
vtp sets extract --root data/finevideo --out data/finevideo/videos
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vtp_jax.data import sets
from vtp_jax.data.sets import pretraining
from vtp_jax.setup import cli
from vtp_jax.types import UserError


def main(argv: Sequence[str]) -> None:
    """Runs the command that argv names."""
    commands = cli.Commands("sets", __doc__)
    command = commands.add("list", list_sets, "print the table of data sets, or details of one")
    command.add_argument("--set", help="the name of a set")

    about = "report what is missing of a set; exits with 1 if anything is"
    command = commands.add("check", check_set, about)
    command.add_argument("--set", required=True, help="the name of a set")
    command.add_argument("--root", required=True, help="the folder of its files")
    command.add_argument("--split", help="check only this one")
    command.add_argument("--missing", help="a file to write the names of all absent videos to")

    about = "write the videos in FineVideo's parquet files to a folder; existing files are kept"
    command = commands.add("extract", extract, about)
    command.add_argument("--root", required=True, help="the folder of the parquet files")
    command.add_argument("--out", required=True, help="a folder below it")
    commands.run(argv)


def list_sets(args: argparse.Namespace) -> None:
    print("\n".join(describe(args.set) if args.set else table()))


def table() -> Iterator[str]:
    """The table of docs/datasets.md."""
    yield "| name | set | task | splits: rows | annotation files | how to get | licence | note |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, one in sets.SETS.items():
        splits = ", ".join(f"{split}: {count(s)}" for split, s in one.splits.items())
        files = dict.fromkeys(show(file) for s in one.splits.values() for file in s.files)
        cells = (f"`{name}`", one.title, one.task, splits, ", ".join(files), one.get, one.licence)
        yield f"| {' | '.join((*cells, one.note))} |"


def describe(name: str) -> Iterator[str]:
    one = sets.find_set(name)
    yield f"{one.title}: {one.task}"
    for what, text in (("get", one.get), ("licence", one.licence), ("note", one.note)):
        if text:
            yield f"  {what}: {text}"
    for split, s in one.splits.items():
        yield f"  {split}: {count(s)} rows; {'; '.join(map(show, s.files))}"


def count(split: sets.Split) -> str:
    return "?" if split.rows is None else f"{split.rows:,}{'' if split.sure else '†'}"


def show(file: str) -> str:
    """A name of `Split.files` as readable text."""
    names = " or ".join(f"`{one}`" for one in file.removeprefix("?").split(" | "))
    return f"({names})" if file.startswith("?") else names


def check_set(args: argparse.Namespace) -> None:
    reports = sets.check(args.set, args.root, args.split)
    for report in reports:
        print(f"{args.set}/{report.split}: {'; '.join(tell(report))}")
    if args.missing:
        names = dict.fromkeys(name for report in reports for name in report.missing)
        Path(args.missing).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    if not all(report.complete for report in reports):
        sys.exit(1)


def tell(report: sets.Report) -> Iterator[str]:
    if report.lacking:
        yield f"lacks {', '.join(map(show, report.lacking))}"
        return
    if report.wrong:
        yield report.wrong
        return
    published = report.published
    if published is None:
        yield f"{report.rows:,} rows (the published number is unknown)"
    elif report.rows == published:
        yield f"{report.rows:,} rows, as published"
    else:
        yield f"{report.rows:,} rows, {published:,} were published"
    if report.repeated:
        yield f"{report.repeated:,} ids are repeated"
    if report.parts:
        yield f"{report.parts:,} are parts of longer videos, not cut yet"
    if report.missing:
        first = ", ".join(report.missing[:3])
        yield f"{len(report.missing):,} videos are missing, first {first}"
    else:
        yield "all videos are there"


def extract(args: argparse.Namespace) -> None:
    files = sets.Folder(args.root).annotations(pretraining.FINEVIDEO[0])
    if not files:
        raise UserError(f"no parquet files train-*.parquet below {args.root}")
    written = sum(pretraining.extract_finevideo(file, Path(args.out)) for file in files)
    print(f"{args.out}: {written} videos written")


if __name__ == "__main__":
    cli.run(main)
