"""Reporting of numbers: metrics files, a live progress line, tables."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8

from vtp_jax.progress import duration, is_terminal, number
from vtp_jax.run import jsonl, paths
from vtp_jax.run.boards import Board
from vtp_jax.types import Mean


class Writer:
    """Writes numbers to `metrics.jsonl`, and to boards (run/boards.py).

    A line is `{"step": 100, "time": seconds since 1970, "loss": 3.2, ...}`; non-finite numbers are
    written as null, because JSON has none. Started at step s, it drops lines after s, so that a
    resumed run has a single curve. Only process 0 writes. kept: the last values, by name, of the
    lines that it found and kept.
    """

    def __init__(self, workdir: paths.PathLike, start: int = 0, boards: Sequence[Board] = ()):
        self.kept: dict[str, Any] = {}
        self._file: paths.Lines | None = None
        self._boards = boards
        if jax.process_index():
            return
        folder = paths.path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [x for x in _read_and_keep(path) if x["step"] <= start]
        for line in kept:
            self.kept.update(line)
        self._file = paths.Lines(path, [json.dumps(x) for x in kept])

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Adds one line and flushes it."""
        if self._file is None:
            return
        values = {k: float(v) for k, v in numbers.items()}
        line = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.add(json.dumps({"step": int(step), "time": time.time(), **line}))
        for board in self._boards:
            board.write_scalars(int(step), values)
            board.flush()

    def pictures(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w c"]]) -> None:
        """Shows pictures on the boards."""
        for board in self._boards if images else ():
            board.write_images(int(step), images)
            board.flush()

    def flush(self) -> None:
        """Uploads the lines that are not yet in a bucket."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for board in self._boards:
            board.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def read(path: paths.PathLike) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without those that a kill or a disk damaged; none if there is
    no file."""
    return jsonl.read(paths.path(path), _with_step)[0]


def _read_and_keep(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; those that are damaged are moved to a file beside it."""
    lines, damaged = jsonl.read(path, _with_step)
    if damaged:
        aside = path.with_suffix(".jsonl.damaged")
        before = aside.read_bytes() if aside.exists() else b""
        aside.write_bytes(before + b"".join(one.text + b"\n" for one in damaged))
        logging.warning("%d damaged lines of %s are kept in %s", len(damaged), path, aside)
    return lines


def _with_step(line: dict[str, Any]) -> dict[str, Any]:
    return {**line, "step": int(line["step"])}


def merge(window: Sequence[Mapping[str, Mean]]) -> dict[str, float]:
    """Means over the steps of a window. Skipped steps count only in `skipped`, which is their
    share; if all were skipped, the numbers are those of the last one."""
    good = [one for one in window if not one["skipped"].total] or window[-1:]
    found = {}
    for name in good[0]:
        total, count = (np.sum([getattr(one[name], f) for one in good]) for f in Mean._fields)
        found[name] = float(total / max(count, 1))
    found["skipped"] = sum(float(one["skipped"].total) for one in window) / len(window)
    return found


class Rates(NamedTuple):
    """Speed over a recent window; NaN until there are two points.

    clips: rows per second; waited: share of the time spent waiting for data; eta: seconds left.
    """

    clips: float
    waited: float
    eta: float


class Progress:  # not `progress.track`: its line is the log, with losses, and others go above it
    """A live bar of a run on a terminal, plain lines elsewhere; process 0 only.

    Writes to `out`, a text stream, or to stdout. Call `show` every few steps; rates are measured
    between the last `window` + 1 calls, so the time before the first one, which includes compiling,
    does not count. Nor does time inside `paused()` (evaluation, saving).
    """

    def __init__(
        self,
        steps: int,
        *,
        rows: int,
        out: Any = None,
        window: int = 20,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._steps, self._rows, self._clock = steps, rows, clock
        self._file: TextIO = sys.stdout if out is None else out
        self._points: collections.deque[tuple[int, float, float]] = collections.deque(
            maxlen=window + 1
        )
        self._idle = 0.0
        self._live: Any = None
        self._now: tuple[int, str] = (0, "")  # the step and the line below the bar
        self._doing: tuple[str, float] | None = None  # and since when
        self._quiet = jax.process_index() > 0
        if is_terminal(self._file) and not self._quiet:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._file), get_renderable=self._draw)
            self._live.start()

    def show(self, step: int, terms: Mapping[str, Any], waited: float = 0.0) -> Rates:
        """Shows step `step` of the run with these numbers.

        `waited`: total seconds spent waiting for data so far (`Prefetch.waited`).
        """
        self._points.append((step, self._clock() - self._idle, waited))
        rates = self._rates()
        text = _line(step, self._steps, terms, rates)
        if self._live is not None:
            self._now = (step, text)
            self._live.refresh()
        else:
            self.say(text)
        return rates

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            print(text, file=self._file, flush=True)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Says what is done inside, before the first step or between two: below the bar, with the
        seconds that it has taken; elsewhere as a line."""
        if self._live is None:
            self.say(f"{what} ...")
        self._doing = (what, self._clock())
        try:
            yield
        finally:
            self._doing = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as training time."""
        start = self._clock()
        try:
            yield
        finally:
            self._idle += self._clock() - start

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _draw(self) -> Any:
        """What is on the terminal now; called several times a second, in a thread."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step, text = self._now
        if doing := self._doing:
            text = f"{doing[0]} ... {duration(self._clock() - doing[1])}"
        grid = Table.grid(expand=True)
        grid.add_row(ProgressBar(total=self._steps, completed=step))
        grid.add_row(Text(text))
        return grid

    def _rates(self) -> Rates:
        (step0, time0, waited0), (step1, time1, waited1) = self._points[0], self._points[-1]
        if step1 == step0 or time1 <= time0:
            return Rates(math.nan, math.nan, math.nan)
        seconds, steps = time1 - time0, step1 - step0
        return Rates(
            clips=steps * self._rows / seconds,
            waited=(waited1 - waited0) / seconds,
            eta=(self._steps - step1) * seconds / steps,
        )


def _line(step: int, steps: int, terms: Mapping[str, Any], rates: Rates) -> str:
    parts = [f"step {step}/{steps}  {100 * step // max(steps, 1)} %"]
    parts[0] += "".join(f"  {name} {number(value)}" for name, value in terms.items())
    if not math.isnan(rates.clips):
        parts.append(f"{number(rates.clips)} clips/s")
        parts.append(f"data {100 * rates.waited:.0f} %")
        parts.append(f"eta {duration(rates.eta)}")
    return " | ".join(parts)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    out: Any = None,
) -> None:
    """A table of final numbers: with borders on a terminal, as aligned plain text elsewhere.

    Numbers are right-aligned. out: a text stream, stdout by default.
    """
    file: TextIO = sys.stdout if out is None else out
    cells = [[c if isinstance(c, str) else number(c) for c in row] for row in rows]
    right = [all(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    if is_terminal(file):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table()
        for name, r in zip(columns, right, strict=True):
            drawn.add_column(name, justify="right" if r else "left")
        for row in cells:
            drawn.add_row(*map(Text, row))
        Console(file=file).print(Text(title, style="bold"), drawn, sep="\n")
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(title, file=file)
    for row in [list(columns), *cells]:
        aligned = [
            cell.rjust(w) if r else cell.ljust(w)
            for cell, w, r in zip(row, widths, right, strict=True)
        ]
        print("  ".join(aligned).rstrip(), file=file, flush=True)
