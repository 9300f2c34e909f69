"""What the launchers share: arguments, the training command, names of slices."""

from __future__ import annotations

import argparse
import ctypes.util
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

# By chip: the cloud's name of a slice, the number of its units per chip (v5p counts cores), and the
# machine image with its driver.
SLICES = dict(
    v5e=("v5litepod", 1, "v2-alpha-tpuv5-lite"),
    v6e=("v6e", 1, "v2-alpha-tpuv6e"),
    v5p=("v5p", 2, "v2-alpha-tpuv5"),
)
# The setup of a new machine: a Python, the project as it was sent, the build for its accelerator.
INSTALL = """\
python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --allow-existing --python 3.11 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python -e '.[{extra}]'"""


def keep_memory() -> dict[str, str]:
    """The environment in which a process on a CPU keeps its memory. XLA's temporaries are gigabytes
    that glibc takes from the kernel and returns at every step; clearing their pages is a fifth of
    SimVTP's step (docs/speed.md). jemalloc, if installed, keeps them; otherwise glibc uses large
    pages, which recovers part of the cost."""
    if jemalloc := ctypes.util.find_library("jemalloc"):
        keep = "dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always"
        return dict(LD_PRELOAD=jemalloc, MALLOC_CONF=keep)
    return dict(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m launch.{name}", description=(about or "").split("\n")[0]
    )
    parser.add_argument("--config", required=True, help="as in `vtp train`")
    parser.add_argument("--workdir", required=True, help="a folder visible to all hosts")
    parser.add_argument("--dry-run", action="store_true", help="print the script, do not run it")
    return parser


def main(
    parser: argparse.ArgumentParser,
    render: Callable[[argparse.Namespace, str], str],
    run: Sequence[str],
    argv: Sequence[str] | None = None,
) -> None:
    """Renders the script of the arguments; prints it, or passes it to `run` on stdin and exits with
    its status.

    render: (arguments, training command) -> text
    """
    args, rest = parser.parse_known_args(argv)
    if unknown := [a for a in rest if not a.startswith("--config.")]:
        parser.error(f"unknown argument '{unknown[0]}'; overrides are --config.x=value")
    text = render(args, command(args, rest))
    if args.dry_run:
        print(text)
        return
    sys.exit(subprocess.run(run, input=text, text=True).returncode)


def command(args: argparse.Namespace, rest: Sequence[str]) -> str:
    """The training command that all places run, quoted for a shell."""
    words = ["-m", "vtp_jax.train", "--config", args.config, "--workdir", args.workdir, *rest]
    return f".venv/bin/python {shlex.join(words)}"


def slice_of(topology: str) -> tuple[str, str]:
    """('v5litepod-16', its machine image) of 'v5e:4x4', a topology as in `vtp plan`."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", topology)
    if not found or found[1] not in SLICES:
        known = ", ".join(SLICES)
        sys.exit(f"error: no topology '{topology}'; write CHIP:AxB as in v5e:4x4, CHIP of {known}")
    name, units, image = SLICES[found[1]]
    return f"{name}-{units * math.prod(map(int, found[2].split('x')))}", image
