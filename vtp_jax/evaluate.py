"""Evaluates a run: the evaluators of its config, on one of its checkpoints.

    vtp evaluate --workdir runs/demo [--step 1800 | latest | best] [--only retrieval]
        [--config.evals.retrieval.stream=mine --config.data.evals.mine.root=DIR ...]

Prints the numbers with the protocol behind them, and adds them to WORKDIR/evaluations.jsonl, next
to those of other steps and sets: the report shows them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax

from vtp_jax import progress
from vtp_jax.data import pipeline
from vtp_jax.run import evaluations, metrics, paths, sharding
from vtp_jax.setup import build, cli, hosts, subjects
from vtp_jax.types import Batch, Stream, UserError


def evaluate(
    run: build.Run,
    workdir: paths.PathLike,
    only: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> dict[str, float]:
    """Runs the evaluators of the run's config, or those named in `only`; prints the numbers with
    their protocols, adds them to WORKDIR/evaluations.jsonl and returns {"<evaluator>/<number>":
    value}. With several processes, all return the numbers; the first prints and writes them.

    overrides: the `--config.x=y` by which `run.config` differs from the config in the workdir.
    """
    if not run.config.evals:
        raise UserError(f"{workdir}/config.json has no evals, so there is nothing to run")
    chosen = {
        name: cli.choose("vtp evaluate", "evaluator", name, run.config.evals)
        for name in only or run.config.evals
    }
    opened = run.data.streams
    streams = pipeline.Lazy(opened, lambda name: shown(name, opened[name]))
    checks = build.evaluators(chosen, run.method, streams, run.mesh)
    of = subjects.subjects(run.config, checks, overrides)
    step, found = int(run.state.step), {}
    with sharding.activate(run.mesh):
        for name, (_, check) in checks.items():
            if jax.process_index() == 0:
                print(f"{name}: step {step}, {of[name].type} on '{of[name].stream}'", flush=True)
            numbers = dict(check.run(run.state))
            if jax.process_index() == 0:
                metrics.print_table(
                    f"{name}, step {step}", ("number", "value"), list(numbers.items())
                )
                print(f"{of[name].protocol}\n", flush=True)
            evaluations.write(workdir, of[name], step, numbers, "vtp evaluate")
            found.update({f"{name}/{key}": value for key, value in numbers.items()})
    return found


def shown(name: str, stream: Stream) -> Stream:
    """A stream that shows how much of it has been read."""

    def batches() -> Iterator[Batch]:
        return progress.track(
            stream.batches(),
            stream.rows,
            f"reading '{name}'",
            "rows",
            lambda batch: len(batch["valid"]) * jax.process_count(),
        )

    return stream._replace(batches=batches)


@hosts.together
def main(argv: Sequence[str]) -> None:
    parser = cli.parser("evaluate", __doc__)
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--step", default="latest", help="a step, latest or best")
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="NAME", help="evaluators; all by default"
    )
    args, overrides = cli.parse(parser, argv)
    evaluate(build.restore(args.workdir, args.step, overrides), args.workdir, args.only, overrides)
    if jax.process_index() == 0:
        print(f"written to {paths.path(args.workdir) / evaluations.FILE}")


if __name__ == "__main__":
    cli.run(main)
