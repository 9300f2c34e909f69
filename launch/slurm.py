"""Trains on a SLURM cluster of GPU nodes: a batch script, one process on each node.

    python -m launch.slurm --config simvtp/pretrain_webvid --workdir /shared/run \
        --nodes 4 --gpus 8 --time 24:00:00 --partition P

Start it in the project's folder, with its `.venv`, on a file system that all nodes share. Two
minutes before the time limit training saves and ends, and the job queues again, until the run is
done.
"""

from __future__ import annotations

import argparse

from launch import common


def render(args: argparse.Namespace, train: str) -> str:
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
        "signal": "B:TERM@120",
    }
    head = "\n".join(f"#SBATCH --{k}={v}" for k, v in options.items() if v is not None)
    return f"""\
#!/bin/bash
{head}
#SBATCH --requeue
# Only the shell gets the signal: it signals the tasks and requeues the job.
trap 'scontrol requeue "$SLURM_JOB_ID"; scancel --signal=TERM "$SLURM_JOB_ID".0' TERM
srun --kill-on-bad-exit=1 {train} &
wait $!
wait"""


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("slurm", __doc__)
    parser.add_argument("--name", default="vtp_jax")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="of each node")
    parser.add_argument("--cpus", type=int, default=None, help="of each node, for decoding")
    parser.add_argument("--time", default="24:00:00")
    parser.add_argument("--partition", default=None)
    common.main(parser, render, ["sbatch"], argv)


if __name__ == "__main__":
    main()
