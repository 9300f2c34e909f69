"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax

T = TypeVar("T")
EVERY = 10.0  # seconds between two plain lines


def track(
    items: Iterable[T],
    total: int,
    what: str,
    unit: str,
    count: Callable[[T], int] = lambda item: 1,
    *,
    out: Any = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Yields `items`, and shows how much of `total` is done and how much time is left. An item is
    done when the next one is asked for.

    On a terminal it draws a bar, which disappears at the end. Elsewhere it prints a line every
    EVERY seconds; work that is over before the first one prints nothing. Of several processes, the
    first one shows it.

    what, unit: "decoding", "videos"; count: the units of an item
    out:        a text stream; stderr by default, so that results can be piped
    """
    file = sys.stderr if out is None else out
    # JAX is not asked for its index in a single process: that would start its devices.
    if jax.distributed.is_initialized() and jax.process_index() > 0:
        yield from items
        return
    with contextlib.ExitStack() as stack:
        if is_terminal(file):
            show = stack.enter_context(bar(total, what, unit, file))
        else:
            show = lines(total, what, unit, file, clock)
        done = 0
        for item in items:
            yield item
            done = min(done + count(item), total)  # the last batch of a stream is padded
            show(done)


@contextlib.contextmanager
def bar(total: int, what: str, unit: str, file: Any) -> Iterator[Callable[[int], None]]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn(f"{unit}, left", markup=False),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(
        *columns,
        console=Console(file=file),
        transient=True,
        speed_estimate_period=300.0,  # seconds; an item may take a minute
        redirect_stdout=sys.stdout.isatty(),  # what goes to a file must not be drawn above the bar
        redirect_stderr=sys.stderr.isatty(),
    ) as drawn:
        task = drawn.add_task(what, total=total)
        yield lambda done: drawn.update(task, completed=done)


def lines(
    total: int, what: str, unit: str, file: Any, clock: Callable[[], float]
) -> Callable[[int], None]:
    start = last = clock()

    def show(done: int) -> None:
        nonlocal last
        now = clock()
        if done and now - last >= EVERY:
            last, rate = now, done / (now - start)
            left = duration((total - done) / rate)
            print(
                f"{what}: {done}/{total} {unit}, {number(rate)}/s, {left} left",
                file=file,
                flush=True,
            )

    return show


def number(value: Any) -> str:
    """A number as text: whole numbers as they are, others with three significant digits."""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    if value.is_integer() or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}"


def duration(seconds: float) -> str:
    """0:09, 3:20, 2:00:05, or 3 d 4 h."""
    whole = round(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def is_terminal(file: Any) -> bool:
    """Whether control characters may be written: a terminal that supports them.

    rich's own test is not used, because an environment variable can force it even for files.
    """
    return file.isatty() and os.environ.get("TERM") != "dumb"
