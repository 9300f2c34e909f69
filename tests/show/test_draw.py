"""Drawings show every pixel of what they are given, and nothing of what is hidden."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from vtp_jax.show import draw
from vtp_jax.show.draw import CELL, GAP, LABEL, Answer, Restored, Words

GREEN = ImageColor.getrgb(draw.RIGHT)
RED = ImageColor.getrgb(draw.WRONG)


def clip_of(t=4, side=64, seed=0, words=None):
    rng = np.random.default_rng(seed)
    video = rng.integers(0, 256, (t, side, side, 3), dtype=np.uint8)
    hidden = np.zeros((t, side, side), bool)
    hidden[:, : side // 2] = True
    restored = np.where(hidden[..., None], 255 - video, video)
    return Restored(0, video, hidden, restored, words, video // 2, "none")


WORDS = Words(["a", "red", "disc"], ["a", "blue", "disc"], [False, True, True])


def test_a_storyboard_holds_every_pixel_of_its_rows():
    clip = clip_of()
    board = np.asarray(draw.storyboard(clip, "note"))
    for row, video in enumerate((clip.video, None, clip.restored, clip.interpolated)):
        for column in range(4):
            y = GAP + row * (CELL + GAP)
            x = LABEL + column * (CELL + GAP)
            cell = board[y : y + CELL, x : x + CELL]
            if video is not None:
                np.testing.assert_array_equal(cell[::2, ::2], video[column])
                np.testing.assert_array_equal(cell[1::2, 1::2], video[column])


def test_the_masked_row_shows_what_is_visible_and_nothing_else():
    clip = clip_of()
    other = clip._replace(video=np.where(clip.hidden[..., None], clip.video ^ 255, clip.video))
    masked, of_other = (list(draw.strips(c).values())[1] for c in (clip, other))
    np.testing.assert_array_equal(masked, of_other)
    np.testing.assert_array_equal(masked[~clip.hidden], clip.video[~clip.hidden])
    titles = [title.split("\n")[0] for title in draw.strips(clip)]
    assert titles == ["input", "50 % hidden", "restored", "interpolated"]


def test_the_decibels_of_a_row_are_those_of_its_hidden_pixels():
    clip = clip_of()
    off = np.where(clip.hidden[..., None], clip.video ^ 1, 255 - clip.video)
    assert abs(draw.psnr(off, clip) - 20 * np.log10(255)) < 1e-6
    assert draw.psnr(clip.video, clip) == 99.9
    whole = clip._replace(hidden=np.zeros_like(clip.hidden))
    assert list(draw.strips(whole))[2] == "restored"


@pytest.mark.parametrize("t", [1, 3, 8, 16])
@pytest.mark.parametrize("side", [24, 64, 112, 224])
def test_storyboards_of_any_size_stay_readable(t, side):
    board = draw.storyboard(clip_of(t, side, words=WORDS), "note " * 60, "title")
    assert board.width <= LABEL + 8 * (1.5 * CELL + GAP) + GAP
    assert board.width >= LABEL + 5 * CELL


def test_small_frames_keep_square_pixels_and_large_ones_shrink():
    small = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)
    enlarged = np.asarray(draw.fit(small))
    np.testing.assert_array_equal(enlarged, small.repeat(4, 0).repeat(4, 1))
    assert draw.fit(np.zeros((224, 336, 3), np.uint8)).size == (192, 128)


def colors(image):
    return {color for _, color in image.getcolors(1 << 24)}


def test_right_and_wrong_words_differ_in_colour():
    blank = clip_of()._replace(video=np.zeros((4, 64, 64, 3), np.uint8))
    blank = blank._replace(restored=blank.video, interpolated=blank.video)
    assert WORDS.right() == 1
    said = draw.storyboard(blank._replace(words=WORDS), "note")
    assert {GREEN, RED} <= colors(said)
    wrong = draw.storyboard(blank._replace(words=WORDS._replace(predicted=["a", "x", "y"])), "note")
    assert GREEN not in colors(wrong) and RED in colors(wrong)
    none = draw.storyboard(blank, "note")
    assert not {GREEN, RED} & colors(none) and none.height < said.height


def test_an_animation_has_every_frame_and_loops(tmp_path):
    images = draw.animation(clip_of(5), "note")
    for suffix in (".webp", ".gif"):
        draw.save_animation(images, tmp_path / f"x{suffix}")
        with Image.open(tmp_path / f"x{suffix}") as image:
            assert image.n_frames == 5 and image.info["loop"] == 0
            assert image.size == images[0].size


def framed(image, place):
    """Whether the cell at `place` has a green frame."""
    step = CELL + 4 * GAP
    row = np.asarray(image)[:, GAP + place * step + 1]
    return (row == GREEN).all(-1).sum() > CELL


def test_the_correct_video_is_framed_and_shown_even_if_not_retrieved():
    thumbnails = {i: np.full((64, 64, 3), 40 * i, np.uint8) for i in range(6)}
    second = draw.answers(Answer("a disc", 1, 2, [0, 1, 2], [0.9, 0.8, 0.7]), thumbnails)
    assert [framed(second, i) for i in range(4)] == [False, True, False, False]
    lost = draw.answers(Answer("a disc", 5, 9, [0, 1, 2], [0.9, 0.8, 0.7]), thumbnails)
    assert [framed(lost, i) for i in range(4)] == [False, False, False, True]
    assert lost.size == second.size
