"""Frames of video files, by PyAV: frames are chosen first, and only then decoded.

A frame's number is its index in presentation order. If a file lacks the requested frames, the only
exception is `Unreadable`, with one of a few causes.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import io
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import av
import av._core
import av.error
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Int, UInt8

CAUSES = {
    "missing": "there is no such file",
    "not_a_video": "the container is damaged or of no known format",
    "no_video_stream": "the container has no video",
    "no_frames": "the video has no frame",
    "too_large": "it has too many frames, frames of too many pixels, or needs too much memory",
    "too_slow": "decoding takes longer than allowed",
    "truncated": "it ends well before the frames that its header promises",
    "damaged": "decoding fails before the last requested frame",
}
MAX_PIXELS = 8192 * 4608  # 8K; decoders keep up to seventeen such pictures
MAX_FRAMES = 2**20  # ten hours at 30 a second; each takes up to 250 bytes of a table
MAX_BYTES = 2**31  # of all frames of a clip
ALL_BYTES = 4 * MAX_BYTES  # of the frames of all clips that are read in parallel
MAX_SECONDS = 60.0  # of one core, for the frames of one clip
SCAN_SECONDS = 1800.0  # of one core, for a whole video
CLOCK = 10.0  # factor from core seconds to the limit of wall time, since reading takes time
SHORTFALL = 0.1  # share of promised frames that may be missing: edit lists and hidden frames count
# Only containers that hold their own data: a playlist could name other files and hosts.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,ivf,h264,hevc"
)
# Bytes come from a file or from memory, never from the network. No picture above the limit is
# allocated, whatever the stream contains.
OPTIONS = dict(protocol_whitelist="file,pipe", format_whitelist=FORMATS, max_pixels=str(MAX_PIXELS))
REORDERED = 32  # packets by which a frame may be out of order: codecs allow 16
# Containers with reliable time stamps, and codecs that mark frames on which no other depends, so
# that these may be skipped.
STAMPED, SKIPPABLE = {"mov", "matroska", "mpegts", "flv"}, {"h264", "hevc"}
KEY, HIDDEN = 1, 2  # flags of a packet in an index, as FFmpeg has them
SEEK_PAYS = 24  # frames: if fewer are skipped, decoding is cheaper than seeking

# A table of a few bytes can promise any number of frames, and FFmpeg allocates memory for all of
# them when it opens a file. A single allocation is limited to a plane of about four bytes a pixel.
with contextlib.suppress(AttributeError):  # where PyAV does not expose its FFmpeg
    ctypes.CDLL(av._core.__file__).av_max_alloc(ctypes.c_size_t(5 * MAX_PIXELS))

File = str | os.PathLike[str] | bytes  # a path, or the content of the file
Choose = Callable[[int], Int[np.ndarray, "t"]]  # frames in the video -> numbers of those wanted
Check = Callable[[], None]  # raises Unreadable when time is up


class Unreadable(Exception):
    """Raised for a video that cannot be read. cause: a key of `CAUSES`; detail: the decoder's
    message."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail


class Info(NamedTuple):
    """A file's first video: frames, upright width and height in pixels, frames per second (0 if
    unknown), codec, and the rotation to the left, in degrees, that makes it upright."""

    frames: int
    width: int
    height: int
    rate: float
    codec: str
    turn: int


class Table(NamedTuple):
    """The packets of a video, as far as they are known.

    keys: (number, time stamp) of its key frames, ascending; numbers: time stamp -> frame number, or
    empty if these are not known exactly: keys then have the index and decoding time of packets.
    """

    frames: int
    keys: Sequence[tuple[int, int]] = ()
    numbers: Mapping[int, int] = {}

    def key_before(self, number: int) -> tuple[int, int]:
        """The last key frame at or before a frame."""
        at = bisect.bisect_right(self.keys, number, key=lambda key: key[0])
        return self.keys[at - 1] if at else (0, min(self.numbers, default=0))


class Room:
    """A memory budget shared by threads. A clip that exceeds what is left waits, so that the number
    of parallel readers does not affect which clips can be read."""

    def __init__(self, size: int):
        self.left = size
        self.turn = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        with self.turn:
            self.turn.wait_for(lambda: size <= self.left)
            self.left -= size
        try:
            yield
        finally:
            with self.turn:
                self.left += size
                self.turn.notify_all()


ROOM = Room(ALL_BYTES)


class Short(Exception):
    """The video ended, undamaged, after fewer frames than promised."""

    def __init__(self, frames: int):
        super().__init__(frames)
        self.frames = frames


class Lost(Exception):
    """Frames cannot be found by their time stamps, or do not match them."""


def probe(path: File) -> Info:
    """The `Info` of a file; decodes one frame. Raises Unreadable."""
    check = start_clock(MAX_SECONDS)
    with open_video(path) as (container, stream):
        frames = survey(container, stream, check).frames
    with open_video(path) as (container, stream):
        frame = next(decode(container, stream, check), None)
        if frame is None:
            raise Unreadable("no_frames")
        return describe_video(frames, frame, stream)


def describe_video(frames: int, frame: av.VideoFrame, stream: Any) -> Info:
    """The `Info` of a video, from its number of frames and one of them."""
    sides = (stream.width, stream.height)
    width, height = sides[::-1] if frame.rotation % 180 else sides
    rate = float(stream.average_rate or 0)
    return Info(frames, width, height, rate, stream.codec_context.name, frame.rotation)


def read_frames(path: File, choose: Choose) -> UInt8[np.ndarray, "t h w c"]:
    """The frames with the numbers `choose(frames in the video)`, upright, uint8 RGB "t h w c".

    Numbers may be in any order and repeat. Other frames are not converted to RGB, nor decoded if a
    later key frame makes that unnecessary. A damaged file is readable as long as every chosen frame
    is intact. If a file ends undamaged a little before the length that its header promises,
    `choose` is called again, with the true length. Raises Unreadable.
    """
    check = start_clock(MAX_SECONDS)
    with open_video(path) as (container, stream):
        table = survey(container, stream, check)
        numbers = choose(table.frames)
        size = check_room(stream, np.unique(numbers))
        with ROOM.hold(size), contextlib.suppress(Lost):
            return take(numbers, lambda wanted: find(container, stream, wanted, table, check))
    counted = functools.partial(count, path, check=check)
    with ROOM.hold(size):
        try:
            return take(numbers, counted)
        except Short as short:
            check_length(short.frames, table.frames)
            frames = short.frames
        try:
            return take(choose(frames), counted)
        except Short as short:
            raise Unreadable("truncated", f"{short.frames} frames of {frames}") from None


def check_length(frames: int, promised: int) -> None:
    if not frames:
        raise Unreadable("no_frames")
    if frames < (1 - SHORTFALL) * promised:
        raise Unreadable("truncated", f"{frames} frames of {promised}")


def scan(
    path: File,
    every: int = 1,
    use: Callable[[UInt8[np.ndarray, "h w c"]], object] | None = None,
    seconds: float = SCAN_SECONDS,
) -> Info:
    """Decodes a whole video without keeping frames, and returns its `Info`. Raises Unreadable.

    use: called with frames 0, every, 2 every, ..., upright RGB, in order
    seconds: limit, of one core
    """
    frames, reformatter, check = 0, VideoReformatter(), start_clock(seconds)
    with open_video(path) as (container, stream):
        promised = survey(container, stream, check).frames
    with open_video(path) as (container, stream):
        for frame in decode(container, stream, check):
            if frame.is_corrupt:
                raise Unreadable("damaged", f"frame {frames} is marked as corrupt")
            if use is not None and frames % every == 0:
                use(convert(frame, stream, reformatter))
            frames += 1
        check_length(frames, promised)
        return describe_video(frames, frame, stream)


def survey(container: Any, stream: Any, check: Check) -> Table:
    """The packets of a video, from its header or, if that has none, by reading them."""
    index = stream.index_entries
    check_count(max(stream.frames, len(index)))
    if not stream.frames:
        table = tabulate(demux(container, stream, check))
    else:
        flags = np.fromiter((entry.flags for entry in index), np.int8, len(index))
        hidden = int(np.count_nonzero(flags & HIDDEN))
        # Edit lists leave frames out, or show them twice; the index of an mp4 reflects that.
        edited = len(index) > 0 and "mov" in container.format.name.split(",")
        frames = (len(index) if edited else stream.frames) - hidden
        # If packets are hidden or unknown, their indices are not frame numbers.
        whole = frames == len(index)
        keys = np.flatnonzero(flags & KEY).tolist() if whole else []
        table = Table(frames, [(n, index[n].timestamp) for n in keys])
    if table.frames <= 0:
        raise Unreadable("no_frames")
    return table


def tabulate(packets: Iterator[Any], first: int = 0, last: int | None = None) -> Table:
    """Reads packets without decoding; the first has index `first`. Reads all, or enough to know the
    frames up to number `last` with certainty. Frames less than REORDERED after `first` are not
    certain."""
    stop = MAX_FRAMES + 1 if last is None else last - first + 1 + REORDERED
    shown = (p for p in packets if p.size and not p.is_discard)
    found = [(p.pts, p.is_keyframe) for p in itertools.islice(shown, stop)]
    check_count(len(found))
    times = sorted(pts for pts, _ in found if pts is not None)
    if len(set(times)) < len(found):
        return Table(first + len(found))
    if last is not None and stop == len(found):
        times = times[: last - first + 1]
    numbers = {pts: n for n, pts in enumerate(times, first)}
    keys = sorted((numbers[pts], pts) for pts, key in found if key and pts in numbers)
    return Table(first + len(found), keys, numbers)


def look_around(
    container: Any, stream: Any, wanted: Sequence[int], table: Table, check: Check
) -> Table:
    """The packets around frames of ascending numbers: from a key frame before them if the header
    has the positions of packets; from the start if it has not, or is wrong."""
    if table.key_before(wanted[0] - REORDERED)[0] > 0:
        try:
            seek(container, stream, table, wanted[0] - REORDERED)
            packets = demux(container, stream, check)
            start = next(packets)
            first = {at: place for place, at in table.keys}[start.dts]
            if first <= wanted[0] - REORDERED:
                packets = follow(stream.index_entries, first, itertools.chain([start], packets))
                return tabulate(packets, first, wanted[-1])
        except (Lost, KeyError, StopIteration):
            pass
        seek(container, stream, table, 0)
    return tabulate(demux(container, stream, check), 0, wanted[-1])


def follow(index: Any, first: int, packets: Iterator[Any]) -> Iterator[Any]:
    """The same packets, checked against an index from position `first` on. Raises Lost."""
    before = index[first - 1].timestamp if first else None
    for place, packet in zip(range(first, len(index)), packets, strict=False):
        at = index[place].timestamp
        if packet.dts != at or (before is not None and at <= before):
            raise Lost
        before = at
        yield packet


def take(
    numbers: Int[np.ndarray, "t"],
    decode: Callable[[Sequence[int]], Sequence[UInt8[np.ndarray, "h w c"]]],
) -> UInt8[np.ndarray, "t h w c"]:
    """The frames with these numbers. decode: ascending numbers -> frames."""
    unique, places = np.unique(numbers, return_inverse=True)
    frames = decode(unique.tolist())
    return np.stack([frames[place] for place in places.tolist()])


def can_skip(table: Table, at: int, number: int) -> bool:
    """Whether seeking is cheaper than decoding on from frame `at`: a key frame is far after it."""
    return table.key_before(number)[0] - at >= SEEK_PAYS


def find(
    container: Any, stream: Any, wanted: Sequence[int], table: Table, check: Check
) -> list[UInt8[np.ndarray, "h w c"]]:
    """Frames of ascending numbers, by their time stamps. Other frames are decoded only if these
    depend on them. Raises Lost."""
    try:
        if not table.numbers:
            table = look_around(container, stream, wanted, table, check)
        first = seek(container, stream, table, wanted[0])
    except av.error.FFmpegError as error:
        raise Lost from error
    numbers = set(wanted)
    asked = {stamp for stamp, number in table.numbers.items() if number in numbers}
    if len(asked) < len(wanted):
        raise Lost
    got: dict[int, UInt8[np.ndarray, "h w c"]] = {}
    reformatter = VideoReformatter()
    packets, at = demux(container, stream, check), -1
    skips = can_leave_out(container, stream)
    for number in wanted:
        if can_skip(table, max(at, first), number):
            first, at = seek(container, stream, table, number), -1
            packets = demux(container, stream, check)
        while number not in got:
            packet = next(packets, None)
            if packet is None:
                raise Lost
            # The last packet is empty and flushes the decoder.
            needed = not skips or packet.pts in asked or not packet.size
            stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
            for frame in map(check_size, packet.decode()):
                new = -1 if frame.pts is None else table.numbers.get(frame.pts, -1)
                late = new > first if at < 0 else new > at + 1 and not skips
                if new <= at or late:
                    raise Lost
                at = new
                if frame.pts in asked:
                    if frame.is_corrupt:
                        raise Lost
                    got[at] = convert(frame, stream, reformatter)
                if len(got) == len(wanted):
                    return list(got.values())
            if at > number and number not in got:
                raise Lost
    return list(got.values())


def can_leave_out(container: Any, stream: Any) -> bool:
    """Whether frames on which no other depends can be recognised, and skipped, with certainty."""
    formats = set(container.format.name.split(","))
    return bool(formats & STAMPED) and stream.codec_context.name in SKIPPABLE


def seek(container: Any, stream: Any, table: Table, number: int) -> int:
    """Seeks to the last key frame at or before a frame, and returns its number."""
    key, at = table.key_before(number)
    container.seek(at, stream=stream)
    return key


def count(path: File, wanted: Sequence[int], check: Check) -> list[UInt8[np.ndarray, "h w c"]]:
    """Frames of ascending numbers, by decoding all frames before them. Raises Short if the video
    ends earlier, undamaged."""
    reformatter, numbers = VideoReformatter(), set(wanted)
    got: list[UInt8[np.ndarray, "h w c"]] = []
    at = -1
    with open_video(path) as (container, stream):
        check_room(stream, wanted)
        for at, frame in enumerate(decode(container, stream, check)):
            if at in numbers:
                if frame.is_corrupt:
                    raise Unreadable("damaged", f"frame {at} is marked as corrupt")
                got.append(convert(frame, stream, reformatter))
            if at == wanted[-1]:
                return got
    raise Short(at + 1)


def check_room(stream: Any, wanted: Sequence[int] | Int[np.ndarray, "t"]) -> int:
    """The bytes of the frames `wanted`. Raises Unreadable above MAX_BYTES."""
    size = 3 * stream.width * stream.height * len(wanted)
    if size > MAX_BYTES:
        raise Unreadable("too_large", f"{len(wanted)} of {stream.width}x{stream.height}")
    return size


def check_count(frames: int) -> None:
    if frames > MAX_FRAMES:
        raise Unreadable("too_large", f"more than {MAX_FRAMES} frames")


def demux(container: Any, stream: Any, check: Check) -> Iterator[Any]:
    """The packets of a stream; `check` is called for each."""
    for packet in container.demux(stream):
        check()
        yield packet


def decode(container: Any, stream: Any, check: Check) -> Iterator[av.VideoFrame]:
    """The frames of a stream. Raises Unreadable if one is too large, or if they take too long."""
    for packet in demux(container, stream, check):
        yield from map(check_size, packet.decode())


def check_size(frame: av.VideoFrame) -> av.VideoFrame:
    if frame.width * frame.height > MAX_PIXELS:
        raise Unreadable("too_large", f"{frame.width}x{frame.height}")
    return frame


def start_clock(seconds: float) -> Check:
    """A check that time is left: of one core, for this thread, and of wall time."""
    core, clock = time.thread_time() + seconds, time.monotonic() + CLOCK * seconds
    return functools.partial(check_clock, core, clock, seconds)


def check_clock(core: float, clock: float, seconds: float) -> None:
    if time.thread_time() > core or time.monotonic() > clock:
        raise Unreadable("too_slow", f"more than {seconds:.0f} s")


def convert(
    frame: av.VideoFrame, stream: Any, reformatter: VideoReformatter
) -> UInt8[np.ndarray, "h w c"]:
    """RGB of the stream's size, rotated upright by the display matrix, in quarter turns."""
    rgb = reformatter.reformat(frame, stream.width, stream.height, format="rgb24", threads=1)
    return np.rot90(rgb.to_ndarray(), round(frame.rotation / 90) % 4)


@contextlib.contextmanager
def open_video(path: File) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream); every failure within becomes Unreadable."""
    if isinstance(path, bytes):
        file: Any = io.BytesIO(path)
    elif os.path.isfile(path):
        file = f"file:{os.fspath(path)}"
    else:
        raise Unreadable("missing", str(path))
    try:
        patience = CLOCK * MAX_SECONDS
        container = av.open(file, options=OPTIONS, metadata_errors="ignore", timeout=patience)
    except MemoryError as error:
        raise Unreadable("too_large", describe(error)) from None
    except av.error.ExitError:
        raise Unreadable("too_slow", f"a read of more than {patience:.0f} s") from None
    except (av.error.FFmpegError, ValueError) as error:
        raise Unreadable("not_a_video", describe(error)) from None
    with container:
        if not container.streams.video:
            raise Unreadable("no_video_stream")
        stream = container.streams.video[0]
        if stream.width * stream.height > MAX_PIXELS:
            raise Unreadable("too_large", f"{stream.width}x{stream.height}")
        # Videos are decoded in parallel; threads within a video would only compete.
        stream.codec_context.thread_count = 1
        stream.codec_context.options = dict(max_pixels=str(MAX_PIXELS))
        try:
            yield container, stream
        except MemoryError as error:
            raise Unreadable("too_large", describe(error)) from None
        except av.error.ExitError:
            raise Unreadable("too_slow", f"a read of more than {patience:.0f} s") from None
        except av.error.FFmpegError as error:
            raise Unreadable("damaged", describe(error)) from None


def describe(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
