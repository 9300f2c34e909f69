"""Frames out of video files, by PyAV: frames are chosen first, and only then decoded.

A frame's number is its place in the order of presentation. A file that cannot give the frames asked
of it raises `Unreadable`, with one of a few causes, and nothing else.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Int, UInt8

CAUSES = {
    "missing": "there is no such file",
    "not_a_video": "the container is damaged or of no known format",
    "no_video_stream": "the container has no video",
    "no_frames": "the video has no frame",
    "too_large": "its frames have more than MAX_PIXELS pixels, or need more memory than there is",
    "too_slow": "decoding takes longer than it may",
    "truncated": "it ends well before the frames that its header promises",
    "damaged": "decoding fails before the last frame asked for",
}
MAX_PIXELS = 8192 * 4608  # 8K; decoders keep up to seventeen such pictures
MAX_BYTES = 2**31  # of all frames that are asked for at once
MAX_SECONDS = 60.0  # of one core, for the frames of one clip
SCAN_SECONDS = 1800.0  # of one core, for a whole video
SHORTFALL = (
    0.1  # of the promised frames may be missing: edit lists and hidden frames are counted in
)
# Only containers that hold their own data: a playlist could name other files and hosts.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,ivf,h264,hevc"
)
# Bytes come from a file or from memory: there is no way to the network. No picture that is larger
# than it may be is allocated, whatever the codec finds in the stream.
OPTIONS = dict(protocol_whitelist="file,pipe", format_whitelist=FORMATS, max_pixels=str(MAX_PIXELS))
SEEK_PAYS = 24  # frames: to skip fewer, decoding on is cheaper than seeking

File = str | os.PathLike[str] | bytes  # a path, or what is in the file
Choose = Callable[[int], Int[np.ndarray, "t"]]  # frames in the video -> numbers of those wanted


class Unreadable(Exception):
    """A video that cannot be read. cause: a key of `CAUSES`; detail: what the decoder said."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail


class Info(NamedTuple):
    """What a file says of its first video: frames, upright width and height in pixels, frames per
    second (0 where unknown), codec, and the turn to the left, in degrees, that makes it upright."""

    frames: int
    width: int
    height: int
    rate: float
    codec: str
    turn: int


class Table(NamedTuple):
    """The packets of a video.

    keys: (number, time stamp) of its key frames, ascending; numbers: time stamp -> number of the
    frame that it belongs to, and empty where that is not known exactly.
    """

    frames: int
    keys: Sequence[tuple[int, int]] = ()
    numbers: Mapping[int, int] = {}

    def key_before(self, number: int) -> tuple[int, int]:
        """The last key frame that is not after a frame."""
        at = bisect.bisect_right(self.keys, number, key=lambda key: key[0])
        return self.keys[at - 1] if at else (0, 0)


class Short(Exception):
    """The video ended, undamaged, after fewer frames than were promised."""

    def __init__(self, frames: int):
        super().__init__(frames)
        self.frames = frames


class Lost(Exception):
    """After seeking, frames did not come out as the time stamps told."""


def probe(path: File) -> Info:
    """What a file says of its video; decodes one frame. Raises Unreadable."""
    frames = survey(path).frames
    with open_video(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise Unreadable("no_frames")
        return describe_video(frames, frame, stream)


def describe_video(frames: int, frame: av.VideoFrame, stream: Any) -> Info:
    """What is known of a video by its number of frames and one of them."""
    sides = (stream.width, stream.height)
    width, height = sides[::-1] if frame.rotation % 180 else sides
    rate = float(stream.average_rate or 0)
    return Info(frames, width, height, rate, stream.codec_context.name, frame.rotation)


def read_frames(path: File, choose: Choose) -> UInt8[np.ndarray, "t h w c"]:
    """The frames whose numbers `choose(frames in the video)` gives, upright, uint8 RGB "t h w c".

    Numbers may come in any order and repeat. A frame that is not asked for is not converted to RGB,
    and not decoded where a later key frame allows it. A damaged file is readable as long as every
    frame asked for is whole. One that ends undamaged a little before the end that its header
    promised is asked again, with its true length. Raises Unreadable.
    """
    table = survey(path)
    try:
        return take(path, choose(table.frames), table)
    except Short as short:
        check_length(short.frames, table.frames)
        frames = short.frames
    try:
        return take(path, choose(frames), Table(frames))
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
    """Decodes a whole video, keeps nothing, and tells what it found. Raises Unreadable.

    use: is given frames 0, every, 2 every, ..., upright RGB, one after the other
    seconds: of one core, that it may take
    """
    promised, frames, reformatter = survey(path).frames, 0, VideoReformatter()
    with open_video(path) as (container, stream):
        for frame in limit(container.decode(stream), seconds):
            if frame.is_corrupt:
                raise Unreadable("damaged", f"frame {frames} is marked as corrupt")
            if use is not None and frames % every == 0:
                use(convert(frame, stream, reformatter))
            frames += 1
        check_length(frames, promised)
        return describe_video(frames, frame, stream)


def limit(frames: Iterator[Any], seconds: float) -> Iterator[Any]:
    """The same frames, until one is too large or they take too long on this thread."""
    end = time.thread_time() + seconds
    for frame in frames:
        if frame.width * frame.height > MAX_PIXELS:
            raise Unreadable("too_large", f"{frame.width}x{frame.height}")
        if time.thread_time() > end:
            raise Unreadable("too_slow", f"more than {seconds:.0f} s")
        yield frame


def survey(path: File) -> Table:
    """What the header tells of a video's packets; where it is silent, what the packets tell."""
    with open_video(path) as (container, stream):
        if not stream.frames:
            table = tabulate(container, stream)
        else:
            index = stream.index_entries
            hidden = sum(entry.is_discard for entry in index)  # by an edit list
            keys = [(n, entry.timestamp) for n, entry in enumerate(index) if entry.is_keyframe]
            table = Table(stream.frames - hidden, keys)
    if table.frames <= 0:
        raise Unreadable("no_frames")
    return table


def tabulate(container: Any, stream: Any) -> Table:
    """Reads all packets of a stream, and decodes none."""
    packets = [
        (p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard
    ]
    times = sorted(pts for pts, _ in packets if pts is not None)
    if len(set(times)) < len(packets):
        return Table(len(packets))
    numbers = {pts: n for n, pts in enumerate(times)}
    keys = sorted((numbers[pts], pts) for pts, key in packets if key)
    return Table(len(packets), keys, numbers)


def take(path: File, numbers: Int[np.ndarray, "t"], table: Table) -> UInt8[np.ndarray, "t h w c"]:
    """The frames of these numbers. Raises Short at the undamaged end of a shorter video."""
    unique, places = np.unique(numbers, return_inverse=True)
    wanted = unique.tolist()
    if any(can_skip(table, at, n) for at, n in zip([0, *wanted], wanted, strict=False)):
        if not table.numbers:
            with open_video(path) as (container, stream):
                table = tabulate(container, stream)
        with contextlib.suppress(Lost):
            return np.stack(decode(path, wanted, table))[places]
    return np.stack(decode(path, wanted, Table(table.frames)))[places]


def can_skip(table: Table, at: int, number: int) -> bool:
    """Whether a key frame far behind frame `at` makes seeking the cheaper way to a frame."""
    return table.key_before(number)[0] - at >= SEEK_PAYS


def decode(path: File, wanted: Sequence[int], table: Table) -> list[UInt8[np.ndarray, "h w c"]]:
    """Frames of ascending numbers: from key frame to key frame by the table, or from the start."""
    reformatter = VideoReformatter()
    got = []
    with open_video(path) as (container, stream):
        if 3 * stream.width * stream.height * len(wanted) > MAX_BYTES:
            raise Unreadable("too_large", f"{len(wanted)} of {stream.width}x{stream.height}")
        end, at, sought = time.thread_time() + MAX_SECONDS, 0, False
        frames: Iterator[Any] = limit(container.decode(stream), MAX_SECONDS)
        for number in wanted:
            if can_skip(table, at, number):
                container.seek(table.key_before(number)[1], stream=stream)
                frames = limit(container.decode(stream), end - time.thread_time())
                first = next(frames, None)
                at = table.numbers.get(first.pts, number + 1) if first else number + 1
                if at > number:
                    raise Lost
                sought, frames = True, itertools.chain([first], frames)
            frame: Any = None
            for frame in frames:
                if sought and (frame.is_corrupt or table.numbers.get(frame.pts) != at):
                    raise Lost
                at += 1
                if at > number:
                    break
            else:
                raise Short(at)
            if frame.is_corrupt:
                raise Unreadable("damaged", f"frame {number} is marked as corrupt")
            got.append(convert(frame, stream, reformatter))
    return got


def convert(
    frame: av.VideoFrame, stream: Any, reformatter: VideoReformatter
) -> UInt8[np.ndarray, "h w c"]:
    """RGB of the stream's size, turned upright as the display matrix says, in quarter turns."""
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
        container = av.open(file, options=OPTIONS, metadata_errors="ignore")
    except MemoryError as error:
        raise Unreadable("too_large", describe(error)) from None
    except (av.error.FFmpegError, ValueError) as error:
        raise Unreadable("not_a_video", describe(error)) from None
    with container:
        if not container.streams.video:
            raise Unreadable("no_video_stream")
        stream = container.streams.video[0]
        if stream.width * stream.height > MAX_PIXELS:
            raise Unreadable("too_large", f"{stream.width}x{stream.height}")
        # Videos are decoded side by side; threads within one would only compete.
        stream.codec_context.thread_count = 1
        stream.codec_context.options = dict(max_pixels=str(MAX_PIXELS))
        try:
            yield container, stream
        except MemoryError as error:
            raise Unreadable("too_large", describe(error)) from None
        except av.error.FFmpegError as error:
            raise Unreadable("damaged", describe(error)) from None


def describe(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
