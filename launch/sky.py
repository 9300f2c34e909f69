"""Trains on machines that SkyPilot finds, on any cloud: `sky jobs launch`, which restarts on loss.

    python -m launch.sky --config simvtp/pretrain_webvid --workdir /mnt/runs/simvtp \
        --accelerators H100:8 --nodes 4 --spot

`--accelerators tpu-v6e-8` selects TPUs. The current folder is sent along.
"""

from __future__ import annotations

import argparse
import json
import textwrap

from launch import common


def render(args: argparse.Namespace, train: str) -> str:
    extra = "tpu" if args.accelerators.startswith("tpu") else "cuda"
    meet = ""
    if args.nodes > 1:
        meet = """\
export JAX_COORDINATOR_ADDRESS=$(echo "$SKYPILOT_NODE_IPS" | head -n 1):12355
export JAX_NUM_PROCESSES=$SKYPILOT_NUM_NODES JAX_PROCESS_ID=$SKYPILOT_NODE_RANK
"""
    # JSON's strings are valid YAML: quoted, no argument becomes syntax.
    return f"""\
name: {json.dumps(args.name)}
workdir: .
num_nodes: {args.nodes}
resources:
  accelerators: {json.dumps(args.accelerators)}
  use_spot: {str(args.spot).lower()}
setup: |
{textwrap.indent(common.INSTALL.format(extra=extra), "  ")}
run: |
{textwrap.indent(meet + train, "  ")}"""


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("sky", __doc__)
    parser.add_argument("--name", default="vtp-jax")
    parser.add_argument(
        "--accelerators", default="H100:8", help="of each node, in SkyPilot's notation"
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--spot", action="store_true", help="cheaper, may be preempted")
    # SkyPilot recognizes the file by its suffix.
    start = 'file=$(mktemp --suffix=.yaml) && cat > "$file" && sky jobs launch --yes "$file"'
    common.main(parser, render, ["bash", "-c", start], argv)


if __name__ == "__main__":
    main()
