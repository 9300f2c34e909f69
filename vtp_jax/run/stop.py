"""Orderly stops: on SIGTERM or Ctrl-C the current step is finished and the state is saved.

A command's exit status is one of `Exit`, by which a scheduler tells a run that was preempted from
one that must not be started again.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax

from vtp_jax.run import pipes


class Exit(enum.IntEnum):
    """Exit statuses. A run whose steps are not all done never ends with 0.

    FAILED:      an unexpected error before anything new was saved: started again, it fails again
    MISTAKE:     a user's mistake, in one line; so does this
    RESTART:     the same command goes on (EX_TEMPFAIL of sysexits.h): stopped by SIGTERM, and
                 saved; or a machine, another process or the network failed; or an unexpected error
                 after something new was saved
    INTERRUPTED: stopped by Ctrl-C, and saved
    UNREAD:      the reader of its output went away, as in `vtp ... | head`; a training goes on
    """

    FINISHED = 0
    FAILED = 1
    MISTAKE = 2
    RESTART = 75
    INTERRUPTED = 130
    UNREAD = pipes.UNREAD


def after_save(error: BaseException) -> None:
    """Notes on an error that a checkpoint was written before it: it is worth another start."""
    error.vtp_saved = True  # pyright: ignore[reportAttributeAccessIssue]


def progressed(error: BaseException) -> bool:
    """Whether the run had written a checkpoint before the error ended it."""
    return getattr(error, "vtp_saved", False)


class Stopped(Exception):
    """A run was asked to stop before its last step, and has saved its state.

    step: the newest step that is saved, of `steps` (0: none yet); code: the Exit of the process
    """

    def __init__(self, step: int, steps: int, code: Exit):
        self.step, self.steps, self.code = step, steps, code
        by = "Ctrl-C" if code == Exit.INTERRUPTED else "SIGTERM"
        saved = f"saved step {step} of {steps}" if step else f"no step of {steps} is done"
        super().__init__(f"stopped by {by}: {saved}; the same command goes on from there")


class Stop:
    """Called with the number of steps done, it answers whether the run is to end there.

    Until the first call there is nothing to save, so a signal ends the process at once; so does a
    second Ctrl-C. With several processes, a signal may reach them at different times; they all end
    at the same step (JAX handles SIGTERM there).
    """

    def __init__(self) -> None:
        self.code = Exit.RESTART
        self._looping = self._asked = False

    def __call__(self, step: int) -> bool:
        self._looping = True
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _terminate(self, *_: Any) -> None:
        if not self._looping:
            _say("stopped by SIGTERM before the first step; the same command starts it")
            sys.exit(Exit.RESTART)
        self._asked = True
        _say("SIGTERM: the run saves its state and stops")

    def _interrupt(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self._looping:
            raise KeyboardInterrupt
        self.code = Exit.INTERRUPTED
        self._asked = True
        _say("Ctrl-C: the run saves its state and stops; once more ends it at once")
        if jax.process_count() > 1:  # to the other processes by JAX's own handler
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def on_signals() -> Iterator[Stop]:
    """Handles SIGTERM and Ctrl-C inside as `Stop` says; in another thread than the main one, which
    may not handle signals, they do what they did before."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {signal.SIGINT: stop._interrupt, signal.SIGTERM: stop._terminate}
    if jax.process_count() > 1:
        del handlers[signal.SIGTERM]
    before = {which: signal.signal(which, handler) for which, handler in handlers.items()}
    try:
        yield stop
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def _say(text: str) -> None:
    """Writes a line from a signal handler, which may have interrupted a write to sys.stderr."""
    with contextlib.suppress(BrokenPipeError):
        os.write(2, f"{text}\n".encode())
