"""Shards: clips as JPEG frames in a few large files, of which only the frames in use are read.

A shard is one file: records one after the other, then a table of their offsets. A record is a
header in JSON (the clip's data, and the size and CRC-32 of each of its parts) and its parts: the
head and the frames of each roll (rolls.py). A record with the same parts as the previous one, such
as another question on one video, refers to them instead of repeating them. A training clip thus
costs two short reads and the decoding of what it shows, and flipped bits on a disk are detected. A
folder of shards has a `manifest.json`, which `vtp prepare shards` writes.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import os
import struct
import uuid
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from vtp_jax.data import ops, rolls, video
from vtp_jax.data.sources import Clip, Facts, Source
from vtp_jax.types import UserError

MANIFEST = "manifest.json"
FORMAT = 2  # of shards and manifest
MAGIC = b"vtpjax02"
HEAD = struct.Struct("<II")  # of a record: bytes of its header, their CRC
TAIL = struct.Struct("<QQI8s")  # of a shard: records, offset of the table, its CRC, MAGIC
AT_ONCE = 4096  # bytes read for a header; enough for most
OPEN = 256  # shards kept open


class Record(NamedTuple):
    """A stored clip.

    id, source, licence, sha256 (of the original file): text; label: its class, or None
    captions; spans: the time span of each caption, in seconds, if known
    frames, rate: of the original video; every: its frames 0, every, 2 every, ... are stored
    height, width: of the stored frames, in pixels; capacity: frames of a roll; film: the rolls
    """

    id: str
    captions: Sequence[str]
    spans: Sequence[Sequence[float]]
    label: int | None
    source: str
    licence: str
    sha256: str
    frames: int
    rate: float
    every: int
    height: int
    width: int
    capacity: int
    film: Sequence[rolls.Roll]

    def parts(self) -> list[bytes]:
        """The heads and frames of the rolls, in stored order."""
        return [part for roll in self.film for part in (roll.head, *roll.frames)]


class Header(NamedTuple):
    """A record without its rolls. at: offset of its parts in the shard; sizes: their lengths."""

    record: Record
    at: int
    sizes: Sequence[int]
    crcs: Sequence[int]

    @property
    def frames(self) -> int:
        """The number of stored frames."""
        each = self.record.capacity + 1
        return len(self.sizes) - -(-len(self.sizes) // each)


def write_shard(path: str | os.PathLike[str], records: Iterable[Record]) -> int:
    """Writes a shard atomically; returns the number of its records."""
    path, starts = Path(path), []
    new, before, at = temporary(path), None, 0
    with new.open("wb") as file:
        for record in records:
            starts.append(file.tell())
            parts = record.parts()
            known = {k: v for k, v in record._asdict().items() if k != "film"}
            known |= dict(sizes=[len(p) for p in parts], crcs=[zlib.crc32(p) for p in parts])
            if parts == before:
                known["at"] = at
            header = json.dumps(known, ensure_ascii=False, separators=(",", ":")).encode()
            file.write(HEAD.pack(len(header), zlib.crc32(header)))
            file.write(header)
            if parts != before:
                before, at = parts, file.tell()
                file.writelines(parts)
        table = np.asarray([*starts, file.tell()], "<u8").tobytes()
        file.write(table)
        file.write(TAIL.pack(len(starts), file.tell() - len(table), zlib.crc32(table), MAGIC))
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    return len(starts)


def temporary(path: Path) -> Path:
    """A unique temporary name for a file until it is complete."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")


class Shard:
    """A shard, open for reading from any thread. Errors are raised as Unreadable."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        try:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise video.Unreadable("missing", str(error)) from None
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        tail = self._read(max(size - TAIL.size, 0), TAIL.size)
        self._count, self._table, crc, magic = TAIL.unpack(tail)
        length = 8 * (self._count + 1)
        if magic != MAGIC or self._table + length + TAIL.size != size:
            raise video.Unreadable("damaged", f"{self.path} is not a shard, or is truncated")
        if zlib.crc32(self._read(self._table, length)) != crc:
            raise video.Unreadable("damaged", f"the table of {self.path}")

    def __len__(self) -> int:
        return self._count

    def header(self, index: int) -> Header:
        start, end = struct.unpack("<QQ", self._read(self._table + 8 * index, 16))
        found = self._read(start, min(AT_ONCE, end - start))
        size, crc = HEAD.unpack_from(found)
        if HEAD.size + size > end - start:
            raise video.Unreadable("damaged", f"a header in {self.path}")
        if HEAD.size + size > len(found):
            found += self._read(start + len(found), HEAD.size + size - len(found))
        text = found[HEAD.size : HEAD.size + size]
        if zlib.crc32(text) != crc:
            raise video.Unreadable("damaged", f"a header in {self.path}")
        known = json.loads(text)
        sizes, crcs = known.pop("sizes"), known.pop("crcs")
        at = known.pop("at", start + HEAD.size + size)
        return Header(Record(**known, film=()), at, sizes, crcs)

    def film(self, header: Header, numbers: Sequence[int]) -> list[rolls.Roll]:
        """Stored frames by ascending numbers, in their rolls."""
        each = header.record.capacity
        of_roll = itertools.groupby(numbers, lambda number: number // each)
        wanted = [[k * (each + 1), *(n + k + 1 for n in some)] for k, some in of_roll]
        parts = dict(self._parts(header, list(itertools.chain(*wanted))))
        return [rolls.Roll(parts[head], [parts[n] for n in some]) for head, *some in wanted]

    def _parts(self, header: Header, numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Parts by ascending numbers; adjacent ones are read together."""
        starts = np.cumsum([header.at, *header.sizes]).tolist()
        for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
            run = [number for _, number in run]
            first, end = starts[run[0]], starts[run[-1] + 1]
            data = self._read(first, end - first)
            for number in run:
                part = data[starts[number] - first : starts[number + 1] - first]
                if zlib.crc32(part) != header.crcs[number]:
                    raise video.Unreadable("damaged", f"part {number} of {header.record.id}")
                yield number, part

    def records(self) -> Iterator[Record]:
        """All records, complete."""
        for index in range(len(self)):
            header = self.header(index)
            yield header.record._replace(film=self.film(header, range(header.frames)))

    def _read(self, at: int, size: int) -> bytes:
        try:
            data = os.pread(self._file, size, at)
        except OSError as error:
            raise video.Unreadable("damaged", str(error)) from None
        if len(data) < size:
            raise video.Unreadable("damaged", f"{self.path} ends too early")
        return data


class Kept(NamedTuple):
    """A clip of a shard whose header has been read. `pick`, `read` and `show` raise Unreadable."""

    shard: Shard
    header: Header

    @property
    def clip(self) -> Clip:
        record = self.header.record
        spans = tuple((start, end) for start, end in record.spans)
        return Clip(record.id, tuple(record.captions), record.label, spans)

    def pick(self, choose: video.Choose) -> tuple[list[rolls.Roll], Int[np.ndarray, "t"]]:
        """The stored frames for the chosen ones, each once, and for each chosen frame the index of
        its stored one."""
        record = self.header.record
        unique, places = np.unique(choose(record.frames) // record.every, return_inverse=True)
        return self.shard.film(self.header, unique.tolist()), places

    def read(self, choose: video.Choose) -> UInt8[np.ndarray, "t h w c"]:
        """The chosen frames, as `video.read_frames`."""
        record, (found, places) = self.header.record, self.pick(choose)
        return np.concatenate([rolls.read(r, record.height, record.width) for r in found])[places]

    def show(
        self,
        choose: video.Choose,
        boxes: Callable[[int, int], Sequence[ops.Box]],
        out: UInt8[np.ndarray, "v t s s c"],
    ) -> None:
        """Writes parts of the chosen frames to `out`. They are resized before conversion to RGB,
        which halves the number of values, and only the parts shown are decoded."""
        record, (found, places) = self.header.record, self.pick(choose)
        chosen = boxes(record.height, record.width)
        strips = [rolls.decode(roll, record.height, record.width, chosen) for roll in found]
        for box, clip in zip(chosen, out, strict=True):
            size = clip.shape[1]
            pictures = itertools.chain.from_iterable(rolls.cut(s, box, size) for s in strips)
            for number, picture in enumerate(pictures):
                for place in np.flatnonzero(places == number).tolist():
                    clip[place] = picture


class Shards(Sequence[Clip]):
    """The clips of a folder of shards, in the order of its manifest. Memory grows with the number
    of shards, not of clips."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self.every = int(manifest["every"])
        self.facts = Facts(manifest["captions"], manifest["classes"])
        self.names = [shard["name"] for shard in manifest["shards"]]
        counts = (shard["records"] for shard in manifest["shards"])
        self.starts = list(itertools.accumulate(counts, initial=0))
        self._open = functools.lru_cache(maxsize=OPEN)(lambda name: Shard(self.folder / name))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: Any) -> Any:
        return self.open(range(len(self))[index]).clip

    @property
    def source(self) -> Source:
        return Source("", self, self.facts)

    def open(self, index: int) -> Kept:
        """Reads the header of a clip. Raises Unreadable."""
        part = bisect.bisect_right(self.starts, index) - 1
        shard = self._open(self.names[part])
        if len(shard) != self.starts[part + 1] - self.starts[part]:
            raise video.Unreadable("damaged", f"{shard.path} is not the shard of the manifest")
        return Kept(shard, shard.header(index - self.starts[part]))


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"no shards in '{folder}': it has no complete {MANIFEST}") from None
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST} is damaged: {error}") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder}: shards of format {manifest.get('format')}, not {FORMAT}")
    if not sum(shard["records"] for shard in manifest["shards"]):
        raise UserError(f"{folder} contains no records; {MANIFEST} has the cause for each clip")
    return manifest
