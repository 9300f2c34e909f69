"""Goodput: what the wall time of a run was spent on, over all restarts of its workdir.

WORKDIR/goodput.jsonl has one line for each life of the run, that is each process that trained in
the workdir, in their order; `read` sums them up. The line of the present life is brought up to date
every few seconds, so that a kill loses little. It begins when the loop does: a process that ended
before is not a life, and its time is part of what was between two others.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from vtp_jax.run import jsonl, paths

FILE = "goodput.jsonl"
# start: from the call of `train` to its loop: reading lists, checking the parts, restoring, making
#        the state
# compile: of the training step
# data: waiting for a batch, while the device may still be busy with earlier steps
# save: until the state is copied, and at the end until it is written
PARTS: Sequence[str] = ("start", "compile", "data", "step", "evaluate", "save")
REDONE: Sequence[str] = PARTS[2:]  # what a life repeats that an earlier one has done


class Life(NamedTuple):
    """A line of the file.

    start:    seconds since 1970
    first:    the step that it was restored at; 0: a new run
    done:     the newest step that it has finished
    finished: whether all steps of the run were done
    seconds:  by part
    marks:    (step, `seconds` when the state of that step was saved, and evaluated if it was); the
              first mark is of the step `first`
    """

    start: float
    first: int
    done: int
    finished: bool
    seconds: Mapping[str, float]
    marks: Sequence[tuple[int, Mapping[str, float]]]


class Spent(NamedTuple):
    """The wall time of a run, in seconds.

    parts: what each of PARTS took; "lost": work of steps that were done but not saved, when a
           process ended, and were done again; "between": from the end of one process to the start
           of the next: queues, machines, imports
    whole: their sum, from the first start to the last end
    lives: the number of processes
    """

    parts: Mapping[str, float]
    whole: float
    lives: int

    @property
    def goodput(self) -> float:
        """The share of the time that went into training steps which count."""
        return self.parts["step"] / self.whole if self.whole else 0.0


class Clock:
    """The clock of a life. At every instant one part runs: "start" from the beginning, the one of
    the innermost `with clock(part):` inside it, and "step" otherwise once `begin` was called. So
    the parts sum to the wall time. Process 0 writes; call from one thread.
    """

    def __init__(
        self,
        workdir: paths.PathLike,
        *,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        """every: seconds between two updates of the file."""
        self._path: epath.Path = paths.path(workdir) / FILE
        self._every, self._clock = every, clock
        self._start, self._since, self._written = wall(), clock(), -math.inf
        self._part = "start"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._marks: dict[int, Mapping[str, float]] = {}
        self._first, self._done, self._finished = 0, 0, False
        self._before: str | None = None  # the lines of earlier lives; None until `begin`

    def begin(self, step: int) -> None:
        """The loop begins, at a step that is restored or 0. Until then nothing is written."""
        self._first = self._done = step
        self._switch("step")
        self._marks = {step: dict(self._seconds)}
        self._before = jsonl.whole(self._path)
        self._write()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """The time inside belongs to this part."""
        outer = self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def did(self, step: int) -> None:
        """The steps before `step` are done."""
        self._done = step
        self._switch(self._part)
        if self._clock() - self._written >= self._every:
            self._write()

    def kept(self, step: int) -> None:
        """The state of a step is saved, or its evaluation: a restart from it repeats nothing of
        what was done until now."""
        self._switch(self._part)
        self._marks[step] = dict(self._seconds)
        self._write()

    def finish(self) -> None:
        """All steps are done; what is left to do is to save."""
        self._finished = True
        self._switch("save")

    def close(self) -> None:
        self._switch(self._part)
        self._write()

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _switch(self, part: str) -> str:
        now, before = self._clock(), self._part
        self._seconds[before] += now - self._since
        self._since, self._part = now, part
        return before

    def _write(self) -> None:
        if self._before is None or jax.process_index():
            return
        marks = [(step, rounded(at)) for step, at in self._marks.items()]
        life = Life(
            self._start, self._first, self._done, self._finished, rounded(self._seconds), marks
        )
        paths.replace(self._path, f"{self._before}{json.dumps(life._asdict())}\n")
        self._written = self._clock()


def read(workdir: paths.PathLike) -> Spent | None:
    """What the time of a run was spent on, or None if it has no goodput.jsonl."""
    lives, _ = jsonl.read(paths.path(workdir) / FILE, _life)
    return total(lives) if lives else None


def last_compile(workdir: paths.PathLike) -> float | None:
    """The seconds of compiling in the newest life of a run that compiled; None if none did."""
    lives, _ = jsonl.read(paths.path(workdir) / FILE, _life)
    return next((x for life in reversed(lives) if (x := life.seconds.get("compile"))), None)


def _life(line: dict[str, Any]) -> Life:
    life = Life(**line)
    return life._replace(marks=[(step, seconds) for step, seconds in life.marks])


def total(lives: list[Life]) -> Spent:
    """The lives of a run, in their order, summed up."""
    parts = dict.fromkeys((*PARTS, "lost", "between"), 0.0)
    upto, after = math.inf, None  # the oldest step that a later life was restored at; that life
    for life in reversed(lives):
        if after is not None:
            upto = min(upto, float(after.first))
            if not life.finished:
                parts["between"] += max(0.0, after.start - life.start - sum(life.seconds.values()))
        kept = counted(life, upto)
        for part, seconds in life.seconds.items():
            good = kept[part] if part in REDONE else seconds
            parts[part] += good
            parts["lost"] += seconds - good
        after = life
    return Spent(parts, sum(parts.values()), len(lives))


def counted(life: Life, upto: float) -> Mapping[str, float]:
    """The seconds of a life's parts, without the work on the steps after `upto`."""
    if life.done <= upto:
        return life.seconds
    marks = [seconds for step, seconds in life.marks if step <= upto]
    return marks[-1] if marks else dict.fromkeys(PARTS, 0.0)


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {part: round(n, 3) for part, n in seconds.items()}
