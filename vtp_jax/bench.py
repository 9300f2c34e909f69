"""Measures a config on this machine: its step, on synthetic input, or its data.

    vtp bench step --config demo [--steps 20] [--profile runs/profile]
    vtp bench data --config demo:tiny [--clips 200]

MFU: 3 x the multiplications of the loss's products forward (backward has twice as many; what remat
computes again is not counted), over the machine's own rate in the same dtype, measured in between.
One line of JSON is appended to --out. The profile is for TensorBoard, XProf or Perfetto.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vtp_jax.measure import data as measure_data
from vtp_jax.measure import timing
from vtp_jax.run import metrics
from vtp_jax.setup import cli, config
from vtp_jax.types import UserError


def step(args: argparse.Namespace) -> None:
    """`bench step`"""
    if args.steps < 1:
        raise UserError(f"--steps={args.steps}: at least 1")
    cfg = config.load(args.config, args.overrides)
    found = dict(config=args.config, overrides=args.overrides)
    found |= timing.measure_step(cfg, args.steps, args.batch, args.profile)
    timing.write(Path(args.out), found)
    rows = [(name, value) for name, value in found.items() if not isinstance(value, list)]
    metrics.print_table("step", ("what", "value"), rows)


def data(args: argparse.Namespace) -> None:
    """`bench data`, which needs TensorFlow as `step` does not."""
    if args.clips < 1:
        raise UserError(f"--clips={args.clips}: at least 1")
    found = measure_data.measure(config.load(args.config, args.overrides), args.clips)
    measure_data.show_table(found)
    if args.out:
        timing.write(Path(args.out), found)


def main(argv: Sequence[str]) -> None:
    commands = cli.Commands("bench", __doc__)
    command = commands.add("step", step, "time a training step on synthetic input")
    command.add_argument("--config", required=True, help=cli.CONFIG)
    command.add_argument("--steps", type=int, default=10, help="number of timed steps")
    command.add_argument("--batch", type=int, help="rows, instead of the config's")
    command.add_argument(
        "--profile", metavar="DIR", help=f"also trace {timing.TRACED} steps into DIR"
    )
    command.add_argument("--out", default="benchmarks/results/step.jsonl", help="append to it")

    command = commands.add("data", data, "time the input pipeline, part by part and together")
    command.add_argument("--config", required=True, help=cli.CONFIG)
    command.add_argument("--clips", type=int, default=100, help="number of clips for each part")
    command.add_argument("--out", help="append a line of JSON to this file")
    commands.run(argv)


if __name__ == "__main__":
    cli.run(main)
