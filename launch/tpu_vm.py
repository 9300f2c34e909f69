"""Trains on a slice of TPU VMs: asks for it in the queue, waits, sends the project, starts.

    python -m launch.tpu_vm --config simvtp/pretrain_webvid --workdir /mnt/runs/simvtp \
        --name simvtp --project P --zone us-west4-a --topology v5e:16x16 --spot

Run again, it finds its slice and restarts training there, which resumes from the newest checkpoint.
The project is sent as committed (HEAD). `--slices N`: N slices as one run. To release the slice:
`gcloud compute tpus queued-resources delete NAME --force --project P --zone Z`.
"""

from __future__ import annotations

import argparse
import shlex

from launch import common


def render(args: argparse.Namespace, train: str) -> str:
    kind, image = common.slice_of(args.topology)
    place = f"--project={shlex.quote(args.project)} --zone={shlex.quote(args.zone)}"
    name = shlex.quote(args.name)
    nodes = f"--node-id={name}"
    if args.slices > 1:
        nodes = f"--node-prefix={name} --node-count={args.slices}"
    spot = " --spot" if args.spot else ""
    each = " ".join(shlex.quote(f"{args.name}-{i}") for i in range(args.slices))
    start = "\n".join(
        [
            "set -e",
            "mkdir -p vtp_jax && tar xzf vtp_jax.tgz -C vtp_jax && cd vtp_jax",
            common.INSTALL.format(extra="tpu"),
            # Detached: a lost connection does not end the run.
            f"nohup {train} > train.log 2>&1 &",
        ]
    )
    return f"""\
set -euo pipefail
queue="gcloud compute tpus queued-resources"
vm="gcloud compute tpus tpu-vm"
$queue describe {name} {place} > /dev/null 2>&1 || \\
  $queue create {name} {nodes} {place} --accelerator-type={kind} --runtime-version={image}{spot}
until [ "$($queue describe {name} {place} --format='value(state.state)')" = ACTIVE ]; do
  sleep 30
done
archive=$(mktemp --suffix=.tgz)
git archive --format=tgz -o "$archive" HEAD
for node in {each if args.slices > 1 else name}; do
  $vm scp "$archive" "$node":vtp_jax.tgz {place} --worker=all
  $vm ssh "$node" {place} --worker=all --command={shlex.quote(start)}
done
$vm ssh {each.split()[0] if args.slices > 1 else name} {place} --worker=0 \\
  --command='tail -F vtp_jax/train.log'"""


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("tpu_vm", __doc__)
    parser.add_argument("--name", required=True, help="of the request and of the slice")
    parser.add_argument("--project", required=True)
    parser.add_argument("--zone", required=True)
    parser.add_argument("--topology", required=True, help="as in `vtp plan`: v5e:16x16")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--spot", action="store_true", help="cheaper, may be preempted")
    common.main(parser, render, ["bash"], argv)


if __name__ == "__main__":
    main()
