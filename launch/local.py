"""Trains on this machine, in one process, or in several that connect as hosts do.

    vtp launch local --config demo:tiny --workdir runs/two --processes 2

Several processes on one machine imitate several hosts, for trials. Each has `--devices` CPU
devices.
"""

from __future__ import annotations

import argparse

from . import common


def render(args: argparse.Namespace, train: str) -> str:
    memory = "export " + " ".join(f"{name}={value}" for name, value in common.keep_memory().items())
    if args.processes == 1:
        return f"{memory}\nexec {train}"
    # The others would wait for one that fails, so they are terminated. One that was asked to stop
    # has saved together with them; they end by themselves.
    return f"""\
{memory}
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${{XLA_FLAGS:-}} --xla_force_host_platform_device_count={args.devices}"
export JAX_COORDINATOR_ADDRESS=localhost:{args.port} JAX_NUM_PROCESSES={args.processes}
pids=()
for i in $(seq 0 {args.processes - 1}); do
  JAX_PROCESS_ID=$i {train} &
  pids+=($!)
done
trap 'kill "${{pids[@]}}" 2> /dev/null' TERM INT
status=0 left=("${{pids[@]}}")
while [ ${{#left[@]}} -gt 0 ]; do
  sleep 0.2  # `wait -n` may miss one of two that end at once
  running=()
  for pid in "${{left[@]}}"; do
    if kill -0 "$pid" 2> /dev/null; then running+=("$pid"); continue; fi
    wait "$pid"
    code=$?
    [ $code -ne 0 ] || continue
    [ $status -ne 0 ] || status=$code
    [ $code -eq {common.RESTART} ] || kill "${{pids[@]}}" 2> /dev/null
  done
  left=("${{running[@]}}")
done
exit $status"""


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("local", __doc__)
    parser.set_defaults(python=common.here())
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1, help="of each process, if several")
    parser.add_argument("--port", type=int, default=12355, help="where the processes meet")
    common.main(parser, render, argv=argv)


if __name__ == "__main__":
    common.run(main)
