"""Samples of WebDataset tars, as video2dataset writes them: 00012.mp4, 00012.json, 00012.txt.

Members are read into memory, one sample at a time. Nothing is extracted, no name in a tar is used
as a path, no link is followed, nothing is unpickled, and compressed tars are not opened. Python's
tarfile trusts headers, so what it may read for one is limited (`Guarded`).
"""

from __future__ import annotations

import contextlib
import itertools
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from vtp_jax.data import sources

MAX_VIDEO = 2**31  # bytes
MAX_TEXT = 2**24
MAX_HEADER = 2**18  # with all extended headers of a member, for long names and the like
DIGITS = re.compile(rb"[0-9]{256}")  # tarfile takes time quadratic in their number


class Sample(NamedTuple):
    """The members with one name. members: suffix -> content."""

    key: str
    members: Mapping[str, bytes]


class Refused(NamedTuple):
    """A member or sample that is not used, and the cause."""

    key: str
    cause: str
    detail: str = ""


CAUSES = {
    "unsafe_name": "its name is absolute, leads out of the folder, or is not UTF-8",
    "not_a_file": "a link, a device, or a sparse file",
    "member_too_large": "more than 2 GiB of video or 16 MiB of text",
    "duplicate": "an earlier sample has the same name",
    "damaged_tar": "the tar cannot be read any further; its later content is unknown",
}


def read(path: str) -> Iterator[Sample | Refused]:
    """The samples of a tar, in its order, and a `Refused` for each rejected member. The sample at
    which a damaged tar ends is rejected, since some of its members may be lost."""
    seen: set[str] = set()
    key = ""
    try:
        with open_tar(path) as tar:
            for key, members in group(tar):
                found: dict[str, bytes] = {}
                for member in members:
                    if member.isdir():
                        continue
                    if refused := judge(member):
                        yield refused
                        continue
                    try:
                        found[split_name(member.name)[1]] = read_member(tar, member)
                    except MemoryError:
                        yield Refused(member.name, "member_too_large", "out of memory")
                if found and key in seen:
                    yield Refused(key, "duplicate")
                elif found:
                    seen.add(key)
                    yield Sample(key, found)
    except Exception as error:  # a header may contain anything, and tarfile checks little of it
        told = str(error) if isinstance(error, KNOWN) else f"{type(error).__name__}: {error}"
        yield Refused(sources.clean(key or path), "damaged_tar", told)


def keys(path: str) -> list[str]:
    """The names of all samples that `read` may yield, in its order; only headers are read."""
    found: list[str] = []
    try:
        with open_tar(path) as tar:
            found += (key for key, _ in group(tar))
    except Exception:
        pass  # `read` reports it
    return found


KNOWN = (tarfile.TarError, OSError)  # errors that say what is wrong


class Guarded:
    """The file of a tar. As long as `left` is a number, headers are read: that many more bytes."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.left: int | None = MAX_HEADER

    def read(self, size: int = -1) -> bytes:
        if self.left is None:
            return self.file.read(size)
        # Reads at the end of the file count too, since tarfile repeats some of them for ever.
        self.left -= max(size, tarfile.BLOCKSIZE)
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"a header claims to have more than {MAX_HEADER} bytes")
        data = self.file.read(size)
        if len(data) > tarfile.BLOCKSIZE and DIGITS.search(data):
            raise tarfile.ReadError("a header has a number of more than 255 digits")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@contextlib.contextmanager
def open_tar(path: str) -> Iterator[tarfile.TarFile]:
    with open(path, "rb") as raw:
        file: Any = Guarded(raw)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            file.left = None
            yield tar


def group(tar: tarfile.TarFile) -> Iterator[tuple[str, Iterator[tarfile.TarInfo]]]:
    """The members of each sample. Raises an error of any kind where a tar is damaged."""
    return itertools.groupby(whole(tar), lambda member: split_name(member.name)[0])


def whole(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All members. Python treats a damaged header as the end, so the end is verified."""
    file: Any = tar.fileobj
    while True:
        file.left = MAX_HEADER
        member = tar.next()
        file.left = None
        if member is None:
            break
        yield member
    at = tar.offset
    file.seek(at)
    rest = size = 0
    while block := file.read(2**20):
        size += len(block)
        rest += len(block) - block.count(0)
        if rest:
            break
    if rest or size < 2 * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"at byte {at} there is neither a header nor the end")


def split_name(name: str) -> tuple[str, str]:
    """a/b.x.mp4 -> (a/b, .x.mp4), as WebDataset does."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return folder + slash + stem, dot + suffix.lower()


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    content = file.read(member.size) if file else b""
    if len(content) < member.size:
        raise tarfile.ReadError(f"{member.name} ends too early")
    return content


def judge(member: tarfile.TarInfo) -> Refused | None:
    """The reason why a member must not be read, if there is one."""
    name = PurePosixPath(member.name)
    if sources.clean(member.name) != member.name:
        return Refused(sources.clean(member.name), "unsafe_name", "not UTF-8")
    if name.is_absolute() or ".." in name.parts:
        return Refused(member.name, "unsafe_name")
    if not member.isreg() or member.issparse():
        return Refused(member.name, "not_a_file")
    most = MAX_VIDEO if name.suffix.lower() in sources.VIDEOS else MAX_TEXT
    if member.size > most:
        return Refused(member.name, "member_too_large", f"{member.size} bytes")
    return None
