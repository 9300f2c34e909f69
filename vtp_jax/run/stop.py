"""Orderly stops: on SIGTERM or Ctrl-C the current step is finished and the state is saved. Before
the first step there is nothing to save: a run ends at once, and says so.

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
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax

from vtp_jax.progress import is_terminal
from vtp_jax.run import pipes

T = TypeVar("T")


class Exit(enum.IntEnum):
    """Exit statuses. A run whose steps are not all done never ends with 0.

    FAILED:      an unexpected error before anything new was saved: started again, it fails again
    MISTAKE:     a user's mistake, in one line; so does this
    RESTART:     the same command goes on (EX_TEMPFAIL of sysexits.h): stopped by SIGTERM, saved
                 if a step was done; or a machine, another process or the network failed; or an
                 unexpected error after something new was saved
    INTERRUPTED: stopped by Ctrl-C, saved if a step was done, unless a second one ended it at once
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
        super().__init__(f"stopped by {NAMES[code]}: {describe(step, steps)}")


NAMES = {Exit.INTERRUPTED: "Ctrl-C", Exit.RESTART: "SIGTERM"}


def describe(step: int, steps: int) -> str:
    """What there is of a run whose newest saved step is `step`, and how to go on."""
    if not step:
        return f"no step of {steps} is saved; the same command starts it"
    return f"saved step {step} of {steps}; the same command goes on from there"


class Stop:
    """Called with the number of steps done, it answers whether the run is to end there.

    Until this process has done a step there is nothing new to save, so a signal ends it at once; so
    does a second Ctrl-C. With several processes, a signal may reach them at
    different times; once they are in the loop they all end at the same step (JAX handles SIGTERM
    there).
    """

    def __init__(self) -> None:
        self.code = Exit.RESTART
        self._state = "nothing new was trained; the same command starts it again"
        self._first: int | None = None
        self._saving = self._asked = False

    def restored(self, step: int, steps: int) -> None:
        """The run is at a step of `steps` that is saved, or at 0: what there is if it ends before
        the next one is done."""
        self._state = describe(step, steps)

    def __call__(self, step: int) -> bool:
        self._first = step if self._first is None else self._first
        self._saving = step > self._first or jax.process_count() > 1
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _terminate(self, *_: Any) -> None:
        if not self._saving:
            self._leave(Exit.RESTART, f"stopped by SIGTERM: {self._state}")
        self._asked = True
        _say("SIGTERM: the run saves its state and stops")

    def _interrupt(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._interrupt_again)
        if not self._saving:
            self._leave(Exit.INTERRUPTED, f"stopped by Ctrl-C: {self._state}")
        self.code = Exit.INTERRUPTED
        self._asked = True
        _say("Ctrl-C: the run saves its state and stops; once more ends it at once")
        if jax.process_count() > 1:  # to the other processes by JAX's own handler
            os.kill(os.getpid(), signal.SIGTERM)

    def _interrupt_again(self, *_: Any) -> None:
        text = "stopped by a second Ctrl-C, perhaps before its state was saved"
        self._leave(
            Exit.INTERRUPTED, f"{text}; the same command goes on from the newest checkpoint"
        )

    def _leave(self, code: Exit, text: str) -> NoReturn:
        _say(text)
        end(code)


@contextlib.contextmanager
def on_signals() -> Iterator[Stop]:
    """Handles SIGTERM and Ctrl-C inside as `Stop` says; in another thread than the main one, which
    may not handle signals, they do what they did before."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {signal.SIGINT: stop._interrupt, signal.SIGTERM: stop._terminate}
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        del handlers[signal.SIGTERM]
    before = {which: signal.signal(which, handler) for which, handler in handlers.items()}
    try:
        yield stop
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def aside(function: Callable[[], T]) -> T:
    """function(), in another thread: a signal is handled while it lasts. In this thread Python
    would handle none before a long call into C++, such as a compilation, is over."""
    found: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(function())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            failed.append(error)

    thread = threading.Thread(target=work, name="aside", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failed:
        raise failed[0]
    return found[0]


def end(code: int) -> NoReturn:
    """Ends the process at once, as a kill would, with a terminal's cursor shown again.

    Not by an exception: one that a signal handler raises is lost if the signal arrives inside a
    callback, such as XLA's for garbage collection; and libraries whose threads are at work while
    they are taken down abort the process.
    """
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # of a terminal that is gone
            if is_terminal(file):
                os.write(file.fileno(), b"\x1b[?25h")
    os._exit(code)


def _say(text: str) -> None:
    """Writes a line from a signal handler, which may have interrupted a write to sys.stderr."""
    with contextlib.suppress(BrokenPipeError):
        os.write(2, f"{text}\n".encode())
