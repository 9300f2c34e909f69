r"""Trains on a SLURM cluster of GPU nodes: a batch script, one process on each node.

    vtp launch slurm --config simvtp/pretrain_webvid --workdir /shared/run \
        --nodes 4 --gpus 8 --cpus 64 --time 24:00:00 --partition P

Start it in the project's folder, with its `.venv`, on a file system that all nodes share. Before
the time limit, and when the job is preempted, training saves and ends; the job queues again, until
the run is done.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

from . import common

LOCAL = ("/tmp", "/var/tmp", "/dev/shm")  # on the disk or in the memory of one node


def mounts(args: argparse.Namespace) -> Iterator[str]:
    """The commands that make data available on a node, where a job is no administrator: buckets by
    FUSE, folders by links."""
    for one in args.bucket:
        path, bucket = shlex.quote(one.path), shlex.quote(one.bucket)
        program = "mount-s3" if one.source.startswith("s3://") else "gcsfuse"
        make = f"{program} {bucket} {path}"
        if program == "gcsfuse":
            make = f"gcsfuse --implicit-dirs {bucket} {path}"
        yield common.needs(program)
        yield f"mkdir -p {path}"
        yield common.mounted(one, make)
    for one in args.mount:
        source, path = shlex.quote(one.source), shlex.quote(one.path)
        yield f"mkdir -p {shlex.quote(one.path.rpartition('/')[0] or '/')}"
        yield f"ln -sfn {source} {path}"


def render(args: argparse.Namespace, train: str) -> str:
    for one in args.bucket:
        if not re.fullmatch(r"(gs|s3)://[\w.-]+", one.source):
            common.fail(
                f"--bucket {one.source}:{one.path}: gs://BUCKET and s3://BUCKET are mounted"
            )
    if any(f"{args.workdir}/".startswith(f"{folder}/") for folder in LOCAL):
        common.keep(args, [*args.bucket, *args.mount], "a job that queues again gets other nodes")
    cpus = [] if args.cpus is None else [f"--cpus-per-task={args.cpus}"]
    options = {
        "job-name": args.name,
        "nodes": args.nodes,
        "ntasks-per-node": 1,  # a process drives all GPUs of its node
        "gpus-per-node": args.gpus,
        "cpus-per-task": args.cpus,
        "time": args.time,
        "partition": args.partition,
        "output": f"{args.name}-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{args.grace}",
    }
    for name, value in options.items():
        if not str(value).isprintable():
            common.fail(f"--{name} {value!r}: a batch script has no place for a line break")
    head = "\n".join(
        f"#SBATCH --{name}={shlex.quote(str(value))}"  # sbatch splits these lines as a shell does
        for name, value in options.items()
        if value is not None
    )
    host = "\n".join(
        common.lines(
            common.accelerated("cuda") if args.gpus else "", args.setup, list(mounts(args)),
            f"exec {train}",
        )
    )  # fmt: skip
    # srun has to be told the CPUs again: it does not take them from sbatch. It waits for the tasks
    # of one that ended, which may still be writing the same checkpoint.
    srun = ["srun", *cpus, "--kill-on-bad-exit=0", f"--wait={args.grace}", "bash", "-ec", host]
    return f"""\
#!/bin/bash
{head}
#SBATCH --requeue
# Only this shell is told of the time limit. The tasks save and end, and then the job queues again;
# if they take too long, it does so just before it would be ended.
limit() {{
  signalled=1
  scancel --signal=TERM "$SLURM_JOB_ID".0
  (sleep {max(args.grace - 20, 1)}; scontrol requeue "$SLURM_JOB_ID") > /dev/null &
  late=$!
}}
trap limit USR1
# Cancelled or preempted: SLURM tells the tasks, and this shell waits while they save.
trap 'signalled=1' TERM
{shlex.join(srun)} &
tasks=$!
late='' signalled=1
while [ -n "$signalled" ]; do  # a signal ends a wait early
  signalled=''
  wait "$tasks"
  status=$?
done
trap '' USR1 TERM
[ -z "$late" ] || kill "$late" 2> /dev/null
# A job that is cancelled or already queued again is not running.
if {{ [ "$status" -eq {common.RESTART} ] || [ "$status" -gt {common.KILLED} ]; }} &&
  [ "${{SLURM_RESTART_COUNT:-0}}" -lt {args.restarts} ] &&
  [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status\""""


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("slurm", __doc__)
    parser.set_defaults(python=common.here())
    parser.add_argument("--name", default="vtp_jax")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="of each node; 0: train on CPUs")
    parser.add_argument("--cpus", type=int, default=None, help="of each node, for decoding")
    parser.add_argument("--time", default="24:00:00")
    parser.add_argument("--partition", default=None)
    parser.add_argument("--grace", type=int, default=300, help="seconds to save before the limit")
    common.add_restarts(parser)
    common.add_storage(parser, "a folder that the nodes see; PATH becomes a link to it")
    common.main(parser, render, ["sbatch"], argv)


if __name__ == "__main__":
    common.run(main)
