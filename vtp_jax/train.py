"""Trains a method: the one loop with the one jitted step.

    vtp train --config demo --workdir runs/mine [--config.steps=500]

Run again with the same workdir, it resumes from the newest good checkpoint, with the same data
order and the same randomness: both are functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from vtp_jax import tree
from vtp_jax.data import kept
from vtp_jax.run import (
    boards,
    checkpoint,
    evaluations,
    goodput,
    metrics,
    paths,
    pipes,
    sharding,
    stop,
)
from vtp_jax.run.step import Compiled, Numbers, check_step, jit_step
from vtp_jax.setup import build, cli, config, hosts, subjects
from vtp_jax.show import pictures
from vtp_jax.types import State, UserError, at_least


class Log(NamedTuple):
    """`config.log`.

    every:       steps of a logged window
    max_skipped: steps in a row that may be skipped before the run stops
    pictures:    clips drawn for TensorBoard and W&B at each evaluation, if the method restores any
    wandb:       arguments of `wandb.init`, such as dict(project="vtp"); None: not to W&B
    """

    every: int = 50
    max_skipped: int = 20
    pictures: int = 2
    wandb: Mapping[str, Any] | None = None


def train(cfg: config.Config, workdir: paths.PathLike) -> dict[str, float]:
    """Trains until `cfg.steps` steps are done; returns the last numbers of training and evaluation.

    Raises stop.Stopped if it is asked to stop before, with its state saved; a signal before its
    first step ends the process. Raises UserError on a mistake in the config, and when
    `log.max_skipped` steps in a row were not finite.
    """
    folder, log = paths.path(workdir), cli.call(Log, "config.log", **cfg.log)
    at_least("config.log", 1, every=log.every)
    spent = goodput.Clock(folder)
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(stop.on_signals())
        stack.enter_context(spent)
        progress = stack.enter_context(metrics.Progress(cfg.steps, rows=cfg.batch))

        # -- The parts. A mistake in a config is found here, before anything compiles. What is
        # traced here is not traced again: with the shardings of the loop, on its mesh.
        mesh = build.training_mesh(cfg)
        stack.enter_context(sharding.activate(mesh))
        with progress.doing("opening the data"):
            data = build.data(cfg.data, batch=cfg.batch, seed=cfg.seed)
        with progress.doing("tracing the net"):
            parts = build.prepare(cfg, data, mesh)
        with progress.doing(f"checking the evaluators: {', '.join(cfg.evals) or 'none'}"):
            checks = build.evaluators(cfg.evals, parts.method, data.streams, mesh, parts.shapes)
            of = subjects.subjects(cfg, checks)
        wanted = sharding.with_shardings(parts.shapes, parts.placed)
        step = jit_step(parts.step, parts.placed, mesh)
        with progress.doing("checking the training step"):
            check_step(step, wanted, sharding.spec_on(data.spec, mesh))
        boards.check(log.wandb)

        # -- The state: restored, or born sharded. Nothing is written before the workdir is locked
        # and its checkpoints are known to fit.
        options = dict(config=cfg._asdict(), **cfg.checkpoint)
        saved = stack.enter_context(
            cli.call(checkpoint.Checkpoints, "config.checkpoint", workdir, **options)
        )
        with progress.doing("looking for a checkpoint"):
            state = saved.restore_latest(wanted)
            if state is not None:
                state = build.with_teachers(state, saved.teachers)
        first = 0 if state is None else int(state.step)
        stopping.restored(first, cfg.steps)
        kept.save(folder, data.keep, resumed=state is not None)
        write_config(folder, cfg, parts)
        put = functools.partial(sharding.put, mesh=mesh)
        batches = stack.enter_context(sharding.Prefetch(data.batches(first), put))
        if state is None:
            with progress.doing("making the parameters"):
                leaves, saved.teachers = build.warm(cfg.warm_start, cfg.fresh, parts.shapes, folder)
                state = make_state(parts, leaves)

        # -- The loop: report, save, evaluate, and only then take the next batch. In this order a
        # saved step has its numbers, and a state outlives its evaluation; a run that ended in
        # between evaluates first.
        shown = boards.start(folder, first, cfg._asdict(), log.wandb)
        writer = stack.enter_context(metrics.Writer(folder, first, shown))
        stack.enter_context(jax.transfer_guard("disallow"))

        @contextlib.contextmanager
        def compiling(what: str) -> Iterator[None]:
            with progress.doing(what), spent("compile"):
                yield

        # The time of several steps is not that of one.
        before = None if cfg.data.get("also") else goodput.last_compile(folder)
        update = Compiled(step, progress.say, compiling, before)
        count = tree.size(parts.shapes.params) / 1e6
        progress.say(
            f"{count:.1f} M parameters on {sharding.describe(mesh)}; step {first} of {cfg.steps}"
        )
        report = Report(writer, progress, log.max_skipped)
        spent.begin(first)
        for done in range(first, cfg.steps + 1):
            if done % log.every == 0:
                report.trained(done, batches.waited, data.counts(done))
            last = done == cfg.steps
            ending = stopping(done) or last
            saving = done > first and (ending or saved.due(done))
            if saving:
                report.trained(done, batches.waited, data.counts(done))
            spent.did(done)
            with progress.paused(), jax.transfer_guard("allow"):
                if saving:
                    jax.block_until_ready(state)  # waiting for the step is not saving
                    with spent("save"):
                        saved.save(done, state)
                        writer.flush()
                        if ending and not last:
                            saved.wait()
                    spent.kept(done)
                if ending and not last:
                    raise stop.Stopped(done, cfg.steps, stopping.code)
                due = [n for n, (every, _) in checks.items() if last or every and not done % every]
                if due and (done > first or (done > 0 and not saved.ranked(done))):
                    jax.block_until_ready(state)
                    with spent("evaluate"):
                        found = {f"{n}/{key}": x for n in due for key, x in checks[n][1].run(state)}
                        report.evaluated(done, due, found)
                        saved.rank(done, found)
                        for name in due:
                            numbers = tree.under(found, f"{name}/")
                            evaluations.write(folder, of[name], done, numbers, "training")
                        if shown:
                            run = build.Run(cfg, data, parts.method, mesh, state)
                            writer.pictures(done, storyboards(run, log.pictures))
                    spent.kept(done)
            if last:
                spent.finish()
                break

            with spent("data"):
                batch = next(batches)
            state, numbers = update(state, batch)
            del batch  # and its memory, when the step is done
            report.took(numbers)
            if done == first and log.every > 1:
                report.begun(done + 1, jax.device_get(numbers))
    return report.last


def make_state(parts: build.Parts, leaves: Mapping[str, Any]) -> State:
    """The state of step 0, born sharded. Its program runs once: a CPU's compiler is asked to search
    less, which takes a third of the time."""
    made = jax.jit(parts.start, out_shardings=parts.placed).lower(leaves)
    cpu = jax.default_backend() == "cpu"
    options: dict[str, str | bool] | None = {"xla_backend_optimization_level": "1"} if cpu else None
    return stop.aside(lambda: made.compile(options))(leaves)


def write_config(folder: epath.Path, cfg: config.Config, parts: build.Parts) -> None:
    """Writes config.json and the table of parameters, their shapes and shardings."""
    if jax.process_index() == 0:
        text = json.dumps(cfg._asdict(), indent=1)
        (folder / "config.json").write_text(text, encoding="utf-8")
        specs = jax.tree.map(lambda s: s.spec, parts.placed.params)
        table = sharding.table(parts.shapes.params, sharding=specs)
        (folder / "parameters.txt").write_text(table + "\n", encoding="utf-8")


def storyboards(run: build.Run, count: int) -> dict[str, np.ndarray]:
    """The first clips of the first evaluation stream as the net restores them: images by name, none
    if it restores none; a single process can draw."""
    streams = [stream for name, stream in run.data.streams.items() if "/" not in name]
    if not (count and streams and "reconstruct" in run.method.encode and jax.process_count() == 1):
        return {}
    try:
        clips = pictures.restore(run, streams[0], count)
    except (KeyError, UserError) as error:  # a stream without captions, for instance
        logging.warning("no pictures of restored clips on the boards: %s", error)
        return {}
    drawn = (pictures.storyboard(clip, f"clip {clip.id}") for clip in clips)
    return {f"restored/{n}": np.asarray(image) for n, image in enumerate(drawn)}


class Report:
    """Writes the numbers of a run to its file and shows them; `last` has the last of each name."""

    def __init__(self, writer: metrics.Writer, progress: metrics.Progress, max_skipped: int):
        self.writer, self.progress, self.max_skipped = writer, progress, max_skipped
        self.last: dict[str, float] = {}
        self.window: list[Numbers] = []  # of the steps since the last report
        self.skipped = 0  # steps in a row, up to now
        self.before = tree.under(writer.kept, "data/")  # rows read before this process began

    def begun(self, step: int, numbers: Numbers) -> None:
        """Shows the loss of a process's first step at once; it is part of the first window too."""
        loss = metrics.merge([numbers])["loss"]
        self.progress.say(f"step {step}: loss {metrics.number(loss)}")

    def took(self, numbers: Numbers) -> None:
        """Takes the numbers of the next step, on the device, for the next report."""
        self.window.append(numbers)

    def trained(self, step: int, waited: float, counts: Mapping[str, int]) -> None:
        """Reports the steps since the last report, of which `step` is the last, if there are any.
        waited: seconds of waiting for data so far; counts: rows read so far. Raises UserError after
        `max_skipped` skipped steps in a row."""
        if not self.window:
            return
        window, self.window = jax.device_get(self.window), []
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
    if cli.PRINT not in overrides:
        pipes.keep(f"the run goes on; its numbers are in {args.workdir}/metrics.jsonl")
    with stop.on_signals():  # a large set is read here, if values are chosen from it
        cfg = config.load(args.config, overrides, args.workdir)
    last = train(cfg, args.workdir)
    if jax.process_index() == 0:
        metrics.print_table("last numbers", ("name", "value"), list(last.items()))


if __name__ == "__main__":
    cli.run(main)
