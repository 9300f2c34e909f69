"""Frames of video files, by PyAV: frames are chosen first, and only then decoded.

A frame's number is its index in presentation order. Frames look as the ffmpeg program shows them:
of its choice among several streams, upright, and all of the size of the first frame. Whatever is
wrong with a file, the only exception is `Unreadable`, with one of a few causes.
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
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import av
import av._core
import av.error
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition
from jaxtyping import Int, UInt8

from vtp_jax.data import upright

CAUSES = {
    "missing": "there is no such file",
    "not_a_video": "the container is damaged or of no known format",
    "no_video_stream": "the container has no video; the cover of a song is none",
    "no_decoder": "its codec is unknown, or FFmpeg was built without a decoder for it",
    "no_frames": "the video has no frame",
    "too_large": "it has too many frames, frames of too many pixels, or needs too much memory",
    "too_slow": "decoding takes longer than allowed",
    "truncated": "it ends well before the frames that its header promises",
    "damaged": "decoding fails before the last requested frame",
    "failed": "an unexpected error, which the log names",
}


class Limits(NamedTuple):
    """What reading may cost; beyond it a video is Unreadable, as `too_large` or `too_slow`.

    pixels: of a picture, by default 8K; decoders keep up to seventeen
    frames: of a video, by default ten hours at 30 a second; each takes up to 250 bytes of a table
    bytes: of the frames of a clip, as RGB
    seconds: of one core, for the frames of a clip; ten times as much by the clock
    """

    pixels: int = 8192 * 4608
    frames: int = 2**20
    bytes: int = 2**31
    seconds: float = 60.0


LIMITS = Limits()
WHOLE = Limits(seconds=1800.0)  # for a whole video, frame by frame
ALL_BYTES = 4 * LIMITS.bytes  # of the frames of all clips that are read in parallel
CLOCK = 10.0  # factor from core seconds to the limit of wall time, since reading takes time
PATIENCE = CLOCK * LIMITS.seconds  # for a single read, by the clock
SHORTFALL = 0.1  # share of promised frames that may be missing: edit lists and hidden frames count
# Only containers that hold their own data: a playlist could name other files and hosts.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,ivf,h264,hevc"
)
# Bytes come from a file or from memory, never from the network.
OPTIONS = dict(protocol_whitelist="file,pipe", format_whitelist=FORMATS)
REORDERED = 32  # packets by which a frame may be out of order: codecs allow 16
# Containers with reliable time stamps, and codecs that mark frames on which no other depends, so
# that these may be skipped.
STAMPED, SKIPPABLE = {"mov", "matroska", "mpegts", "flv"}, {"h264", "hevc"}
KEY, HIDDEN = 1, 2  # flags of a packet in an index, as FFmpeg has them
SEEK_PAYS = 24  # frames: if fewer are skipped, decoding is cheaper than seeking
# Codecs of which a packet may hold any number of frames, and the filter that separates them: PyAV
# decodes all frames of a packet before it returns the first.
SPLIT = {"av1": "av1_frame_split", "vp9": "vp9_superframe_split"}
# How the ffmpeg program chooses among video streams: by pixels, and these for a default stream and
# for one that has packets.
DEFAULT, FILLED = 5_000_000, 100_000_000


def allow(pixels: int) -> int:
    """Limits every single allocation of FFmpeg to a plane of about four bytes a pixel. A table of a
    few bytes can promise any number of frames, and FFmpeg allocates memory for all of them when it
    opens a file."""
    with contextlib.suppress(AttributeError):  # where PyAV does not expose its FFmpeg
        ctypes.CDLL(av._core.__file__).av_max_alloc(ctypes.c_size_t(5 * pixels))
    return pixels


allowed = allow(LIMITS.pixels)

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
    """A file's video: frames, upright width and height in pixels, frames per second (0 if unknown),
    codec, and what makes it upright: left and right are exchanged if `mirrored`, and then it is
    turned to the left, by degrees."""

    frames: int
    width: int
    height: int
    rate: float
    codec: str
    turn: int
    mirrored: bool = False


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
        self.size = self.left = size
        self.turn = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        size = min(size, self.size)
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


class Sheet:
    """The frames of a clip. Each is written as soon as it is decoded, at all its places in one
    array, so that memory has the clip once. A context: within it, the array's room is held."""

    def __init__(self, numbers: Int[np.ndarray, "t"], limits: Limits):
        self.count, self.limits = len(numbers), limits
        self.places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers.tolist()):
            self.places.setdefault(number, []).append(place)
        self.wanted = sorted(self.places)
        self.done: set[int] = set()
        self.shown, self.shape, self.pixels = upright.Shown(), (0, 0), None
        self.held = contextlib.ExitStack()

    def __enter__(self) -> Sheet:
        return self

    def __exit__(self, *_: object) -> None:
        self.pixels = None
        self.held.close()

    def lay(self, shape: tuple[int, int]) -> None:
        """Makes the array, for frames of an upright shape (h, w). Raises Unreadable."""
        h, w = self.shape = self.shown.shape = shape
        size = 3 * h * w * self.count
        if size > self.limits.bytes:
            raise Unreadable("too_large", f"{self.count} frames of {w}x{h}")
        self.held.enter_context(ROOM.hold(size))
        self.pixels = np.empty((self.count, h, w, 3), np.uint8)

    def put(self, number: int, frame: av.VideoFrame, way: upright.Upright | None = None) -> None:
        pixels = self.frames()
        first, *others = self.places[number]
        pixels[first] = self.shown(frame, way)
        for place in others:
            pixels[place] = pixels[first]
        self.done.add(number)

    def frames(self) -> UInt8[np.ndarray, "t h w c"]:
        assert self.pixels is not None
        return self.pixels


def probe(path: File, limits: Limits = LIMITS) -> Info:
    """The `Info` of a file; decodes one frame. Raises Unreadable."""
    check = start_clock(limits.seconds)
    with open_video(path, limits) as (container, stream), reading():
        frames = survey(container, stream, limits, check).frames
    with open_first(path, limits, check) as (stream, frame), reading():
        return describe_video(frames, frame, stream)


@contextlib.contextmanager
def open_first(path: File, limits: Limits, check: Check) -> Iterator[tuple[Any, av.VideoFrame]]:
    """(the stream of a file, its first frame). Raises Unreadable."""
    with open_video(path, limits) as (container, stream):
        frame = next(decode(container, stream, limits, check), None)
        if frame is None:
            raise Unreadable("no_frames")
        yield stream, frame


def first_shape(path: File, limits: Limits, check: Check) -> tuple[int, int]:
    """The upright (h, w) of the first frame. Raises Unreadable."""
    with open_first(path, limits, check) as (_, frame), reading():
        return upright.shape_of(frame)


def describe_video(frames: int, first: av.VideoFrame, stream: Any) -> Info:
    """The `Info` of a video, from its number of frames and the first of them."""
    way = upright.of_frame(first)
    height, width = way.shape(first)
    rate = float(stream.average_rate or 0)
    codec = stream.codec_context.name
    return Info(frames, width, height, rate, codec, way.turn, way.mirrored)


def read_frames(
    path: File, choose: Choose, limits: Limits = LIMITS
) -> UInt8[np.ndarray, "t h w c"]:
    """The frames with the numbers `choose(frames in the video)`, upright, uint8 RGB "t h w c".

    Numbers may be in any order and repeat. Other frames are not converted to RGB, nor decoded if a
    later key frame makes that unnecessary. All have the size of the video's first frame: others are
    resized to it. A damaged file is readable as long as every chosen frame is intact. If a file
    ends undamaged a little before the length that its header promises, `choose` is called again,
    with the true length. Raises Unreadable, and what `choose` raises.
    """
    check = start_clock(limits.seconds)
    with open_video(path, limits) as (container, stream):
        with reading():
            table = survey(container, stream, limits, check)
        numbers, frames = choose(table.frames), table.frames
        try:
            with Sheet(numbers, limits) as sheet, reading():
                first = functools.partial(first_shape, path, limits, check)
                return find(container, stream, sheet, table, first, limits, check)
        except Lost:
            pass
        except Unreadable as error:  # some decoders fail where they have not seen the start
            if error.cause != "damaged":
                raise
    try:
        return count(path, numbers, limits, check)
    except Short as short:
        check_length(short.frames, frames)
        frames = short.frames
    try:
        return count(path, choose(frames), limits, check)
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
    limits: Limits = WHOLE,
) -> Info:
    """Decodes a whole video without keeping frames, and returns its `Info`. Raises Unreadable, and
    what `use` raises.

    use: called with frames 0, every, 2 every, ..., upright RGB of one size, in order
    """
    frames, check = 0, start_clock(limits.seconds)
    with open_video(path, limits) as (container, stream), reading():
        promised = survey(container, stream, limits, check).frames
    info, kinds, shown = None, set(), upright.Shown()
    with open_video(path, limits) as (container, stream):
        for frame in decode(container, stream, limits, check):
            if frame.is_corrupt:
                raise Unreadable("damaged", f"frame {frames} is marked as corrupt")
            kind = frame.format.name, frame.width, frame.height
            used = use is not None and frames % every == 0
            # One of each kind is converted in any case: a scan finds what reading would.
            if used or kind not in kinds:
                with reading():
                    info = info or describe_video(0, frame, stream)
                    picture = shown(frame)
                kinds.add(kind)
                if use is not None and used:
                    use(picture)
            frames += 1
    check_length(frames, promised)
    assert info is not None
    return info._replace(frames=frames)


def survey(container: Any, stream: Any, limits: Limits, check: Check) -> Table:
    """The packets of a video, from its header or, if that has none, by reading them."""
    index = stream.index_entries
    check_count(max(stream.frames, len(index)), limits)
    if not stream.frames:
        table = tabulate(demux(container, stream, check), limits)
    else:
        flags = np.fromiter((entry.flags for entry in index), np.int8, len(index))
        hidden = int(np.count_nonzero(flags & HIDDEN))
        # Edit lists leave frames out, or show them twice; the index of an mp4 reflects that.
        edited = len(index) > 0 and has_format(container, {"mov"})
        frames = (len(index) if edited else stream.frames) - hidden
        # If packets are hidden or unknown, their indices are not frame numbers.
        whole = frames == len(index)
        keys = np.flatnonzero(flags & KEY).tolist() if whole else []
        table = Table(frames, [(n, index[n].timestamp) for n in keys])
    if table.frames <= 0:
        raise Unreadable("no_frames")
    return table


def tabulate(
    packets: Iterator[Any], limits: Limits, first: int = 0, last: int | None = None
) -> Table:
    """Reads packets without decoding; the first has index `first`. Reads all, or enough to know the
    frames up to number `last` with certainty. Frames less than REORDERED after `first` are not
    certain."""
    stop = limits.frames + 1 if last is None else last - first + 1 + REORDERED
    shown = (p for p in packets if p.size and not p.is_discard)
    found = [(p.pts, p.is_keyframe) for p in itertools.islice(shown, stop)]
    check_count(len(found), limits)
    times = sorted(pts for pts, _ in found if pts is not None)
    if len(set(times)) < len(found):
        return Table(first + len(found))
    if last is not None and stop == len(found):
        times = times[: last - first + 1]
    numbers = {pts: n for n, pts in enumerate(times, first)}
    keys = sorted((numbers[pts], pts) for pts, key in found if key and pts in numbers)
    return Table(first + len(found), keys, numbers)


def look_around(
    container: Any, stream: Any, wanted: Sequence[int], table: Table, limits: Limits, check: Check
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
                return tabulate(packets, limits, first, wanted[-1])
        except (Lost, KeyError, StopIteration):
            pass
        seek(container, stream, table, 0)
    return tabulate(demux(container, stream, check), limits, 0, wanted[-1])


def follow(index: Any, first: int, packets: Iterator[Any]) -> Iterator[Any]:
    """The same packets, checked against an index from position `first` on. Raises Lost."""
    before = index[first - 1].timestamp if first else None
    for place, packet in zip(range(first, len(index)), packets, strict=False):
        at = index[place].timestamp
        if packet.dts != at or (before is not None and at <= before):
            raise Lost
        before = at
        yield packet


def can_skip(table: Table, at: int, number: int) -> bool:
    """Whether seeking is cheaper than decoding on from frame `at`: a key frame is far after it."""
    return table.key_before(number)[0] - at >= SEEK_PAYS


def find(
    container: Any,
    stream: Any,
    sheet: Sheet,
    table: Table,
    first_shape: Callable[[], tuple[int, int]],
    limits: Limits,
    check: Check,
) -> UInt8[np.ndarray, "t h w c"]:
    """The frames of a sheet, by their time stamps. Other frames are decoded only if these depend on
    them. first_shape: () -> the upright (h, w) of frame 0. Raises Lost, Unreadable."""
    wanted, declared = sheet.wanted, (stream.width, stream.height)
    try:
        if not table.numbers:
            table = look_around(container, stream, wanted, table, limits, check)
        first = seek(container, stream, table, wanted[0])
    except av.error.FFmpegError as error:
        raise Lost from error
    asked = {stamp for stamp, number in table.numbers.items() if number in sheet.places}
    if len(asked) < len(wanted):
        raise Lost
    unpack, skips = Unpack(stream, limits, check), can_leave_out(container, stream)
    base = None  # the shape of frame 0, once it is known
    if first > 0 and not is_sized(container, stream):
        if next(iter(table.numbers.values())) > 0:  # the table does not have the start
            base = look_up(first_shape, None)
        else:
            seek(container, stream, table, 0)
            with contextlib.suppress(av.error.FFmpegError):
                frames = itertools.chain.from_iterable(map(unpack, demux(container, stream, check)))
                base = next(map(upright.shape_of, frames), None)
            seek(container, stream, table, wanted[0])
    packets, at = demux(container, stream, check), -1
    for number in wanted:
        if can_skip(table, max(at, first), number):
            first, at = seek(container, stream, table, number), -1
            packets = demux(container, stream, check)
        while number not in sheet.done:
            packet = next(packets, None)
            if packet is None:
                raise Lost
            # The last packet is empty and flushes the decoder.
            needed = not skips or packet.pts in asked or not packet.size
            stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
            for frame in unpack(packet):
                new = -1 if frame.pts is None else table.numbers.get(frame.pts, -1)
                late = new > first if at < 0 else new > at + 1 and not skips
                if new <= at or late:
                    raise Lost
                at = new
                if frame.pts not in asked and at:
                    continue
                way = upright.of_frame(frame)
                shape = way.shape(frame)
                base = base if at else shape
                if frame.pts not in asked:
                    continue
                if frame.is_corrupt:
                    raise Lost
                if sheet.pixels is None:
                    if base is None and (frame.width, frame.height) != declared:
                        base = look_up(first_shape, shape)
                    sheet.lay(base or shape)
                elif shape != sheet.shape and base is None:
                    base = look_up(first_shape, sheet.shape)
                    if base != sheet.shape:
                        raise Lost
                sheet.put(at, frame, way)
                if len(sheet.done) == len(wanted):
                    return sheet.frames()
            if at > number and number not in sheet.done:
                raise Lost
    raise Lost


def is_sized(container: Any, stream: Any) -> bool:
    """Whether the size that FFmpeg found on opening is that of the first frame, or of all. It reads
    on to find what a header lacks, and may end with the size of a later frame."""
    h264 = stream.codec_context.name == "h264"
    return has_format(container, {"mov"}) or (has_format(container, {"matroska"}) and not h264)


def look_up(first_shape: Callable[[], tuple[int, int]], otherwise: Any) -> Any:
    """The shape of frame 0, or another one if that is damaged and has none."""
    try:
        return first_shape()
    except Unreadable:
        return otherwise


def can_leave_out(container: Any, stream: Any) -> bool:
    """Whether frames on which no other depends can be recognised, and skipped, with certainty."""
    return has_format(container, STAMPED) and stream.codec_context.name in SKIPPABLE


def has_format(container: Any, names: AbstractSet[str]) -> bool:
    return not names.isdisjoint(container.format.name.split(","))


def seek(container: Any, stream: Any, table: Table, number: int) -> int:
    """Seeks to the last key frame at or before a frame, and returns its number."""
    key, at = table.key_before(number)
    container.seek(at, stream=stream)
    return key


def count(
    path: File, numbers: Int[np.ndarray, "t"], limits: Limits, check: Check
) -> UInt8[np.ndarray, "t h w c"]:
    """The frames with these numbers, by decoding all frames before them. Raises Short if the video
    ends earlier, undamaged."""
    at = -1
    with (
        open_video(path, limits) as (container, stream),
        Sheet(numbers, limits) as sheet,
        reading(),
    ):
        for at, frame in enumerate(decode(container, stream, limits, check)):
            if at == 0:
                sheet.lay(upright.shape_of(frame))
            if at in sheet.places:
                if frame.is_corrupt:
                    raise Unreadable("damaged", f"frame {at} is marked as corrupt")
                sheet.put(at, frame)
            if at == sheet.wanted[-1]:
                return sheet.frames()
    raise Short(at + 1)


def check_count(frames: int, limits: Limits) -> None:
    if frames > limits.frames:
        raise Unreadable("too_large", f"more than {limits.frames} frames")


def demux(container: Any, stream: Any, check: Check) -> Iterator[Any]:
    """The packets of a stream; `check` is called for each."""
    for packet in container.demux(stream):
        check()
        yield packet


def decode(container: Any, stream: Any, limits: Limits, check: Check) -> Iterator[av.VideoFrame]:
    """The frames of a stream. Raises Unreadable."""
    unpack, frames = Unpack(stream, limits, check), 0
    with reading():
        for packet in demux(container, stream, check):
            for frame in unpack(packet):
                frames += 1
                check_count(frames, limits)
                yield frame


class Unpack:
    """Decodes packets: one frame after the other, however many a packet holds."""

    def __init__(self, stream: Any, limits: Limits, check: Check):
        name = SPLIT.get(stream.codec_context.codec.canonical_name)
        self.filter = None if name is None else BitStreamFilterContext(name, stream)
        self.stream, self.most, self.check = stream, limits.pixels, check

    def __call__(self, packet: Any) -> Iterator[av.VideoFrame]:
        """The frames that a packet completes. Raises Unreadable where one is too large, or time is
        up."""
        if self.filter is None or not packet.size:
            return self.unpack(packet)
        return itertools.chain.from_iterable(map(self.part, self.filter.filter(packet)))

    def part(self, packet: Any) -> Iterator[av.VideoFrame]:
        self.check()
        return self.unpack(packet)

    def unpack(self, part: Any) -> Iterator[av.VideoFrame]:
        try:
            return map(self.judge, self.stream.decode(part))
        except av.error.FFmpegError:
            if not self.stream.width:  # what FFmpeg leaves where it has rejected a size
                raise Unreadable("too_large", f"more than {self.most} pixels") from None
            raise

    def judge(self, frame: av.VideoFrame) -> av.VideoFrame:
        if frame.width * frame.height > self.most:
            raise Unreadable("too_large", f"{frame.width}x{frame.height}")
        return frame


def start_clock(seconds: float) -> Check:
    """A check that time is left: of one core, for this thread, and of wall time."""
    core, clock = time.thread_time() + seconds, time.monotonic() + CLOCK * seconds
    return functools.partial(check_clock, core, clock, seconds)


def check_clock(core: float, clock: float, seconds: float) -> None:
    if time.thread_time() > core or time.monotonic() > clock:
        raise Unreadable("too_slow", f"more than {seconds:.0f} s")


@contextlib.contextmanager
def open_video(path: File, limits: Limits = LIMITS) -> Iterator[tuple[Any, Any]]:
    """(container, the video stream that is shown). Raises Unreadable where there is none. What is
    read within needs `reading`."""
    if isinstance(path, bytes):
        file: Any = io.BytesIO(path)
    elif os.path.isfile(path):
        file = f"file:{os.fspath(path)}"
        if not is_unicode(file):  # FFmpeg cannot be given such a name, but its content
            with open(path, "rb") as named, open_stream(named, limits) as found:
                yield found
            return
    else:
        raise Unreadable("missing", str(path))
    with open_stream(file, limits) as found:
        yield found


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def open_stream(file: Any, limits: Limits) -> Iterator[tuple[Any, Any]]:
    """As `open_video`. file: for PyAV, an address or a file object"""
    global allowed
    if limits.pixels > allowed:
        allowed = allow(limits.pixels)
    most = dict(max_pixels=str(limits.pixels))
    with reading("not_a_video"):
        container = av.open(
            file, options=OPTIONS | most, metadata_errors="ignore", timeout=PATIENCE
        )
    with container:
        with reading():
            stream = choose_stream(container)
            context = stream.codec_context
            if context is None:
                raise Unreadable("no_decoder")
            if stream.width * stream.height > limits.pixels:
                raise Unreadable("too_large", f"{stream.width}x{stream.height}")
            # Videos are decoded in parallel; threads within a video would only compete.
            context.thread_count = 1
            context.options = most
        yield container, stream


@contextlib.contextmanager
def reading(damage: str = "damaged") -> Iterator[None]:
    """Every failure within becomes Unreadable: a file may contain anything, and PyAV answers some
    of it with errors of Python. damage: the cause of FFmpeg's own errors."""
    try:
        yield
    except (Unreadable, Lost, Short):
        raise
    except MemoryError as error:
        raise Unreadable("too_large", describe(error)) from None
    except av.error.ExitError:
        raise Unreadable("too_slow", f"a read of more than {PATIENCE:.0f} s") from None
    except av.error.FFmpegError as error:
        raise Unreadable(damage, describe(error)) from None
    except Exception as error:
        raise Unreadable("failed", f"{type(error).__name__}: {error}") from error


def choose_stream(container: Any) -> Any:
    """The video stream that the ffmpeg program would choose: no attached picture, such as the cover
    of a song, and of several the largest. Raises Unreadable."""
    films = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not films:
        raise Unreadable("no_video_stream")
    return max(films, key=rank)


def rank(stream: Any) -> int:
    """A stream without a decoder, whose size is unknown, counts as the largest: what is small next
    to it may be its preview."""
    # Only these containers say for every stream what is in it.
    filled = not has_format(stream.container, {"mov"}) or len(stream.index_entries) > 0
    known = stream.codec_context is not None
    pixels = stream.width * stream.height if known else FILLED // 2
    return FILLED * filled + DEFAULT * bool(stream.disposition & Disposition.default) + pixels


def describe(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
