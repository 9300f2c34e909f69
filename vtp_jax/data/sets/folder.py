"""The files of a set: anywhere below its folder.

The same archives get unpacked in many ways, so files are found by name, in any subfolder and, for
videos, with any suffix; nothing outside the folder is ever read.
"""

from __future__ import annotations

import collections
import fnmatch
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from vtp_jax.data.sources import VIDEOS
from vtp_jax.types import UserError

MEDIA = VIDEOS | {".gif"}


class Folder:
    """An index of the files below `root`, including linked folders."""

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"no folder '{root}'; root must be the folder of the set's files")
        self.media: dict[str, list[str]] = collections.defaultdict(list)
        self.others: list[str] = []
        seen: set[str] = set()
        for parent, folders, names in os.walk(self.root, followlinks=True):
            folders.sort()
            if (real := os.path.realpath(parent)) in seen:  # a cyclic link
                folders.clear()
                continue
            seen.add(real)
            below = PurePosixPath(Path(parent).relative_to(self.root).as_posix())
            for name in sorted(names):
                path = str(below / name)
                if (key := strip(name)) != name:
                    self.media[key].append(path)
                else:
                    self.others.append(path)
        self.others.sort(key=lambda path: (path.count("/"), path))

    def find(self, names: Iterable[str]) -> str | None:
        """The path, below the folder, of the video that has one of the names, tried in order.

        A name may contain folders, "class/video". Among several files of the same name, one in the
        named folders is preferred, then the least deep, then the first by path.
        """
        for name in names:
            wanted = PurePosixPath(strip(name)).parts
            if not wanted:
                continue
            if found := self.media.get(wanted[-1]):
                return min(found, key=lambda path: (-match(path, wanted), path.count("/"), path))
        return None

    def annotations(self, file: str) -> list[Path]:
        """The files that match a name of `Split.files`."""
        for name in file.removeprefix("?").split(" | "):
            if "*" in name:
                pattern = f"*/{name}"
                found = [p for p in self.others if fnmatch.fnmatchcase(f"/{p}", pattern)]
            else:
                found = [p for p in self.others if f"/{p}".endswith(f"/{name}")][:1]
            if found:
                return [self.root / path for path in found]
        return []


def strip(name: str) -> str:
    """A name without the suffix of a video, if it has one; ids may contain dots."""
    head, suffix = os.path.splitext(name)
    return head if suffix.lower() in MEDIA else name


def match(path: str, wanted: Sequence[str]) -> int:
    """The number of folders directly above a file that match those wanted."""
    have = PurePosixPath(path).parent.parts
    pairs = zip(reversed(have), reversed(wanted[:-1]), strict=False)
    count = 0
    for one, other in pairs:
        if one != other:
            break
        count += 1
    return count
