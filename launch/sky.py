r"""Trains on machines that SkyPilot finds, on any cloud: `sky jobs launch`, which restarts on loss.

    vtp launch sky --config simvtp/pretrain_webvid --workdir /mnt/runs/simvtp \
        --bucket gs://B:/mnt/runs --accelerators H100:8 --nodes 4 --spot

`--accelerators tpu-v6e-8` selects TPUs. The current folder is sent along, without what .gitignore
or .skyignore names.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Iterator

from . import common


def is_local(one: common.Storage) -> bool:
    """Whether --mount names files of this machine, which are copied, and not a volume."""
    return bool(re.match(r"[/.~]", one.source))


def block(text: str) -> str:
    """A YAML string: a literal block, or quoted if a line has what a block cannot have."""
    if all(line.isprintable() for line in text.split("\n")):
        return f"|\n{textwrap.indent(text, '  ')}"
    return json.dumps(text)


def mounts(args: argparse.Namespace) -> Iterator[str]:
    # JSON's strings are valid YAML: quoted, no argument becomes syntax.
    files = {one.path: dict(source=one.source, mode="MOUNT") for one in args.bucket}
    files |= {one.path: one.source for one in args.mount if is_local(one)}
    volumes = {one.path: one.source for one in args.mount if not is_local(one)}
    for name, found in dict(file_mounts=files, volumes=volumes).items():
        if found:
            yield f"{name}:"
            yield from (f"  {json.dumps(path)}: {json.dumps(what)}" for path, what in found.items())


def render(args: argparse.Namespace, train: str) -> str:
    lasting = [*args.bucket, *(one for one in args.mount if not is_local(one))]
    if args.spot:
        common.keep(args, lasting, "a spot machine may be taken at any time")
    elif args.nodes > 1:
        common.keep(args, lasting, "the other nodes do not see it")
    platform, extra = ("tpu",) * 2 if args.accelerators.startswith("tpu") else ("cuda",) * 2
    meet = ""
    if args.nodes > 1:
        meet = """\
export JAX_COORDINATOR_ADDRESS=$(echo "$SKYPILOT_NODE_IPS" | head -n 1):12355
export JAX_NUM_PROCESSES=$SKYPILOT_NUM_NODES JAX_PROCESS_ID=$SKYPILOT_NODE_RANK"""
    run = common.lines("set -e", common.accelerated(platform), meet, args.setup, f"exec {train}")
    return "\n".join(
        common.lines(
            f"name: {json.dumps(args.name)}",
            "workdir: .",
            f"num_nodes: {args.nodes}",
            "resources:",
            f"  accelerators: {json.dumps(args.accelerators)}",
            f"  use_spot: {str(args.spot).lower()}",
            "  job_recovery:",
            f"    recover_on_exit_codes: [{common.RESTART}]",
            list(mounts(args)),
            f"setup: {block(common.install(args, extra))}",
            f"run: {block(chr(10).join(run))}",
        )
    )


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("sky", __doc__)
    parser.add_argument("--name", default="vtp-jax")
    parser.add_argument(
        "--accelerators", default="H100:8", help="of each node, in SkyPilot's notation"
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--spot", action="store_true", help="cheaper, may be preempted")
    common.add_package(parser)
    common.add_storage(parser, "a volume of SkyPilot, or files of this machine, which are copied")
    # SkyPilot recognizes the file by its suffix.
    start = 'file=$(mktemp --suffix=.yaml) && cat > "$file" && sky jobs launch --yes "$file"'
    common.main(parser, render, ["bash", "-c", start], argv)


if __name__ == "__main__":
    common.run(main)
