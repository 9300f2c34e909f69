"""Sampling of frames and crops by SimVTP's rules, in numpy and Pillow.

Random choices use a generator that the caller creates from (seed, epoch, index). The rules are
those of the table in docs/data.md, which follows SimVTP's code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

SCALES = (1.0, 0.875, 0.75, 0.66)  # of the short side, for `box_multiscale`
SNAP = 3  # pixels: a crop this close to the target's size takes that size
# Places of a crop, in quarters of the free space: corners, centre, edge centres, quarter points.
PLACES = (
    *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2)),
    *((0, 2), (4, 2), (2, 4), (2, 0)),
    *((1, 1), (3, 1), (1, 3), (3, 3)),
)


def sample_frames(
    length: int, frames: int, stride: int, rng: np.random.Generator
) -> Int[np.ndarray, "t"]:
    """Numbers of `frames` frames, `stride` apart, from a random start in a video of `length`.

    As in SimVTP: the start is uniform in [0, length - window + 1) with window = frames * stride, or
    0 in a shorter video; numbers advance only to frames before the video's last one, and repeat
    when none is left.
    """
    starts = length - frames * stride + 1
    return walk(length, frames, stride, int(rng.integers(starts)) if starts > 0 else 0)


def centre_frames(length: int, frames: int, stride: int) -> Int[np.ndarray, "t"]:
    """As `sample_frames`, with the window in the middle of the video."""
    return walk(length, frames, stride, max(length - frames * stride, 0) // 2)


def walk(length: int, frames: int, stride: int, start: int) -> Int[np.ndarray, "t"]:
    steps = max((length - 2 - start) // stride, 0)
    return start + stride * np.minimum(np.arange(frames), steps)


def segment_frames(length: int, frames: int, rng: np.random.Generator) -> Int[np.ndarray, "t"]:
    """Numbers of a random frame from each of `frames` equal parts of the whole video, of length //
    frames frames each (as in TSN, and in VideoMAE's fine-tuning on Something-Something). In a video
    with fewer than `frames` frames, always the first."""
    part = length // frames
    if part:
        return part * np.arange(frames) + rng.integers(part, size=frames)
    return np.zeros(frames, np.int64)


def segment_views(length: int, frames: int, segments: int) -> Int[np.ndarray, "s t"]:
    """Numbers of the frames of `segments` test clips, each over the whole video, interleaved
    (VideoMAE, Something-Something): frame i of clip k is int(length / frames * (i + k / segments)).
    A single segment has the middles of all parts."""
    place = np.arange(segments)[:, None] / segments if segments > 1 else 0.5
    return (
        (length / frames * (np.arange(frames) + place)).astype(np.int64).reshape(segments, frames)
    )


def in_parts(
    parts: int, choose: Callable[[int], Int[np.ndarray, "t"]], length: int
) -> Int[np.ndarray, "n"]:
    """Applies `choose`, which maps the length of a video to frame numbers, to each of `parts` equal
    parts of a longer video; returns the numbers in that video, part by part."""
    part = length // parts
    return np.concatenate([i * part + choose(part) for i in range(parts)])


def view_frames(length: int, frames: int, stride: int, segments: int) -> Int[np.ndarray, "s t"]:
    """Numbers of the frames of `segments` test clips, spread evenly over the whole video.

    As in SimVTP: among every `stride`-th frame (the last one repeated up to `frames`), clip k
    starts at int(k * step), step = (count - frames) / (segments - 1), where `count` is the number
    of strided frames. A single segment is the middle one.
    """
    strided = np.arange(0, length, stride)
    strided = np.pad(strided, (0, max(frames - len(strided), 0)), mode="edge")
    starts = spread(len(strided) - frames, segments)
    return strided[starts[:, None] + np.arange(frames)]


def spread(room: int, count: int) -> Int[np.ndarray, "n"]:
    """`count` starts from 0 to `room`, evenly spaced, rounded down; a single one is the middle."""
    if count == 1:
        return np.asarray([room // 2])
    return (np.arange(count) * (room / (count - 1))).astype(np.int64)


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    y: int
    x: int
    h: int
    w: int


def box_multiscale(full_h: int, full_w: int, size: int, rng: np.random.Generator) -> Box:
    """A random part of a picture, to be shown at `size`.

    As in SimVTP: width and height are equal or adjacent among four scales of the short side, ten
    pairs in total, and the place is one of thirteen.
    """
    sides = [snap(int(min(full_h, full_w) * scale), size) for scale in SCALES]
    pairs = [(w, h) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    w, h = pairs[rng.integers(len(pairs))]
    w, h = min(w, full_w), min(h, full_h)  # snapped up, a side may exceed the picture
    across, down = PLACES[rng.integers(len(PLACES))]
    return Box(down * ((full_h - h) // 4), across * ((full_w - w) // 4), h, w)


def box_resized(full_h: int, full_w: int, size: int, rng: np.random.Generator) -> Box:
    """A random part, to be shown at any size: 8 % to 100 % of the area, aspect ratio 3 / 4 to
    4 / 3, log-uniform (Inception's; VideoMAE and SimVTP fine-tune with it). After ten draws that do
    not fit, the largest square in the middle."""
    for _ in range(10):
        area = full_h * full_w * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= full_w and 0 < h <= full_h:
            x, y = rng.integers(full_w - w + 1), rng.integers(full_h - h + 1)
            return Box(int(y), int(x), h, w)
    return box_centre(full_h, full_w, size, rng)


def box_window(full_h: int, full_w: int, size: int, rng: np.random.Generator) -> Box:
    """A random square of side `size`, which is not resized; in a smaller picture, the largest
    square."""
    side = min(full_h, full_w, size)
    x, y = rng.integers(full_w - side + 1), rng.integers(full_h - side + 1)
    return Box(int(y), int(x), side, side)


def box_centre(full_h: int, full_w: int, size: int, rng: np.random.Generator | None = None) -> Box:
    """The largest square in the middle."""
    side = min(full_h, full_w)
    return Box((full_h - side) // 2, (full_w - side) // 2, side, side)


def snap(side: int, size: int) -> int:
    return size if abs(side - size) < SNAP else side


def cut(video: UInt8[np.ndarray, "t h w c"], box: Box, size: int) -> UInt8[np.ndarray, "t s s c"]:
    """The same part of every frame, resized to `size` (bilinear, as in Pillow)."""
    return resize(video[:, box.y : box.y + box.h, box.x : box.x + box.w], size, size)


def crop_views(
    video: UInt8[np.ndarray, "t h w c"], size: int, crops: int
) -> UInt8[np.ndarray, "n t s s c"]:
    """`crops` squares spread along the long side, the short side resized to `size`.

    As in SimVTP: crop c starts at int(c * (long - size) / (crops - 1)), along the height if h >= w.
    A single crop is the middle one. Resizing is bilinear without antialiasing, as in OpenCV.
    """
    full_h, full_w = video.shape[1:3]
    if full_h <= full_w:
        h, w = size, int(full_w * size / full_h)
    else:
        h, w = int(full_h * size / full_w), size
    video = resize_plain(video, h, w)
    starts = spread(max(h, w) - size, crops)
    if h >= w:
        return np.stack([video[:, s : s + size] for s in starts])
    return np.stack([video[:, :, s : s + size] for s in starts])


def resize(video: UInt8[np.ndarray, "t h w c"], h: int, w: int) -> UInt8[np.ndarray, "t h2 w2 c"]:
    """Bilinear as in Pillow: antialiased when shrinking."""
    if video.shape[1:3] == (h, w):
        return video
    bilinear = Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(f).resize((w, h), bilinear)) for f in video])


def resize_plain(
    video: UInt8[np.ndarray, "t h w c"], h: int, w: int
) -> UInt8[np.ndarray, "t h2 w2 c"]:
    """Bilinear as in OpenCV: between the four nearest pixels, even when shrinking."""
    full_h, full_w = video.shape[1:3]
    if (full_h, full_w) == (h, w):
        return video
    channels = range(video.shape[-1])
    planes = [[resize_plane(frame[..., c], h, w) for c in channels] for frame in video]
    return np.stack([np.stack(frame, axis=-1) for frame in planes])


def resize_plane(plane: UInt8[np.ndarray, "h w"], h: int, w: int) -> UInt8[np.ndarray, "h2 w2"]:
    # In floats: on bytes, Pillow rounds down, which darkens by 0.4 grey levels.
    image = Image.fromarray(plane.astype(np.float32))
    scale = (image.width / w, 0, 0, 0, image.height / h, 0)
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return np.rint(np.asarray(image.transform((w, h), affine, scale, bilinear))).astype(np.uint8)
