"""Trains a method: the one loop with the one jitted step.

    vtp train --config demo --workdir runs/mine [--config.steps=500]

Run again with the same workdir, it resumes from the newest good checkpoint, with the same data
order and the same randomness: both are functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from etils import epath

from vtp_jax import tree
from vtp_jax.data import kept
from vtp_jax.run import checkpoint, evaluations, metrics, paths, sharding, stop
from vtp_jax.run.step import Numbers, check_step, jit_step
from vtp_jax.setup import build, cli, config, hosts, subjects
from vtp_jax.types import UserError, at_least


class Log(NamedTuple):
    """`config.log`. every: steps of a logged window; max_skipped: steps in a row that may be
    skipped before the run stops."""

    every: int = 50
    max_skipped: int = 20


def train(cfg: config.Config, workdir: paths.PathLike) -> dict[str, float]:
    """Trains until `cfg.steps` steps are done; returns the last numbers of training and evaluation.

    Raises stop.Stopped if it is asked to stop before, with its state saved; UserError on a mistake
    in the config, and when `log.max_skipped` steps in a row were not finite.
    """
    folder, log = paths.path(workdir), cli.call(Log, "config.log", **cfg.log)
    at_least("config.log", 1, every=log.every)

    # -- The parts. A mistake in a config is found here, before anything compiles.
    mesh = build.training_mesh(cfg)
    data = build.data(cfg.data, batch=cfg.batch, seed=cfg.seed)
    parts = build.prepare(cfg, data, mesh)
    checks = build.evaluators(cfg.evals, parts.method, data.streams, mesh, parts.shapes)
    of = subjects.subjects(cfg, checks)
    check_step(parts.step, parts.shapes, data.spec)
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(stop.on_signals())
        # -- The state: restored, or born sharded. Nothing is written before the workdir is locked
        # and its checkpoints are known to fit.
        stack.enter_context(sharding.activate(mesh))
        options = dict(config=cfg._asdict(), **cfg.checkpoint)
        saved = stack.enter_context(
            cli.call(checkpoint.Checkpoints, "config.checkpoint", workdir, **options)
        )
        state = saved.restore_latest(sharding.with_shardings(parts.shapes, parts.placed))
        kept.save(folder, data.keep, resumed=state is not None)
        write_config(folder, cfg, parts)
        if state is None:
            leaves, saved.teachers = build.warm(cfg.warm_start, cfg.fresh, parts.shapes, folder)
            state = jax.jit(parts.start, out_shardings=parts.placed)(leaves)
        else:
            state = build.with_teachers(state, saved.teachers)
        first = int(state.step)

        # -- The loop: save, evaluate, and only then take the next batch. In this order a state
        # outlives its evaluation; a run that ended in between evaluates first.
        put = functools.partial(sharding.put, mesh=mesh)
        batches = stack.enter_context(sharding.prefetch(data.batches(first), put))
        writer = stack.enter_context(metrics.Writer(folder, first))
        progress = stack.enter_context(metrics.Progress(cfg.steps, rows=cfg.batch))
        stack.enter_context(jax.transfer_guard("disallow"))
        update = jit_step(parts.step, parts.placed, mesh)
        count = tree.size(parts.shapes.params) / 1e6
        progress.say(
            f"{count:.1f} M parameters on {mesh.size} devices; step {first} of {cfg.steps}"
        )
        report, window = Report(writer, progress, log.max_skipped), []
        for done in range(first, cfg.steps + 1):
            last = done == cfg.steps
            ending = stopping(done) or last
            with progress.paused(), jax.transfer_guard("allow"):
                if done > first and (saved.due(done) or ending):
                    saved.save(done, state)
                    report.counted(done, data.counts(done))
                if ending and not last:
                    saved.wait()
                    raise stop.Stopped(done, cfg.steps, stopping.code)
                due = [n for n, (every, _) in checks.items() if last or every and not done % every]
                if due and (done > first or (done > 0 and not saved.ranked(done))):
                    found = {f"{n}/{key}": x for n in due for key, x in checks[n][1].run(state)}
                    report.evaluated(done, due, found)
                    saved.rank(done, found)
                    for name in due:
                        numbers = tree.under(found, f"{name}/")
                        evaluations.write(folder, of[name], done, numbers, "training")
            if last:
                break

            batch = next(batches)
            state, numbers = update(state, batch)
            del batch  # and its memory, when the step is done
            window.append(numbers)
            if len(window) == log.every or done + 1 == cfg.steps:
                report.trained(
                    done + 1, jax.device_get(window), batches.waited, data.counts(done + 1)
                )
                window = []
    return report.last


def write_config(folder: epath.Path, cfg: config.Config, parts: build.Parts) -> None:
    """Writes config.json and the table of parameters, their shapes and shardings."""
    if jax.process_index() == 0:
        text = json.dumps(cfg._asdict(), indent=1)
        (folder / "config.json").write_text(text, encoding="utf-8")
        specs = jax.tree.map(lambda s: s.spec, parts.placed.params)
        table = sharding.table(parts.shapes.params, sharding=specs)
        (folder / "parameters.txt").write_text(table + "\n", encoding="utf-8")


class Report:
    """Writes the numbers of a run to its file and shows them; `last` has the last of each name."""

    def __init__(self, writer: metrics.Writer, progress: metrics.Progress, max_skipped: int):
        self.writer, self.progress, self.max_skipped = writer, progress, max_skipped
        self.last: dict[str, float] = {}
        self.skipped = 0  # steps in a row, up to now
        self.before = tree.under(writer.kept, "data/")  # rows read before this process began

    def trained(
        self, step: int, window: Sequence[Numbers], waited: float, counts: Mapping[str, int]
    ) -> None:
        """Reports the steps since the last report, of which `step` is the last. waited: seconds of
        waiting for data so far; counts: rows read so far. Raises UserError after `max_skipped`
        skipped steps in a row."""
        for one in window:
            self.skipped = self.skipped + 1 if one["skipped"].total else 0
        means = metrics.merge(window)
        losses = {k: v for k, v in means.items() if k.startswith("loss")}
        rates = self.progress.show(step, losses, waited)
        means.update(clips_per_s=rates.clips, waited=rates.waited)
        self._write(step, {f"train/{k}": v for k, v in means.items()} | self._whole(counts))
        if self.skipped > self.max_skipped:
            raise UserError(
                f"{self.skipped} steps in a row had a loss or gradient that is not finite "
                f"(at step {step}); the newest checkpoint is from before. "
                "Lower the rate, or set optim.clip"
            )

    def counted(self, step: int, counts: Mapping[str, int]) -> None:
        """Reports the rows read for the steps before `step`, whose state is saved: a run that
        resumes from it goes on counting there."""
        self._write(step, self._whole(counts))

    def _whole(self, counts: Mapping[str, int]) -> dict[str, float]:
        """The counts of the whole run, as they are logged, from those of this process."""
        names = {**self.before, **counts}
        return {f"data/{k}": float(self.before.get(k, 0) + counts.get(k, 0)) for k in names}

    def evaluated(self, step: int, names: Sequence[str], found: Mapping[str, float]) -> None:
        """Reports the numbers "<evaluator>/<number>" of the evaluators `names`."""
        self._write(step, {f"eval/{key}": value for key, value in found.items()})
        for name in names:
            numbers = tree.under(found, f"{name}/")
            shown = (
                f"{k} {metrics.number(v)}" for k, v in numbers.items() if not k.startswith("n_")
            )
            self.progress.say("  ".join([f"step {step}  {name}:", *shown]))

    def _write(self, step: int, line: Mapping[str, float]) -> None:
        self.last.update(line)
        self.writer.write(step, line)


@hosts.together
def main(argv: Sequence[str]) -> None:
    parser = cli.parser("train", __doc__)
    parser.add_argument("--config", required=True, help=cli.CONFIG)
    parser.add_argument("--workdir", required=True, help="where the run writes, and resumes from")
    args, overrides = cli.parse(parser, argv)
    last = train(config.load(args.config, overrides, args.workdir), args.workdir)
    if jax.process_index() == 0:
        metrics.print_table("last numbers", ("name", "value"), list(last.items()))


if __name__ == "__main__":
    cli.run(main)
