"""Sampling and crops against a restatement, step by step, of what the SimVTP code does."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vtp_jax.data import ops

lengths = st.integers(1, 200)
sides = st.integers(40, 120)


def reference_walk(length, frames, stride, offset):
    """A counter from 1: take counter - 1, advance only while counter + stride < length."""
    counter, taken = offset + 1, []
    for _ in range(frames):
        taken.append(counter - 1)
        if counter + stride < length:
            counter += stride
    return taken


@given(lengths, st.integers(1, 16), st.integers(1, 4), st.integers(0, 10))
def test_sample_frames_agrees_with_the_reference(length, frames, stride, seed):
    got = ops.sample_frames(length, frames, stride, np.random.default_rng(seed))
    window = frames * stride
    starts = range(length - window + 1) if length - (window - 1) > 0 else [0]
    assert got.tolist() == reference_walk(length, frames, stride, got[0]) and got[0] in starts
    assert got.min() >= 0 and got.max() < length


def test_every_walk_ends_where_the_reference_ends():
    """All lengths to 80 and strides to 4, from starts at both ends: the last frame of a video is
    never taken, and no number passes the one before it."""
    for length in range(1, 81):
        starts = {0, 1, length // 2, *range(length - 10, length)} & set(range(length))
        for stride in range(1, 5):
            for start in starts:
                got = ops.walk(length, 8, stride, start)
                assert got.tolist() == reference_walk(length, 8, stride, start)


def test_parts_follow_each_other_without_gap_or_overlap():
    """All lengths to 80 in up to 5 parts; what is left over after the last part is not taken."""
    for parts in range(1, 6):
        for length in range(parts, 81):
            whole = ops.in_parts(parts, np.arange, length)
            np.testing.assert_array_equal(whole, np.arange(length // parts * parts))
            asked = []
            ops.in_parts(parts, lambda n, asked=asked: asked.append(n) or np.arange(1), length)
            assert asked == [length // parts] * parts


def test_sample_frames_starts_are_uniform():
    """A video of 66 frames has three starts for 16 frames of stride 4: [0, 66 - 63)."""
    rng = np.random.default_rng(0)
    starts = [ops.sample_frames(66, 16, 4, rng)[0] for _ in range(600)]
    assert np.all(np.bincount(starts) > 150) and set(starts) == {0, 1, 2}


def test_short_clips_repeat_the_last_frame():
    rng = np.random.default_rng(0)
    assert ops.sample_frames(10, 16, 4, rng).tolist() == [0, 4, 8] + 13 * [8]
    assert ops.sample_frames(1, 4, 4, rng).tolist() == [0, 0, 0, 0]
    assert ops.centre_frames(70, 16, 4)[0] == 3


@given(lengths, st.integers(1, 16), st.integers(1, 4), st.integers(1, 6))
def test_view_frames_agrees_with_the_reference(length, frames, stride, segments):
    strided = list(range(0, length, stride))
    while len(strided) < frames:
        strided.append(strided[-1])
    got = ops.view_frames(length, frames, stride, segments)
    for k in range(segments):
        room = len(strided) - frames
        start = int(k * max(room / (segments - 1), 0)) if segments > 1 else room // 2
        assert got[k].tolist() == strided[start : start + frames]


class Fixed:
    """A generator that gives chosen numbers and remembers how many choices there were."""

    def __init__(self, *numbers):
        self.numbers, self.choices = list(numbers), []

    def integers(self, choices):
        self.choices.append(choices)
        return self.numbers.pop(0)


def reference_crops(w, h, size):
    """{(x, y, crop width, crop height)} of TSN's multi-scale crop with fixed offsets."""
    base = min(w, h)
    crop = [int(base * s) for s in (1, 0.875, 0.75, 0.66)]
    crop = [size if abs(c - size) < 3 else c for c in crop]
    for i, crop_h in enumerate(crop):
        for j, crop_w in enumerate(crop):
            if abs(i - j) <= 1:
                ws, hs = (w - crop_w) // 4, (h - crop_h) // 4
                offsets = [(0, 0), (4 * ws, 0), (0, 4 * hs), (4 * ws, 4 * hs), (2 * ws, 2 * hs),
                           (0, 2 * hs), (4 * ws, 2 * hs), (2 * ws, 4 * hs), (2 * ws, 0),
                           (ws, hs), (3 * ws, hs), (ws, 3 * hs), (3 * ws, 3 * hs)]  # fmt: skip
                for x, y in offsets:
                    yield x, y, crop_w, crop_h


def picture(h, w, frames=2, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, h, w, 3), dtype=np.uint8)


def crop(box, video, size, rng):
    """The part of a video that `box` chooses."""
    return ops.cut(video, box(*video.shape[1:3], size, rng), size)


@pytest.mark.parametrize("length, frames", [(48, 16), (50, 16), (200, 16), (16, 16), (33, 8)])
def test_a_training_clip_of_segments_has_a_frame_of_each(length, frames):
    rng = np.random.default_rng(0)
    drawn = np.stack([ops.segment_frames(length, frames, rng) for _ in range(2000)])
    part = length // frames
    assert (drawn // part == np.arange(frames)).all()
    for column in drawn.T:  # every frame of a part, as often
        counts = np.bincount(column % part, minlength=part)
        assert np.abs(counts / 2000 - 1 / part).max() < 5 * np.sqrt(1 / part / 2000)


def test_a_video_of_fewer_frames_than_segments_shows_its_first():
    assert (ops.segment_frames(15, 16, np.random.default_rng(0)) == 0).all()


@pytest.mark.parametrize("length", [5, 15, 16, 37, 48, 300])
@pytest.mark.parametrize("frames", [8, 16])
def test_segment_views_agrees_with_the_reference(length, frames):
    """It sorts the numbers of two clips together and takes every second one."""
    tick = length / frames
    both = sorted(
        [int(tick / 2 + tick * x) for x in range(frames)] + [int(tick * x) for x in range(frames)]
    )
    found = ops.segment_views(length, frames, 2)
    np.testing.assert_array_equal(found, [both[0::2], both[1::2]])
    assert ops.segment_views(length, frames, 1).shape == (1, frames)
    three = ops.segment_views(length, frames, 3)
    assert three.min() >= 0 and three.max() < length
    np.testing.assert_array_equal(three[0], found[0])


@pytest.mark.parametrize("h, w, size", [(48, 64, 32), (64, 47, 46), (40, 40, 28)])
def test_crop_multiscale_has_every_choice_of_the_reference(h, w, size):
    video = picture(h, w)

    def reference(frame, x, y, w, h):
        image = Image.fromarray(frame).crop((x, y, x + w, y + h))
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))

    wanted = [np.stack([reference(f, *box) for f in video]) for box in reference_crops(w, h, size)]
    got = []
    for pair in range(10):
        for place in range(13):
            rng = Fixed(pair, place)
            got.append(crop(ops.box_multiscale.__wrapped__, video, size, rng))
            assert rng.choices == [10, 13]
    # Order among the choices is free: all are equally likely.
    assert sorted(g.tobytes() for g in got) == sorted(g.tobytes() for g in wanted)


@given(sides, sides, st.integers(1, 4))
def test_crop_views_agrees_with_the_reference(h, w, crops):
    """Frame by frame: short side to 32, squares at int(c * room / (crops - 1)) of the long side."""
    video = picture(h, w, frames=1)
    got = ops.crop_views(video, 32, crops)
    assert got.shape == (crops, 1, 32, 32, 3)
    long = int(max(h, w) * 32 / min(h, w))
    small = ops.resize_plain(video, *((32, long) if h <= w else (long, 32)))
    for c in range(crops):
        start = int(c * ((long - 32) / (crops - 1))) if crops > 1 else (long - 32) // 2
        rows = small[:, :, start : start + 32] if h < w else small[:, start : start + 32]
        np.testing.assert_array_equal(got[c], rows)


@given(sides, sides, sides, sides)
def test_resize_plain_is_bilinear_between_four_pixels(h, w, h2, w2):
    """OpenCV's rule: the centre of a target pixel, mapped back, between its four neighbours."""
    (picture_in,) = picture(h, w, frames=1)
    y, x = (np.arange(h2) + 0.5) * h / h2 - 0.5, (np.arange(w2) + 0.5) * w / w2 - 0.5

    def mix(array, at, axis):
        low = np.floor(at).astype(int)
        part = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
        last = array.shape[axis] - 1
        first, second = np.clip(low, 0, last), np.clip(low + 1, 0, last)
        return array.take(first, axis) * (1 - part) + array.take(second, axis) * part

    wanted = mix(mix(picture_in.astype(float), y, 0), x, 1)
    (got,) = ops.resize_plain(picture_in[None], h2, w2)
    assert np.abs(got - wanted).max() < 1.001  # Pillow rounds down


def test_crop_centre_keeps_what_already_fits():
    video = picture(32, 32)
    np.testing.assert_array_equal(crop(ops.box_centre, video, 32, None), video)
    assert crop(ops.box_centre, picture(50, 33), 16, None).shape == (2, 16, 16, 3)


@pytest.mark.parametrize("side", [222, 223, 224, 226])
def test_a_crop_never_exceeds_an_image_slightly_smaller_than_the_size(side):
    """Sizes within three pixels of the target are snapped to it, upwards too."""
    video = np.full((1, side, side + 30, 3), 200, np.uint8)
    for seed in range(60):
        got = crop(ops.box_multiscale, video, 224, np.random.default_rng(seed))
        assert got.shape == (1, 224, 224, 3) and (got == 200).all()


@given(sides, sides, st.integers(1, 60))
def test_a_window_is_shown_as_it_is(h, w, size):
    video, seen = picture(h, w, frames=1), set()
    for seed in range(8):
        box = ops.box_window(h, w, size, np.random.default_rng(seed))
        assert box.h == box.w == min(h, w, size)
        assert 0 <= box.y <= h - box.h and 0 <= box.x <= w - box.w
        if size <= min(h, w):
            got = ops.cut(video, box, size)
            np.testing.assert_array_equal(got, video[:, box.y :, box.x :][:, :size, :size])
        seen.add(box)
    assert len(seen) > 1 or max(h, w) - min(h, w, size) < 3


def test_plain_resizing_does_not_darken():
    video = np.random.default_rng(0).integers(0, 256, (1, 40, 60, 3)).astype(np.uint8)
    small = ops.resize_plain(video, 30, 45)
    y, x = (np.arange(n) * 40 / 30 + 1 / 6 for n in (30, 45))
    y0, x0 = np.minimum(y.astype(int), 38), np.minimum(x.astype(int), 58)
    fy, fx = (y - y0)[:, None, None], (x - x0)[None, :, None]
    at = lambda dy, dx: video[0][y0 + dy][:, x0 + dx].astype(float)  # noqa: E731
    exact = (at(0, 0) * (1 - fx) + at(0, 1) * fx) * (1 - fy) + (
        at(1, 0) * (1 - fx) + at(1, 1) * fx
    ) * fy
    assert np.abs(small[0] - exact).max() <= 0.51 and abs((small[0] - exact).mean()) < 0.02


def test_crop_resized_draws_area_and_ratio_and_fits():
    h, w = 90, 120
    y, x = np.mgrid[:h, :w]
    video = np.stack([y, x, x * 0], axis=-1).astype(np.uint8)[None]
    areas, ratios = [], []
    for seed in range(300):
        got = crop(ops.box_resized, video, 60, np.random.default_rng(seed))[0].astype(float)
        assert got.shape == (60, 60, 3)
        tall, wide = (np.ptp(got[..., c]) + 1 for c in (0, 1))
        areas.append(tall * wide / (h * w))
        ratios.append(wide / tall)
    assert 0.05 < min(areas) < 0.15 and 0.85 < max(areas) <= 1
    assert 0.68 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.45
    thin = np.zeros((1, 4, 400, 3), np.uint8)  # nothing fits: the square in the middle
    assert crop(ops.box_resized, thin, 8, np.random.default_rng(0)).shape == (1, 8, 8, 3)
