r"""Trains on a slice of TPU VMs: asks for it in the queue, waits, sends the project, starts.

    vtp launch tpu_vm --config simvtp/pretrain_webvid --workdir /mnt/runs/simvtp \
        --bucket gs://B:/mnt/runs --name simvtp \
        --project P --zone us-west4-a --topology v5e:16x16 --spot

Run again, it finds its slice, lets a run there save and end, and restarts it, which resumes from
the newest checkpoint. The project is sent as committed (HEAD), or the whole folder if it is no git
repository. `--slices N`: N slices as one run. To release the slice:
`gcloud compute tpus queued-resources delete NAME --force --project P --zone Z`.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

from . import common


def mounts(args: argparse.Namespace) -> Iterator[str]:
    """The commands that mount storage on a machine: buckets by gcsfuse, shares by NFS."""
    if args.bucket:
        yield common.needs("gcsfuse")
    for one in (*args.bucket, *args.mount):
        path = shlex.quote(one.path)
        if one in args.bucket:
            make = f"gcsfuse --implicit-dirs {shlex.quote(one.bucket)} {path}"
        else:
            make = f"sudo mount -t nfs {shlex.quote(one.source)} {path}"
        yield f'sudo mkdir -p {path} && {{ mountpoint -q {path} || sudo chown "$USER" {path}; }}'
        yield common.mounted(one, make)


def loop(args: argparse.Namespace, train: str) -> str:
    """The script that trains on a machine, again after a stop or a loss, and leaves its status."""
    return f"""\
for run in $(seq 0 {args.restarts}); do
  {train}
  status=$?
  [ $status -eq {common.RESTART} ] || [ $status -gt {common.KILLED} ] || break
  sleep 10
done
echo "training ended with exit status $status"
echo $status > status"""


def on_machine(args: argparse.Namespace, train: str) -> str:
    """The script that sets up a machine and starts training there."""
    return "\n".join(
        common.lines(
            "set -e",
            "mkdir -p vtp_jax && cd vtp_jax",
            # A run that is still there saves and ends first; its loop ends at once.
            'if [ -e pid ] && kill -TERM -- "-$(cat pid)" 2> /dev/null; then',
            '  while kill -0 -- "-$(cat pid)" 2> /dev/null; do sleep 1; done',
            "fi",
            "rm -f status",
            "tar xzf ../vtp_jax.tgz",
            common.install(args, "tpu"),
            common.accelerated("tpu"),
            args.setup,
            list(mounts(args)),
            # Detached: a lost connection does not end the run.
            f"setsid nohup bash -c {shlex.quote(loop(args, train))} > train.log 2>&1 < /dev/null &",
            "echo $! > pid",
        )
    )


def render(args: argparse.Namespace, train: str) -> str:
    common.only_gs(args)
    found, chips = common.topology(args.topology)
    if not found.image:
        common.fail(f"there are no TPU VMs of {args.topology}: launch it on GKE")
    for one in args.mount:
        if ":/" not in one.source:
            common.fail(f"--mount {one.source}:{one.path}: SRC is an NFS share, HOST:/SHARE")
    storage = [*args.bucket, *args.mount]
    if args.spot:
        common.keep(args, storage, "a spot machine may be taken at any time")
    elif args.slices > 1 or chips > found.chips:
        common.keep(args, storage, "the other machines of the slice do not see it")
    kind, image = common.slice_name(args.topology), found.image
    place = f"--project={shlex.quote(args.project)} --zone={shlex.quote(args.zone)}"
    name = shlex.quote(args.name)
    nodes = f"--node-id={name}"
    machines = [name]
    if args.slices > 1:
        nodes = f"--node-prefix={name} --node-count={args.slices}"
        machines = [shlex.quote(f"{args.name}-{i}") for i in range(args.slices)]
    spot = " --spot" if args.spot else ""
    delete = f"gcloud compute tpus queued-resources delete {name} --force {place}"
    watch = (
        'cd vtp_jax && tail -n +1 -F --pid="$(cat pid)" train.log; '
        f'[ -e status ] && exit "$(cat status)"; exit {common.RESTART}'
    )
    return f"""\
set -euo pipefail
queue="gcloud compute tpus queued-resources"
vm="gcloud compute tpus tpu-vm"
state() {{
  $queue describe {name} {place} --format='value(state.state)'
}}
lost() {{
  echo "error: the request for the slice is $1; run this again after" {shlex.quote(delete)} >&2
  exit 1
}}
state > /dev/null 2>&1 || \\
  $queue create {name} {nodes} {place} --accelerator-type={kind} --runtime-version={image}{spot}
before=''
while true; do
  now=$(state)
  [ "$now" = "$before" ] || echo "the request for the slice: $now"
  before=$now
  case "$now" in
    ACTIVE) break ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING) lost "$now" ;;
  esac
  sleep 30
done
archive=$(mktemp --suffix=.tgz)
git archive --format=tgz -o "$archive" HEAD 2> /dev/null ||
  tar czf "$archive" --exclude=./.venv --exclude=./.git --exclude=./runs .
for node in {" ".join(machines)}; do
  $vm scp "$archive" "$node":vtp_jax.tgz {place} --worker=all
  $vm ssh "$node" {place} --worker=all --command={shlex.quote(on_machine(args, train))}
done
status=0
$vm ssh {machines[0]} {place} --worker=0 --command={shlex.quote(watch)} || status=$?
now=$(state)
[ "$now" = ACTIVE ] || lost "$now"
exit $status"""


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("tpu_vm", __doc__)
    parser.add_argument("--name", required=True, help="of the request and of the slice")
    parser.add_argument("--project", required=True)
    parser.add_argument("--zone", required=True)
    parser.add_argument("--topology", required=True, help="as in `vtp plan`: v5e:16x16")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--spot", action="store_true", help="cheaper, may be preempted")
    common.add_restarts(parser)
    common.add_package(parser)
    common.add_storage(parser, "an NFS share, HOST:/SHARE")
    common.main(parser, render, argv=argv)


if __name__ == "__main__":
    common.run(main)
