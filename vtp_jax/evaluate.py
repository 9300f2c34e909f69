"""Evaluates a run: the evaluators of its config, on one of its checkpoints.

    python -m vtp_jax.evaluate --workdir runs/demo [--step 500 | latest | best]
        [--config.evals.retrieval.stream=val] [--config.data.evals.mine.root=DIR ...]

Prints the numbers with the protocol behind them, and writes WORKDIR/evaluation.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from vtp_jax import build, cli, metrics, sharding
from vtp_jax.types import UserError


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="vtp_jax.evaluate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--step", default="latest", help="a step, latest or best")
    args, overrides = cli.parse(parser, argv)
    run = build.restore(args.workdir, args.step, overrides)
    if not run.config["evals"]:
        raise UserError(f"{args.workdir}/config.json has no evals, so there is nothing to run")
    checks = build.evaluators(run.config["evals"], run.method, run.data.streams, run.mesh)
    found, protocols = {}, {}
    with sharding.activate(run.mesh):
        for name, (_, check) in checks.items():
            numbers = dict(check.run(run.state))
            rows = [(key, value) for key, value in numbers.items()]
            metrics.print_table(f"{name}, step {int(run.state.step)}", ("number", "value"), rows)
            print(f"{check.protocol}\n")
            found.update({f"{name}/{key}": value for key, value in numbers.items()})
            protocols[name] = check.protocol
    report = dict(step=int(run.state.step), numbers=found, protocols=protocols)
    path = Path(args.workdir) / "evaluation.json"
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
