"""Decoded frames as upright RGB of one size, as the ffmpeg program shows them."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8
from PIL import Image

Picture = UInt8[np.ndarray, "h w c"]
ROUGHLY = 1.0  # degrees by which a quarter turn may be off


class Upright(NamedTuple):
    """What makes a picture upright: left and right are exchanged if `mirrored`, and then it is
    turned to the left, by degrees from 0 to 359."""

    mirrored: bool = False
    turn: int = 0

    @property
    def lies(self) -> bool:
        """Whether width and height change places."""
        return self.turn in (90, 270)

    def shape(self, frame: av.VideoFrame) -> tuple[int, int]:
        """(height, width) of a frame once it is upright."""
        return (frame.width, frame.height) if self.lies else (frame.height, frame.width)

    def __call__(self, picture: Picture) -> UInt8[np.ndarray, "..."]:
        if self.turn % 90:
            return np.asarray(Image.fromarray(picture).rotate(self.turn, Image.Resampling.BILINEAR))
        picture = picture[:, ::-1] if self.mirrored else picture
        return np.rot90(picture, self.turn // 90)


def of_frame(frame: av.VideoFrame) -> Upright:
    """By the display matrix of a frame, which may be that of its container."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # the frame also has data of a kind that PyAV does not know
        return Upright(False, round(frame.rotation) % 360)
    return of_matrix(struct.unpack("=9i", bytes(matrix)[:36])) if matrix is not None else Upright()


def of_matrix(matrix: Sequence[int]) -> Upright:
    """By a display matrix a b u, c d v, x y w: x' = ax + cy, y' = bx + dy, and y points down. As in
    ffmpeg, the first row has the turn, and the signs of the second are used with quarter turns
    only. No matrix that has an inverse has a column of zeros."""
    a, b, _, c, d = matrix[:5]
    across, down = math.hypot(a, c), math.hypot(b, d)
    if not (across and down):
        return Upright()
    clockwise = round(math.degrees(math.atan2(b / down, a / across)))
    quarters, rest = divmod(clockwise + ROUGHLY - 1e-9, 90)
    if rest >= 2 * ROUGHLY - 1e-9:
        return Upright(False, -clockwise % 360)
    if quarters % 2:  # x' = cy, y' = bx
        return Upright((c < 0) == (b < 0), 270 if c < 0 else 90)
    return Upright((a < 0) != (d < 0), 180 if d < 0 else 0)


class Shown:
    """Converts the frames of a video. shape: (h, w) that all of them get, upright; by default that
    of the first frame: where the size changes midway, later frames are resized to it, whatever
    their aspect ratio."""

    def __init__(self, shape: tuple[int, int] | None = None):
        self.shape = shape
        self.reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame, upright: Upright | None = None) -> Picture:
        """upright: as `of_frame`, if known. The picture may be a view of memory that belongs to
        FFmpeg, which it keeps alive."""
        upright = upright or of_frame(frame)
        self.shape = self.shape or upright.shape(frame)
        h, w = self.shape[::-1] if upright.lies else self.shape
        how = None if (frame.height, frame.width) == (h, w) else "BICUBIC"
        rgb = self.reformatter.reformat(frame, w, h, format="rgb24", interpolation=how, threads=1)
        return upright(rgb.to_ndarray() if rgb is frame else view(rgb))


def shape_of(frame: av.VideoFrame) -> tuple[int, int]:
    return of_frame(frame).shape(frame)


def view(rgb: av.VideoFrame) -> Picture:
    plane: Any = rgb.planes[0]
    lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return lines[: rgb.height, : 3 * rgb.width].reshape(rgb.height, rgb.width, 3)
