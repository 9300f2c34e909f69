"""Trains on this machine, in one process, or in several that connect as hosts do.

    python -m launch.local --config demo:tiny --workdir runs/two --processes 2

Several processes on one machine imitate several hosts, for trials. Each has `--devices` CPU
devices.
"""

from __future__ import annotations

import argparse

from launch import common


def render(args: argparse.Namespace, train: str) -> str:
    memory = "export " + " ".join(f"{name}={value}" for name, value in common.keep_memory().items())
    if args.processes == 1:
        return f"{memory}\n{train}"
    # The others would wait for one that fails, so they are terminated.
    return f"""\
{memory}
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${{XLA_FLAGS:-}} --xla_force_host_platform_device_count={args.devices}"
export JAX_COORDINATOR_ADDRESS=localhost:{args.port} JAX_NUM_PROCESSES={args.processes}
for i in $(seq 0 {args.processes - 1}); do
  JAX_PROCESS_ID=$i {train} &
done
trap 'kill $(jobs -p)' TERM INT
status=0
for i in $(seq {args.processes}); do
  wait -n || {{ status=$?; kill $(jobs -p) 2>/dev/null; }}
done
exit $status"""


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("local", __doc__)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1, help="of each process, if several")
    parser.add_argument("--port", type=int, default=12355, help="where the processes meet")
    common.main(parser, render, ["bash"], argv)


if __name__ == "__main__":
    main()
