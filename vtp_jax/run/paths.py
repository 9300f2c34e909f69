"""Workdirs on file systems: local folders, and buckets (`gs://BUCKET/RUN`).

What holds on a bucket. A file appears as a whole when it is closed: there is no appending, and an
upload that is cut off leaves the old file. Folders do not exist by themselves, cannot be renamed as
a whole, and cannot be locked.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence

from etils import epath

from vtp_jax.types import UserError

PathLike = str | os.PathLike[str]
BUCKETS = ("gs://",)  # the ones that orbax writes arrays to


def path(given: PathLike) -> epath.Path:
    """The path of a local file or folder, of `file://`, or in a bucket. Raises UserError on another
    scheme."""
    text = os.fspath(given)
    if text.startswith("file://"):
        text = "/" + text.removeprefix("file://").lstrip("/")
    if "://" in text and not text.startswith(BUCKETS):
        scheme = text.split("://")[0]
        raise UserError(
            f"no file system for '{scheme}://' ({text}); known: a folder, file://, gs://. "
            "Another storage can be mounted as a folder"
        )
    return epath.Path(text)


def absolute(given: PathLike) -> epath.Path:
    """The same, independent of the current folder."""
    found = path(given)
    return found if in_bucket(found) else epath.Path(os.path.abspath(found))


def in_bucket(given: PathLike) -> bool:
    return os.fspath(given).startswith(BUCKETS)


def need_client(given: PathLike) -> None:
    """Raises UserError if a workdir is in a bucket, and what orbax lists buckets with is absent."""
    if not in_bucket(given):
        return
    try:
        importlib.import_module("google.cloud.storage")
    except ImportError:
        raise UserError(
            f"{os.fspath(given)} is in a bucket: install google-cloud-storage "
            "(pip install 'vtp_jax[gs]')"
        ) from None


def replace(file: epath.Path, text: str) -> None:
    """Writes a whole file: a kill leaves either the old one or the new one."""
    if in_bucket(file):
        file.write_text(text)
        return
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    new.replace(file)


class Lines:
    """A text file that grows by lines, each written at once.

    In a bucket, where nothing can be appended, the file is uploaded as a whole: by `flush`, by
    `close`, and with a line that is added `every` seconds or more after the last upload.
    """

    def __init__(
        self,
        file: epath.Path,
        lines: Sequence[str] = (),
        every: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """lines: what the file begins with, in place of what it has."""
        self._path, self._every, self._clock = file, every, clock
        self._lines = [f"{line}\n" for line in lines]
        self._uploaded = clock()
        replace(file, "".join(self._lines))
        self._file = None if in_bucket(file) else open(file, "a", encoding="utf-8")  # noqa: SIM115
        self._waiting = 0  # lines that are not yet in the bucket

    def add(self, line: str) -> None:
        if self._file is not None:
            self._file.write(f"{line}\n")
            self._file.flush()
            return
        self._lines.append(f"{line}\n")
        self._waiting += 1
        if self._clock() - self._uploaded >= self._every:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            replace(self._path, "".join(self._lines))
            self._uploaded, self._waiting = self._clock(), 0

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
