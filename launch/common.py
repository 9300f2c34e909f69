"""What the launchers share: arguments, the training command, storage, names of slices."""

from __future__ import annotations

import argparse
import ctypes.util
import difflib
import math
import os
import posixpath
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

# Exit statuses of training, as in vtp_jax/run/stop.py: a mistake fails again wherever it is
# started; what asks for a restart has saved, or lost a machine or a neighbour.
MISTAKE, RESTART = 2, 75
UNREAD = 141  # the reader of what is printed went away, as in `... --dry-run | head`
# What a shell reports of a process that a signal killed: a lost machine, or one out of memory.
KILLED = 128
PYTHON = ".venv/bin/python"  # relative to the project's folder, wherever that is


class Slice(NamedTuple):
    """A kind of TPU as the cloud names it. kind: prefix of a slice's name; units: of that name per
    chip (it counts cores of v5p and tpu7x); image: of a TPU VM, with its driver, '' if there are
    none; chips: of a machine, at most."""

    kind: str
    units: int
    image: str
    chips: int


SLICES = dict(
    v5e=Slice("v5litepod", 1, "v2-alpha-tpuv5-lite", 8),
    v6e=Slice("v6e", 1, "v2-alpha-tpuv6e", 8),
    v5p=Slice("v5p", 2, "v2-alpha-tpuv5", 4),
    tpu7x=Slice("tpu7x", 2, "", 4),
)


class Storage(NamedTuple):
    """What is mounted: a bucket's URL or what the place calls `source`, and the path there."""

    source: str
    path: str

    @property
    def bucket(self) -> str:
        """The bucket's name, without gs:// or s3://."""
        return self.source.partition("://")[2]


def fail(text: str) -> NoReturn:
    """Ends the launcher for a user's mistake, in one line."""
    sys.stderr.write(f"error: {text}\n")
    sys.exit(MISTAKE)


def run(main: Callable[[], None]) -> None:
    """Runs a launcher's main; a reader of stdout that goes away ends it silently, with UNREAD."""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UNREAD)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: {message}")


def keep_memory() -> dict[str, str]:
    """The environment in which a process on a CPU keeps its memory. XLA's temporaries are gigabytes
    that glibc takes from the kernel and returns at every step; clearing their pages is a fifth of
    SimVTP's step (docs/speed.md). jemalloc, if installed, keeps them; otherwise glibc uses large
    pages, which recovers part of the cost."""
    if jemalloc := ctypes.util.find_library("jemalloc"):
        keep = "dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always"
        return dict(LD_PRELOAD=jemalloc, MALLOC_CONF=keep)
    return dict(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")


def parser(name: str, about: str | None) -> Parser:
    parser = Parser(
        prog=f"vtp launch {name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, help="as in `vtp train`; --config.x=value overrides a value"
    )
    parser.add_argument("--workdir", required=True, help="a folder that all hosts see, or gs://...")
    parser.set_defaults(python=PYTHON)
    parser.add_argument("--dry-run", action="store_true", help="print the script, do not run it")
    return parser


def add_storage(parser: argparse.ArgumentParser, source: str) -> None:
    """Adds the options for data, storage and set-up, the same in all remote places.

    source: what --mount takes there
    """
    group = parser.add_argument_group(
        "storage and set-up", "each may be given several times; the same in all remote places"
    )
    add = group.add_argument
    add(
        "--bucket", action="append", default=[], type=_storage, metavar="URL:PATH",
        help="mount a bucket on every host: gs://B:/mnt/data",
    )  # fmt: skip
    add(
        "--mount", action="append", default=[], type=_storage, metavar="SRC:PATH",
        help=f"mount storage on every host; SRC: {source}",
    )  # fmt: skip
    add(
        "--setup", action="append", default=[], metavar="COMMAND",
        help="run on every host, in the shell that then starts training",
    )  # fmt: skip


def add_package(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--package",
        help="what to install there: a wheel in this folder, which is sent along, or a "
        "requirement; default: this folder, if it is a checkout of vtp_jax",
    )


def add_restarts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--restarts", type=int, default=50, help="of a run that was preempted or lost a host"
    )


def _storage(text: str) -> Storage:
    source, _, path = text.rpartition(":")
    if not source or source.endswith((":", "/")) or not path.startswith("/") or path[1:2] == "/":
        raise argparse.ArgumentTypeError(f"'{text}' is not SOURCE:/PATH, as in gs://B:/mnt/data")
    return Storage(source, posixpath.normpath(path))


def main(
    parser: argparse.ArgumentParser,
    render: Callable[[argparse.Namespace, str], str],
    reader: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> None:
    """Renders the script of the arguments; prints it, or runs it and exits with its status.

    render: (arguments, training command) -> text
    reader: the command that reads the text from stdin; without one, the text is a shell's, which
            keeps its stdin, since ssh would read the script's next lines from it
    """
    args, rest = parser.parse_known_args(argv)
    for action in parser._actions:
        if getattr(args, action.dest, None) == "":
            parser.error(f"{'/'.join(action.option_strings)} is empty; give a value")
    for word in rest:
        if word == "--print-config":
            parser.error(f"{word} is of training: vtp train --config {args.config} {word}")
        if not word.startswith("--config."):
            near = difflib.get_close_matches(word, parser._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; overrides are --config.x=value"
            parser.error(f"unknown argument '{word}'{hint}")
        if "=" not in word:
            parser.error(f"'{word}' has no value; write {word}=VALUE")
    words = ["-m", "vtp_jax.train", "--config", args.config, "--workdir", args.workdir, *rest]
    text = render(args, shlex.join([args.python, *words]))
    if args.dry_run:
        print(text)
        return
    if reader:
        done = subprocess.run(reader, input=text, text=True)
    else:
        done = subprocess.run(["bash", "-c", text])
    sys.exit(done.returncode)


def here() -> str:
    """The Python of this folder's environment, or else the one that runs the launcher: for places
    that see this machine's files."""
    return PYTHON if Path(PYTHON).exists() else sys.executable


def install(args: argparse.Namespace, extra: str) -> str:
    """The commands that set up a new machine: a Python, the project as it was sent or the package,
    for its accelerator, and for a workdir in a bucket."""
    package = args.package or "."
    if args.workdir.startswith("gs://"):
        extra += ",gs"
    if package == "." and not (Path("setup.py").is_file() and Path("vtp_jax").is_dir()):
        fail("this folder is no checkout of vtp_jax: start there, or with --package WHEEL")
    if package.endswith(".whl") and (Path(package).is_absolute() or not Path(package).is_file()):
        fail(f"--package {package}: no wheel of this name in this folder, which is what is sent")
    if package == ".":
        what = f"-e '.[{extra}]'"
    elif package.endswith(".whl"):
        what = shlex.quote(f"./{posixpath.normpath(package)}[{extra}]")
    else:  # a requirement: its extras follow the name
        what = shlex.quote(re.sub(r"^[\w.-]+", rf"\g<0>[{extra}]", package))
    return f"""\
python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --allow-existing --python 3.11 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python {what}"""


def accelerated(platform: str) -> str:
    """The command by which a host refuses to train on its CPU if JAX cannot drive its accelerator:
    JAX takes these platforms, or fails. platform: tpu or cuda"""
    return f'export JAX_PLATFORMS="${{JAX_PLATFORMS:-{platform},cpu}}"'


def only_gs(args: argparse.Namespace) -> None:
    """Refuses buckets that the place cannot mount."""
    for one in args.bucket:
        if not re.fullmatch(r"gs://[\w.-]+", one.source):
            fail(f"--bucket {one.source}:{one.path}: only gs://BUCKET is mounted here")


def kept(args: argparse.Namespace, mounts: Sequence[Storage]) -> bool:
    """Whether the workdir outlives the machine: in a bucket, or below what is mounted."""
    if re.match(r"(?!file:)\w+://", args.workdir):
        return True
    path = posixpath.normpath(args.workdir)
    return any(f"{path}/".startswith(f"{one.path}/") for one in mounts)


def keep(args: argparse.Namespace, mounts: Sequence[Storage], why: str) -> None:
    """Refuses a workdir that does not outlive its machine. why: that it must"""
    if not kept(args, mounts):
        fail(
            f"--workdir {args.workdir} is on the machine's own disk, and {why}: use --workdir "
            "gs://BUCKET/RUN, or mount storage above it, as with --bucket gs://BUCKET:/mnt/runs"
        )


def topology(text: str) -> tuple[Slice, int]:
    """(kind, number of chips) of a topology as in `vtp plan`: v5e:4x4."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text)
    if not found or found[1] not in SLICES:
        known = ", ".join(SLICES)
        fail(f"no topology '{text}'; write CHIP:AxB as in v5e:4x4, CHIP of {known}")
    return SLICES[found[1]], math.prod(map(int, found[2].split("x")))


def slice_name(text: str) -> str:
    """'v5litepod-16', the cloud's name of the topology v5e:4x4."""
    found, chips = topology(text)
    return f"{found.kind}-{found.units * chips}"


def mounted(one: Storage, make: str) -> str:
    """The command that mounts storage on a host unless it is there: in the shell of a job that may
    have run on this host before."""
    return f"mountpoint -q {shlex.quote(one.path)} || {make}"


def needs(program: str) -> str:
    """The command that ends a host's shell if a program that mounts is not installed there."""
    return (
        f"command -v {program} > /dev/null || {{ echo 'error: {program}, which mounts buckets, is "
        f"not installed on this machine; install it with --setup' >&2; exit {MISTAKE}; }}"
    )


def lines(*parts: str | Sequence[str]) -> Iterator[str]:
    """The commands of a script, from strings and lists of them; empty strings are left out."""
    for part in parts:
        yield from ([part] if isinstance(part, str) else part) if part else ()
