"""Trains on a GKE cluster with TPUs, as an xpk workload (a JobSet): `xpk workload create`.

    python -m launch.gke --config simvtp/pretrain_webvid --workdir /mnt/runs/simvtp \
        --name simvtp --cluster C --project P --zone us-west4-a --topology v5e:16x16

The current folder is laid over the base image. A lost pod is restarted and resumes from the newest
checkpoint. The cluster: `xpk cluster create --tpu-type=v5litepod-256 ...`.
"""

from __future__ import annotations

import argparse
import shlex

from launch import common


def render(args: argparse.Namespace, train: str) -> str:
    kind, _ = common.slice_of(args.topology)
    words = [
        "xpk", "workload", "create",
        f"--workload={args.name}",
        f"--cluster={args.cluster}",
        f"--project={args.project}",
        f"--zone={args.zone}",
        f"--tpu-type={kind}",
        f"--num-slices={args.slices}",
        f"--base-docker-image={args.image}",
        "--script-dir=.",
        f"--max-restarts={args.restarts}",
        f"--command={common.INSTALL.format(extra='tpu')} && {train}".replace("\n", " && "),
    ]  # fmt: skip
    return " \\\n  ".join(map(shlex.quote, words))


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("gke", __doc__)
    parser.add_argument("--name", required=True, help="of the workload")
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--project", required=True)
    parser.add_argument("--zone", required=True)
    parser.add_argument("--topology", required=True, help="as in `vtp plan`: v5e:16x16")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--restarts", type=int, default=50)
    parser.add_argument("--image", default="python:3.11")
    common.main(parser, render, ["bash"], argv)


if __name__ == "__main__":
    main()
