"""Runs the making of shards: in several processes of this machine, or on Apache Beam.

A process that dies or makes no progress is restarted without the clip it was working on.
"""

from __future__ import annotations

import collections
import importlib
import multiprocessing
import os
import resource
import select
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from vtp_jax.data.inputs import Task
from vtp_jax.data.shards import Form, make_shard, read_removed
from vtp_jax.types import UserError

POLL = 1.0  # seconds
PATIENCE = 60.0  # seconds without a report, in addition to twice the limit for a video


class Running:
    """A task that runs in a process. at: the number of its current item (-1: none yet); quiet:
    polls since its last report."""

    def __init__(self, start: Callable[..., Any], task: Task, skip: Mapping[int, str]):
        self.task, self.skip = task, dict(skip)
        self.at, self.quiet = -1, 0
        self.process, self.connection = start(task, self.skip)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def run(
    tasks: Sequence[Task], out: Path, form: Form, *, workers: int, memory: float
) -> Iterator[int]:
    """Makes shards in `workers` parallel processes; yields the number of items finished since the
    last yield. memory: GiB that a process may use.

    The clip at which a process dies or gets stuck is rejected as `crashed` or `stuck`. Raises
    UserError if that does not help.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    removed = read_removed(out)

    def start(task: Task, skip: Mapping[int, str]) -> tuple[Any, Connection]:
        receiver, sender = context.Pipe(duplex=False)
        given = (sender, task, out, form, removed, skip, memory)
        process = context.Process(target=work, args=given, daemon=True)
        process.start()
        sender.close()
        return process, receiver

    waiting = collections.deque((task, {}) for task in tasks)
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(Running(start, *waiting.popleft()))
            ready = wait([one.connection for one in running], timeout=POLL)
            for one in list(running):
                if one.connection in ready:
                    cause, new = listen(one)
                    yield new
                else:
                    one.quiet += 1
                    cause = "stuck" if one.quiet * POLL > PATIENCE + 2 * form.seconds else ""
                if cause:
                    one.end()
                    running.remove(one)
                if cause in ("stuck", "crashed"):
                    if one.at in one.skip or one.at < 0:
                        where = f"twice at clip {one.at}" if one.at >= 0 else "as it started"
                        raise UserError(f"{one.task.name}: the process died {where}")
                    waiting.appendleft((one.task, {**one.skip, one.at: cause}))
    finally:
        for one in running:
            one.end()


def listen(one: Running) -> tuple[str, int]:
    """Reads a process's reports: (the cause of its end, `done` or `crashed`, or "" if it is still
    running; the number of items finished since the last call)."""
    before = one.at
    try:
        while one.connection.poll():
            report = one.connection.recv()
            if isinstance(report, str):
                raise UserError(f"{one.task.name}: {report}")
            one.at, one.quiet = (report, 0) if report is not None else (one.at, 0)
            if report is None:
                return "done", one.at - max(before, 0)
    except EOFError:
        return "crashed", 0
    return "", max(one.at, 0) - max(before, 0)


def work(
    connection: Connection,
    task: Task,
    out: Path,
    form: Form,
    removed: AbstractSet[str],
    skip: Mapping[int, str],
    memory: float,
) -> None:
    """`make_shard` in a process of its own, within a memory limit."""
    limit_memory(memory)
    die_with(connection)
    try:
        make_shard(task, out, form, removed, skip, connection.send)
        connection.send(None)
    except Exception as error:  # such as a full disk
        known = isinstance(error, OSError | UserError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        connection.send(" ".join(text.split()))


def die_with(connection: Connection) -> None:
    """Ends this process as soon as the reading end of its connection is closed: an orphan could
    write into the folder of the next run."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLERR)

    def watch() -> None:
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def limit_memory(gib: float) -> None:
    """Limits the memory of this process to `gib` GiB more than it has now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return  # not Linux: no working limit
    most = int(pages * resource.getpagesize() + gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run_beam(tasks: Sequence[Task], out: Path, form: Form, options: Sequence[str]) -> None:
    """`run` on Apache Beam, by default on its runner for one machine; all workers need access to
    the folder `out`. options: for Beam, such as --runner=FlinkRunner."""
    try:
        beam = importlib.import_module("apache_beam")
        options_of = importlib.import_module("apache_beam.options.pipeline_options")
    except ImportError:
        raise UserError("--runner beam needs Apache Beam: pip install 'vtp_jax[beam]'") from None
    removed = read_removed(out)
    with beam.Pipeline(options=options_of.PipelineOptions(list(options))) as pipeline:
        make = beam.Map(make_shard, out=out, form=form, removed=removed)
        _ = pipeline | beam.Create(list(tasks)) | beam.Reshuffle() | make
