"""Runs the making of rows: one after the other in this thread, in several, or by tf.data.

The only place that runs TensorFlow. Rows are written directly into the arrays of batches.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int, UInt8

from vtp_jax.data.sources import Clip

AHEAD = 2  # batches made ahead of time


def cores() -> int:
    """CPU cores that this process may use: SLURM and containers narrow its affinity, where the
    system has one, and leave the machine's count as it is."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


Pixels = UInt8[np.ndarray, "..."]
# (place, array for its pixels) -> (code of the outcome, its clip, or None for padding, its fault)
Attempt = Callable[[int, Pixels], tuple[int, Clip | None, str]]


class Rows(NamedTuple):
    """The rows of a batch: pixels "b ...", codes "b", and of each its clip and what is wrong."""

    pixels: Pixels
    codes: Int[np.ndarray, "b"]
    clips: Sequence[Clip | None]
    faults: Sequence[str]


Batch = tuple[Pixels, list[Clip | None], list[str]]  # as it is filled, row by row
Run = Callable[..., Iterator[Rows]]


def run_here(
    attempt: Attempt, shape: Sequence[int], rows: int, first: int, stop: int | None, workers: int
) -> Iterator[Rows]:
    """Batches of `rows` places from `first` (to `stop`), one after the other, on demand."""
    for start in itertools.count(first, rows) if stop is None else range(first, stop, rows):
        pixels = np.empty((rows, *shape), np.uint8)
        tried = (attempt(start + n, row) for n, row in enumerate(pixels))
        codes, clips, faults = zip(*tried, strict=True)
        yield Rows(pixels, np.asarray(codes, np.int32), clips, faults)


def run_threads(
    attempt: Attempt, shape: Sequence[int], rows: int, first: int, stop: int, workers: int
) -> Iterator[Rows]:
    """As `run_here`, to `stop`, with the rows of a batch made by `workers` threads."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for start in range(first, stop, rows):
            pixels = np.empty((rows, *shape), np.uint8)
            tried = pool.map(attempt, range(start, start + rows), pixels)
            codes, clips, faults = zip(*tried, strict=True)
            yield Rows(pixels, np.asarray(codes, np.int32), clips, faults)


def run_tfdata(
    attempt: Attempt, shape: Sequence[int], rows: int, first: int, stop: int | None, workers: int
) -> Iterator[Rows]:
    """As `run_here`, by tf.data: `workers` rows in parallel, `AHEAD` batches ahead.

    TensorFlow handles only the codes: its copies of pixels would cost up to 2 ms per clip. Memory
    holds at most AHEAD + 2 batches, and `workers` videos while they are decoded.
    """
    tf = import_tensorflow()
    held = (AHEAD + 2) * rows * math.prod(shape) / 2**20
    logging.info("tf.data: %d workers, at most %.0f MiB of batches", workers, held)
    batches: dict[int, Batch] = {}
    lock = threading.Lock()

    def row(place: Any) -> np.int32:
        number, at = divmod(int(place) - first, rows)
        with lock:
            if number not in batches:
                batches[number] = np.empty((rows, *shape), np.uint8), [None] * rows, [""] * rows
            pixels, clips, faults = batches[number]
        code, clips[at], faults[at] = attempt(int(place), pixels[at])
        return np.int32(code)

    data = tf.data.Dataset.range(first, np.iinfo(np.int64).max if stop is None else stop)
    data = data.map(
        lambda place: tf.numpy_function(row, [place], tf.int32),
        num_parallel_calls=workers,
        deterministic=True,
    )
    data = data.batch(rows, drop_remainder=True).prefetch(AHEAD)
    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = workers + 1
    holder = [iter(data.with_options(options))]
    made = hand_out(holder, batches)
    # TensorFlow's threads call Python; without this, the interpreter would wait for them at exit.
    weakref.finalize(made, holder.clear)
    return made


def hand_out(holder: list[Any], batches: dict[int, Batch]) -> Iterator[Rows]:
    """The batches of the iterator in `holder`, until it ends or is removed from `holder`."""
    for number in itertools.count():
        codes = next(holder[0], None) if holder else None
        if codes is None:
            return
        pixels, clips, faults = batches.pop(number)
        yield Rows(pixels, codes.numpy(), clips, faults)


@functools.cache
def import_tensorflow() -> Any:
    """TensorFlow, kept off the accelerators: JAX needs their memory."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf
