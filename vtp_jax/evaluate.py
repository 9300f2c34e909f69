"""Evaluates a run: the evaluators of its config, on one of its checkpoints.

    vtp evaluate --workdir runs/demo [--step 1800 | latest | best]
        [--config.evals.retrieval.stream=val] [--config.data.evals.mine.root=DIR ...]

Prints the numbers with the protocol behind them, and writes WORKDIR/evaluation.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from vtp_jax.run import metrics, sharding
from vtp_jax.setup import build, cli, hosts
from vtp_jax.types import UserError


def evaluate(run: build.Run, workdir: str | Path) -> dict[str, float]:
    """Runs the evaluators of the run's config; prints the numbers with their protocols, writes
    WORKDIR/evaluation.json and returns {"<evaluator>/<number>": value}. With several processes, all
    return the numbers; the first prints and writes them."""
    if not run.config.evals:
        raise UserError(f"{workdir}/config.json has no evals, so there is nothing to run")
    checks = build.evaluators(run.config.evals, run.method, run.data.streams, run.mesh)
    step = int(run.state.step)
    found, protocols = {}, {}
    with sharding.activate(run.mesh):
        for name, (_, check) in checks.items():
            numbers = dict(check.run(run.state))
            if jax.process_index() == 0:
                rows = [(key, value) for key, value in numbers.items()]
                metrics.print_table(f"{name}, step {step}", ("number", "value"), rows)
                print(f"{check.protocol}\n")
            found.update({f"{name}/{key}": value for key, value in numbers.items()})
            protocols[name] = check.protocol
    if jax.process_index() == 0:
        report = dict(step=step, numbers=found, protocols=protocols)
        path = Path(workdir) / "evaluation.json"
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return found


@hosts.together
def main(argv: Sequence[str]) -> None:
    parser = cli.parser("evaluate", __doc__)
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--step", default="latest", help="a step, latest or best")
    args, overrides = cli.parse(parser, argv)
    evaluate(build.restore(args.workdir, args.step, overrides), args.workdir)
    if jax.process_index() == 0:
        print(f"written to {Path(args.workdir) / 'evaluation.json'}")


if __name__ == "__main__":
    cli.run(main)
