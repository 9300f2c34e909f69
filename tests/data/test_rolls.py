"""Rolls: any part of any frames, decoded by itself, is that part of the whole picture."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vtp_jax.data import ops, rolls, video

SIZES = [(66, 90), (16, 32), (15, 31), (1, 1), (64, 64), (33, 130)]
FRAMES = 5
GREY = np.asarray([0.299, 0.587, 0.114])


def film(height, width, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (FRAMES, 4, 5, 3), dtype=np.uint8)
    return ops.resize(small, height, width)


@pytest.fixture(scope="module")
def made():
    return {size: (film(*size), rolls.encode(film(*size), 95)) for size in SIZES}


def planes(strip):
    """Of every frame, Y and the two colours."""
    found = []
    for plane, each in zip(strip.picture.planes, (1, 2, 2), strict=True):
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        found.append(rows[:, : plane.width].reshape(-1, strip.part.h // each, plane.width))
    return found


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


@pytest.mark.parametrize("size", SIZES)
def test_frames_come_back(made, size):
    """Colour too, at one value for four pixels, which is little in a small image."""
    frames, roll = made[size]
    shown = rolls.read(roll, *size)
    assert shown.shape == frames.shape and psnr(frames, shown) > (30 if size[0] > 32 else 26)
    assert psnr(frames @ GREY, shown @ GREY) > 36
    assert all(psnr(frames[k], shown[k]) > psnr(frames[k], shown[k - 1]) for k in range(FRAMES))


@given(data=st.data(), size=st.sampled_from(SIZES))
def test_a_part_equals_that_part_of_the_whole(made, data, size):
    """Exactly, in YCbCr; and nothing further away than a piece is decoded."""
    _, roll = made[size]
    h, w = size

    def draw_box():
        y, x = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
        return ops.Box(y, x, data.draw(st.integers(1, h - y)), data.draw(st.integers(1, w - x)))

    boxes = [draw_box() for _ in range(data.draw(st.integers(1, 2)))]
    some = sorted(data.draw(st.sets(st.integers(0, FRAMES - 1), min_size=1)))
    part = rolls.decode(roll._replace(frames=[roll.frames[k] for k in some]), h, w, boxes)
    y, x, rows, columns = part.part
    assert y <= min(b.y for b in boxes) < y + rolls.PIECE_H
    assert x <= min(b.x for b in boxes) < x + rolls.PIECE_W
    assert y + rows - rolls.PIECE_H < max(b.y + b.h for b in boxes) <= y + rows
    assert x + columns - rolls.PIECE_W < max(b.x + b.w for b in boxes) <= x + columns
    whole = planes(rolls.decode(roll, h, w, [ops.Box(0, 0, h, w)]))
    for here, there, each in zip(planes(part), whole, (1, 2, 2), strict=True):
        rows_, columns_ = slice(y // each, (y + rows) // each), slice(x // each, None)
        wanted = there[some][:, rows_, columns_][:, :, : columns // each]
        np.testing.assert_array_equal(here, wanted)


def test_a_roll_is_a_valid_jpeg(made):
    """With its markers renumbered it is unchanged, and Pillow decodes it as FFmpeg does."""
    frames, roll = made[66, 90]
    data = rolls.MARKER.join(roll.frames)
    pieces = [data[a:b] for a, b in zip(*rolls.find(data), strict=True)]
    assert len(pieces) == FRAMES * 5 * 3
    data = b"".join(p + bytes((0xFF, 0xD0 + n % 8)) for n, p in enumerate(pieces))[:-2]
    shown = np.asarray(Image.open(io.BytesIO(roll.head + data + rolls.END)))
    shown = shown.reshape(FRAMES, 80, 96, 3)[:, :66, :90]
    assert psnr(shown, rolls.read(roll, 66, 90)) > 35 and psnr(shown, frames) > 30


@pytest.mark.parametrize(
    "size, frames", [((256, 340), 255), ((1080, 1920), 16), ((30000, 16), 2), ((1, 1), 4093)]
)
def test_a_roll_holds_what_a_jpeg_can(size, frames):
    assert rolls.capacity(*size) == frames
    h, w = rolls.padded(*size)
    assert frames * h <= rolls.LONGEST and frames * h * w <= max(rolls.PIXELS, h * w)


def test_what_no_jpeg_can_hold_is_too_large():
    with pytest.raises(video.Unreadable, match="too_large"):
        rolls.capacity(256, 70000)


def test_the_longest_allowed_roll_keeps_its_frames():
    """As high as JPEG allows, every frame in its place."""
    count = rolls.capacity(16, 32)
    levels = (np.arange(count) % 251).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (count, 16, 32, 3))
    shown = rolls.read(rolls.encode(frames, 90), 16, 32)
    assert np.abs(shown.astype(int) - frames).max() <= 2
