r"""Trains on a GKE cluster with TPUs, as an xpk workload (a JobSet): `xpk workload create`.

    vtp launch gke --config simvtp/pretrain_webvid --workdir /mnt/runs/simvtp \
        --bucket gs://B:/mnt/runs --name simvtp \
        --cluster C --project P --zone us-west4-a --topology v5e:16x16

The current folder, without what .dockerignore names, is laid over the base image. A lost or drained
pod is restarted and resumes from the newest checkpoint; a mistake in a config ends the workload.
The cluster: `xpk cluster create --tpu-type=v5litepod-256 ...`, with `--spot` for cheaper machines,
and `--enable-gcsfuse-csi-driver` for buckets.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

from . import common


def attached(one: common.Storage) -> str:
    """The name of a bucket's storage in xpk, made from the bucket and its path."""
    return re.sub(r"[^a-z0-9]+", "-", f"{one.bucket}{one.path}".lower()).strip("-")


def attach(args: argparse.Namespace, place: list[str]) -> Iterator[str]:
    """The commands that make buckets storage of the cluster, where they are not."""
    for one in args.bucket:
        words = [
            "xpk", "storage", "attach", attached(one), *place, "--type=gcsfuse",
            f"--bucket={one.bucket}", f"--mount-point={one.path}",
            "--readonly=false", "--auto-mount=false", "--size=1",
        ]  # fmt: skip
        known = shlex.join(["xpk", "storage", "list", *place])
        found = f"awk '{{print $1}}' | grep -qxF {attached(one)}"
        yield f"{known} | {found} ||\n  {shlex.join(words)}"


def render(args: argparse.Namespace, train: str) -> str:
    common.only_gs(args)
    common.keep(args, [*args.bucket, *args.mount], "goes with its pod")
    place = [f"--cluster={args.cluster}", f"--project={args.project}", f"--zone={args.zone}"]
    there = [
        f"{{ mountpoint -q {shlex.quote(one.path)} || "
        f"{{ echo error: {shlex.quote(one.path)} is not mounted >&2; exit {common.MISTAKE}; }}; }}"
        for one in (*args.bucket, *args.mount)
    ]
    install = " && ".join(common.install(args, "tpu").splitlines())
    command = " && ".join(
        common.lines(
            # The network may fail a pod as it starts.
            f"{{ {install} || exit {common.RESTART}; }}",
            common.accelerated("tpu"),
            there,
            [f"eval {shlex.quote(one)}" for one in args.setup],
            # In the shell's place: xpk signals that process when a pod is drained.
            f"exec {train}",
        )
    )
    if "\n" in command:
        common.fail("xpk's --command is one line: no option may have a line break in it")
    words = [
        "xpk", "workload", "create",
        f"--workload={args.name}",
        *place,
        f"--tpu-type={common.slice_name(args.topology)}",
        f"--num-slices={args.slices}",
        f"--base-docker-image={args.image}",
        "--script-dir=.",
        f"--max-restarts={args.restarts}",
        f"--restart-on-exit-codes={common.RESTART}",
        f"--termination-grace-period-seconds={args.grace}",
        *(f"--storage={attached(one)}" for one in args.bucket),
        *(f"--storage={one.source}" for one in args.mount),
        # A process drives all chips of its machine.
        *(["--no-use-parallel-containers"] if args.topology.startswith("tpu7x") else []),
        f"--command={command}",
    ]  # fmt: skip
    create = " \\\n  ".join(map(shlex.quote, words))
    return "\n".join(["set -e", *attach(args, place), create])


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("gke", __doc__)
    parser.add_argument("--name", required=True, help="of the workload")
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--project", required=True)
    parser.add_argument("--zone", required=True)
    parser.add_argument("--topology", required=True, help="as in `vtp plan`: v5e:16x16")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--image", default="python:3.11")
    parser.add_argument("--grace", type=int, default=300, help="seconds to save in a drained pod")
    common.add_restarts(parser)
    common.add_package(parser)
    common.add_storage(parser, "a storage of the cluster (`xpk storage list`) that has this PATH")
    common.main(parser, render, argv=argv)


if __name__ == "__main__":
    common.run(main)
