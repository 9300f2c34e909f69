"""Trains a method: the one loop with the one jitted step.

    python -m vtp_jax.train --config configs/demo.py --workdir runs/mine [--config.steps=500]

Run again with the same workdir, it goes on from the newest good checkpoint, with the same data
order and the same randomness: both are functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vtp_jax import tree
from vtp_jax.run import checkpoint as checkpoints
from vtp_jax.run import metrics as meters
from vtp_jax.run import sharding as shardings
from vtp_jax.run.step import Numbers, check_step, jit_step, make_step
from vtp_jax.setup import build, cli, hosts
from vtp_jax.types import Batch, Mean, UserError


def train(
    *,
    workdir: str,
    seed: int,
    steps: int,
    batch: int,
    data: Mapping[str, Any],
    method: Mapping[str, Any],
    optim: Mapping[str, Any],
    mesh: Mapping[str, int],
    sharding: Sequence[Any],
    evals: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    log: Mapping[str, Any],
    task: Mapping[str, Any] | None = None,
    average: float | Mapping[str, Any] | None = None,
    warm_start: Sequence[Sequence[str]] = (),
    fresh: Sequence[str] = (),
) -> dict[str, float]:
    """Trains until `steps` steps are done; returns the last numbers of training and evaluation.

    batch: rows of all devices together. task: what the method is trained for, where that is not
    its own loss. average: the decay of averaged weights, see average.py. warm_start, fresh: the
    weights of step 0, see warm_start.py. log: every (steps), max_skipped (steps in a row that may
    be skipped before the run stops). The rest is what the makers of the parts take.
    """
    config = {k: v for k, v in locals().items() if k != "workdir"}
    folder, say_every, max_skipped = Path(workdir), *cli.call(log_options, "config.log", **log)

    # -- The parts. What a config can have wrong is found here, before anything compiles.
    devices = cli.call(shardings.make_mesh, "config.mesh", **mesh)
    shardings.check_rows(build.batch_sizes(data, batch), devices)
    loaded = build.data(data, batch=batch, seed=seed)
    made = build.method(config, loaded.facts)
    start, optimizer = build.start(made, optim, loaded.spec, seed)
    shapes = jax.eval_shape(start)
    checks = build.evaluators(evals, made, loaded.streams, devices, shapes)
    placed = shardings.state_shardings(shapes, devices, sharding)
    step = make_step(made, optimizer, seed)
    check_step(step, shapes, loaded.spec)
    with contextlib.ExitStack() as stack:
        # -- The state: restored, or born sharded. Nothing is written before the workdir is ours and
        # what it holds is known to fit.
        stack.enter_context(shardings.activate(devices))
        options = dict(config=config, **checkpoint)
        saved = stack.enter_context(
            cli.call(checkpoints.Checkpoints, "config.checkpoint", workdir, **options)
        )
        state = saved.restore_latest(shardings.with_shardings(shapes, placed))
        if jax.process_index() == 0:
            (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
            specs = jax.tree.map(lambda s: s.spec, placed.params)
            table = shardings.table(shapes.params, sharding=specs)
            (folder / "parameters.txt").write_text(table + "\n", encoding="utf-8")
        if state is None:
            given = build.warm(warm_start, fresh, shapes, folder)
            state = jax.jit(start, out_shardings=placed)(given)
        first = int(state.step)

        # -- The loop: save, evaluate, and only then take the next batch. In this order a state
        # outlives its evaluation; a run that ended in between evaluates first.
        def put(item: tuple[Batch, Mapping[str, int]]) -> tuple[Batch, Mapping[str, int]]:
            return shardings.put(item[0], devices), item[1]

        # What has been read so far goes with each batch: others are made ahead.
        items = ((one, loaded.counts()) for one in loaded.batches(first))
        batches = stack.enter_context(shardings.prefetch(items, put))
        writer = stack.enter_context(meters.Writer(folder, first))
        progress = stack.enter_context(meters.Progress(steps, rows=batch))
        stopping = stack.enter_context(on_signal(signal.SIGTERM))
        stack.enter_context(jax.transfer_guard("disallow"))
        update = jit_step(step, placed, devices)
        count = tree.size(shapes.params) / 1e6
        progress.say(f"{count:.1f} M parameters on {devices.size} devices; step {first} of {steps}")
        window: list[Numbers] = []
        last: dict[str, float] = {}
        skipped = 0
        for done in range(first, steps + 1):
            ending = stopping(done) or done == steps
            new = done > first or (done > 0 and not saved.ranked(done))
            due = [n for n, (k, _) in checks.items() if done == steps or (k and done % k == 0)]
            with progress.paused(), jax.transfer_guard("allow"):
                if done > first and (saved.due(done) or ending):
                    saved.save(done, state)
                if due and new:
                    found = {
                        f"{name}/{key}": value
                        for name in due
                        for key, value in checks[name][1].run(state)
                    }
                    line = {f"eval/{key}": value for key, value in found.items()}
                    writer.write(done, line)
                    for name in due:
                        progress.say(f"step {done}  " + summary(f"eval/{name}/", line))
                    last.update(line)
                    saved.rank(done, found)
            if ending:
                break

            given, read = next(batches)
            state, numbers = update(state, given)
            del given  # and its memory, when the step is done
            window.append(numbers)
            if len(window) == say_every or done + 1 == steps:
                values = jax.device_get(window)
                for one in values:
                    skipped = skipped + 1 if one["skipped"].total else 0
                merged = merge(values)
                terms = {k: v for k, v in merged.items() if k.startswith("loss")}
                rates = progress.show(done + 1, terms, batches.waited)
                merged.update(clips_per_s=rates.clips, waited=rates.waited)
                seen = {f"data/{k}": v for k, v in read.items()}
                line = {**{f"train/{k}": v for k, v in merged.items()}, **seen}
                last.update(line)
                writer.write(done + 1, line)
                window = []
                if skipped > max_skipped:
                    raise UserError(
                        f"{skipped} steps in a row had a loss or gradient that is not finite "
                        f"(at step {done + 1}); the newest checkpoint is from before. "
                        "Lower the rate, or set optim.clip"
                    )
    return last


def log_options(*, every: int = 50, max_skipped: int = 20) -> tuple[int, int]:
    return every, max_skipped


def merge(window: Sequence[Numbers]) -> dict[str, float]:
    """Means over the steps of a window, without the skipped ones, except for their share."""
    good = [one for one in window if not one["skipped"].total] or window[-1:]
    found = {}
    for name in good[0]:
        total, count = (np.sum([getattr(one[name], f) for one in good]) for f in Mean._fields)
        found[name] = float(total / max(count, 1))
    found["skipped"] = sum(float(one["skipped"].total) for one in window) / len(window)
    return found


def summary(prefix: str, found: Mapping[str, float]) -> str:
    """One evaluator's numbers in a line; counts are left to the files."""
    shown = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    text = (f"{k} {meters.number(v)}" for k, v in shown.items() if not k.startswith("n_"))
    return "  ".join([prefix.split("/")[1] + ":", *text])


@contextlib.contextmanager
def on_signal(number: signal.Signals) -> Iterator[Callable[[int], bool]]:
    """Whether to end after so many steps: the signal was sent, the step is finished, the state is
    saved, the run ends well. Of several processes each may be told at another moment; all of them
    end at the same step (JAX listens for SIGTERM there)."""
    event = threading.Event()
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
    elif threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # only the main thread may handle signals
    else:
        before = signal.signal(number, lambda *_: event.set())
        try:
            yield lambda step: event.is_set()
        finally:
            signal.signal(number, before)


@hosts.together
def main(argv: Sequence[str]) -> None:
    parser = cli.parser("train", __doc__)
    parser.add_argument("--config", required=True, help=cli.CONFIG)
    parser.add_argument("--workdir", required=True, help="where the run writes, and goes on from")
    args, overrides = cli.parse(parser, argv)
    config = cli.plain(cli.load_config(args.config, overrides))
    last = cli.call(train, "config", workdir=args.workdir, **config)
    rows = [(name, value) for name, value in last.items()]
    if jax.process_index() == 0:
        meters.print_table("last numbers", ("name", "value"), rows)


if __name__ == "__main__":
    cli.run(main)
