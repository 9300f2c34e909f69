"""Frames as JPEG, of which any part can be decoded separately.

Frames are stacked vertically in one JPEG, a roll, so that those of a clip are decoded by one call.
A restart marker follows every piece of 16 x 32 pixels, and the data between two markers are
independent of all earlier data (ITU-T T.81, E.1.4). The pieces that cover a part of some frames can
therefore be joined into a smaller JPEG without decoding, and only those are decoded.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import Int, UInt8
from PIL import Image

from vtp_jax.data import ops, video

PIECE_H, PIECE_W = 16, 32  # pixels: two adjacent units of 4:2:0
UNITS = 2
LONGEST = 65500  # pixels of a side: the limit of JPEG
PIXELS = 2**25  # of a roll
# The first of eight markers, which are numbered cyclically. FFmpeg's decoder ignores the numbers,
# so any piece may follow any other.
MARKER, END = b"\xff\xd0", b"\xff\xd9"


class Roll(NamedTuple):
    """Frames of one size. head: the JPEG up to its data; frames: the data of each."""

    head: bytes
    frames: Sequence[bytes]


class Strip(NamedTuple):
    """The same part of some frames, decoded to YCbCr and stacked in one picture.

    part: its position in a frame, aligned to pieces
    """

    picture: av.VideoFrame
    part: ops.Box


def capacity(height: int, width: int) -> int:
    """The number of frames of a size in a roll. Raises Unreadable if not even one fits."""
    h, w = padded(height, width)
    if w > LONGEST or h > LONGEST:
        raise video.Unreadable("too_large", f"{width}x{height} to be stored")
    return max(min(LONGEST // h, PIXELS // (h * w)), 1)


def padded(height: int, width: int) -> tuple[int, int]:
    """Sides rounded up to whole pieces."""
    return height + -height % PIECE_H, width + -width % PIECE_W


def encode(frames: UInt8[np.ndarray, "t h w c"], quality: int) -> Roll:
    """A roll of at most `capacity` frames: 4:2:0, with its own Huffman tables."""
    _, height, width, _ = frames.shape
    h, w = padded(height, width)
    tall = np.pad(frames, ((0, 0), (0, h - height), (0, w - width), (0, 0)), mode="edge")
    file, options = io.BytesIO(), dict(subsampling="4:2:0", optimize=True)
    image = Image.fromarray(tall.reshape(-1, w, 3))
    image.save(file, "JPEG", quality=quality, restart_marker_blocks=UNITS, **options)
    data = file.getvalue()
    scan = data.index(b"\xff\xda") + 2
    start = scan + int.from_bytes(data[scan : scan + 2], "big")
    starts, ends = (
        edges.reshape(len(frames), -1).tolist() for edges in find(data[start : -len(END)])
    )
    return Roll(
        data[:start],
        [data[start + a[0] : start + b[-1]] for a, b in zip(starts, ends, strict=True)],
    )


def find(data: bytes) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """The start and end offsets of the pieces, which are separated by markers."""
    values = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(values[:-1] == MARKER[0])
    at = at[values[at + 1] & 0xF8 == MARKER[1]]
    return np.append(0, at + len(MARKER)), np.append(at, len(data))


def decode(roll: Roll, height: int, width: int, boxes: Sequence[ops.Box]) -> Strip:
    """Decodes the pieces of all frames that cover some boxes. height, width: of the frames. Raises
    Unreadable."""
    top, left = (min(box[k] for box in boxes) // p for k, p in ((0, PIECE_H), (1, PIECE_W)))
    below = -(-max(box.y + box.h for box in boxes) // PIECE_H)
    right = -(-max(box.x + box.w for box in boxes) // PIECE_W)
    h, w = padded(height, width)
    data = MARKER.join(roll.frames)
    starts, ends = find(data)
    grid = (len(roll.frames), h // PIECE_H, w // PIECE_W)
    if len(starts) != math.prod(grid):
        raise video.Unreadable("damaged", "a frame of another size")
    # Adjacent pieces of a row stay adjacent, with the markers between them.
    first = starts.reshape(grid)[:, top:below, left].ravel().tolist()
    last = ends.reshape(grid)[:, top:below, right - 1].ravel().tolist()
    found = MARKER.join([data[a:b] for a, b in zip(first, last, strict=True)])
    part = ops.Box(PIECE_H * top, PIECE_W * left, PIECE_H * (below - top), PIECE_W * (right - left))
    jpeg = resize_head(roll.head, len(roll.frames) * part.h, part.w) + found + END
    codec: Any = av.CodecContext.create("mjpeg", "r")
    codec.thread_count = 1
    codec.options = dict(max_pixels=str(2 * PIXELS))
    try:
        (picture,) = codec.decode(av.Packet(jpeg))
    except (av.error.FFmpegError, ValueError) as error:
        raise video.Unreadable("damaged", str(error)) from None
    return Strip(picture, part)


def resize_head(head: bytes, height: int, width: int) -> bytes:
    """The head of a JPEG, for another size."""
    size = head.find(b"\xff\xc0") + 5  # of the frame header: length, precision, height, width
    if size < 5:
        raise video.Unreadable("damaged", "no baseline JPEG")
    return head[:size] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + head[size + 4 :]


def read(roll: Roll, height: int, width: int) -> UInt8[np.ndarray, "t h w c"]:
    """Whole frames, in RGB. Raises Unreadable."""
    strip = decode(roll, height, width, [ops.Box(0, 0, height, width)])
    convert = VideoReformatter().reformat
    tall = convert(strip.picture, format="rgb24", threads=1).to_ndarray()
    return tall.reshape(len(roll.frames), *strip.part[2:], 3)[:, :height, :width]


def cut(strip: Strip, box: ops.Box, size: int) -> Iterator[UInt8[np.ndarray, "s s c"]]:
    """A box of every frame, resized (bilinear, in YCbCr) and then converted to RGB. Each picture is
    valid until the next one is yielded. In a box that begins at an odd pixel, colour, which is
    coded for two by two pixels, is off by one pixel."""
    picture, part = strip
    y, x = box.y - part.y, box.x - part.x
    alone = av.VideoFrame(box.w, box.h, picture.format.name)
    planes = [(values(a), values(b)) for a, b in zip(picture.planes, alone.planes, strict=True)]
    resize, convert = VideoReformatter().reformat, VideoReformatter().reformat
    options: Any = dict(interpolation=Interpolation.BILINEAR, threads=1)
    for top in range(y, picture.height, part.h):
        for (source, into), each in zip(planes, (1, 2, 2), strict=True):  # pixels for a value
            (row, column), (h, w) = (top // each, x // each), into.shape
            into[...] = source[row : row + h, column : column + w]
        # Both at once would take twice as long.
        small = resize(alone, size, size, picture.format.name, **options)
        (plane,) = convert(small, size, size, "rgb24", **options).planes
        yield values(plane, 3).reshape(size, size, 3)


def values(plane: Any, channels: int = 1) -> UInt8[np.ndarray, "h w"]:
    """A view of the values of a plane."""
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return rows[:, : channels * plane.width]
