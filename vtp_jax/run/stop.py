"""Graceful stop on SIGTERM: the current step is finished and the state is saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def on_sigterm() -> Iterator[Callable[[int], bool]]:
    """Yields a function: number of steps done -> whether SIGTERM asks the run to end there.

    With several processes, the signal may reach them at different times; they all end at the same
    step (JAX handles SIGTERM there).
    """
    event = threading.Event()
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
    elif threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # only the main thread may handle signals
    else:
        before = signal.signal(signal.SIGTERM, lambda *_: event.set())
        try:
            yield lambda step: event.is_set()
        finally:
            signal.signal(signal.SIGTERM, before)
