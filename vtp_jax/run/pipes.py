"""Readers that go away, as in `vtp configs | head`: a command ends, a training goes on.

A broken pipe of stdout or stderr is handled where it is written, so that it is never taken for that
of a socket to another process. Nothing here imports JAX: `vtp --help` needs it too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

UNREAD = 128 + signal.SIGPIPE  # what a shell says of a program that SIGPIPE ended


class Pipe:
    """stdout or stderr. When its reader goes away, the process ends with UNREAD, from the main
    thread; after `keep`, or in another thread, what is written is dropped instead."""

    def __init__(self, stream: Any):
        self.stream, self.broken, self.kept = stream, False, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self.whole():
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.whole():
            self.stream.flush()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self.drop()
        main = threading.current_thread() is threading.main_thread()
        if self.broken and not self.kept and main:
            raise SystemExit(UNREAD)

    def drop(self) -> None:
        """Sends what is written from now on, and what waits to be, to nowhere."""
        self.broken = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
        if self.kept and self is sys.stdout:
            sys.stderr.write(f"nothing reads this output any more; {self.kept}\n")


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside, stdout and stderr are `Pipe`s. At the end they are flushed, so that a reader that is
    gone is noticed here and not while Python exits; the status of a failure is kept."""
    before = sys.stdout, sys.stderr
    pipes = [stream and Pipe(stream) for stream in before]  # None: closed from the beginning
    sys.stdout, sys.stderr = pipes  # pyright: ignore[reportAttributeAccessIssue]
    pipes = [pipe for pipe in pipes if pipe]
    failed = False
    try:
        yield
    except BaseException as error:
        failed = not isinstance(error, SystemExit) or bool(error.code)
        raise
    finally:
        try:
            for pipe in pipes:
                with contextlib.suppress(SystemExit):
                    pipe.flush()
        finally:
            sys.stdout, sys.stderr = before
        if not failed and any(pipe.broken and not pipe.kept for pipe in pipes):
            raise SystemExit(UNREAD)


def keep(why: str) -> None:
    """From now on the process outlives its readers. why: said on stderr if stdout's goes away."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Pipe):
            stream.kept = why
