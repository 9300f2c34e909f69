"""Samples out of WebDataset tars, as video2dataset writes them: 00012.mp4, 00012.json, 00012.txt.

Members are read into memory, one sample at a time. Nothing is extracted, no name in a tar is used
as a path, no link is followed, nothing is unpickled, and compressed tars are not opened.
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from vtp_jax.data.sources import VIDEOS

MAX_VIDEO = 2**31  # bytes
MAX_TEXT = 2**24


class Sample(NamedTuple):
    """What stands under one name. members: suffix -> content."""

    key: str
    members: Mapping[str, bytes]


class Refused(NamedTuple):
    """A member or sample that is not used, and why."""

    key: str
    cause: str
    detail: str = ""


CAUSES = {
    "unsafe_name": "its name is absolute or leads out of the folder",
    "not_a_file": "a link, a device, or a file with holes",
    "member_too_large": "more than 2 GiB of video or 16 MiB of text",
    "duplicate": "a sample of this name came before",
    "damaged_tar": "the tar ends here, or cannot be read any further",
}


def read(path: str) -> Iterator[Sample | Refused]:
    """The samples of a tar, in its order; of what is not one, a line each."""
    seen: set[str] = set()
    key = ""
    try:
        with tarfile.open(path, "r:") as tar:
            for key, members in itertools.groupby(tar, lambda member: split_name(member.name)[0]):
                found: dict[str, bytes] = {}
                for member in members:
                    if member.isdir():
                        continue
                    if refused := judge(member):
                        yield refused
                    else:
                        found[split_name(member.name)[1]] = read_member(tar, member)
                if found and key in seen:
                    yield Refused(key, "duplicate")
                elif found:
                    seen.add(key)
                    yield Sample(key, found)
    except (tarfile.TarError, OSError, EOFError) as error:
        yield Refused(key or path, "damaged_tar", str(error))


def count(path: str) -> int:
    """How many samples a tar may have; reads headers alone."""
    found = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for _ in itertools.groupby(tar, lambda member: split_name(member.name)[0]):
                found += 1
    except (tarfile.TarError, OSError, EOFError):
        pass  # `read` will say so
    return found


def split_name(name: str) -> tuple[str, str]:
    """Of a/b.x.mp4: a/b and .x.mp4, as WebDataset does."""
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
    """Why a member must not be read, if so."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        return Refused(member.name, "unsafe_name")
    if not member.isreg() or member.issparse():
        return Refused(member.name, "not_a_file")
    most = MAX_VIDEO if name.suffix.lower() in VIDEOS else MAX_TEXT
    if member.size > most:
        return Refused(member.name, "member_too_large", f"{member.size} bytes")
    return None
