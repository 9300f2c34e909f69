"""Laws of the corpus: what is held out, what captions state, what frames show."""

import csv
import functools
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from vtp_jax.data import shapes, video
from vtp_jax.types import UserError

PLAN = shapes.Plan()


@functools.cache
def clips(split):
    """(attributes, caption) of all clips of a split."""
    return [shapes.describe(0, split, i) for i in range(getattr(PLAN, split))]


def words_of(name, value):
    """The wordings of a value, each as a tuple of words."""
    wordings = shapes.ATTRIBUTES[name][value]
    texts = itertools.chain(*wordings) if name == "motion" else wordings
    return [tuple(text.split()) for text in texts]


def read_caption(caption):
    """The attributes that a caption states, found from its words alone."""
    words = tuple(caption.split())
    runs = {words[i:j] for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    found = {}
    for name, values in shapes.ATTRIBUTES.items():
        told = [v for v in values if runs & set(words_of(name, v))]
        assert len(told) == 1, (caption, name, told)
        found[name] = told[0]
    return shapes.Attributes(**found)


def test_the_corpus_has_its_documented_sizes():
    assert len(clips("train")) >= 2000 and len(clips("val")) == 200
    assert np.prod([len(values) for values in shapes.ATTRIBUTES.values()]) == 25344


@pytest.mark.parametrize("seed", [0, 7])
def test_held_out_combinations_never_occur_in_training(seed):
    train, held_out = shapes.combinations(seed)
    assert len(set(held_out)) == 200 and not set(train) & set(held_out)
    assert len(train) + 200 == 25344
    seen = {shapes.describe(seed, "train", i)[0] for i in range(PLAN.train)}
    assert seen <= set(train) and len(seen) > 0.95 * PLAN.train


def test_every_pair_of_values_is_in_training():
    """So that what is held out is a combination, never a word or a pair of words."""
    for a, b in itertools.combinations(shapes.ATTRIBUTES, 2):
        pairs = {(getattr(x, a), getattr(x, b)) for x, _ in clips("train")}
        assert len(pairs) == len(shapes.ATTRIBUTES[a]) * len(shapes.ATTRIBUTES[b])


def test_captions_state_every_attribute_and_nothing_else():
    for attributes, caption in clips("train") + clips("val"):
        assert read_caption(caption) == attributes


def test_held_out_captions_are_distinct_and_words_are_few():
    assert len({caption for _, caption in clips("val")}) == 200
    assert len({read_caption(caption) for _, caption in clips("val")}) == 200
    words = {word for _, caption in clips("train") for word in caption.split()}
    assert len(words) <= 120
    assert {word for _, caption in clips("val") for word in caption.split()} <= words


def test_wordings_are_all_used():
    text = " / ".join(caption for _, caption in clips("train"))
    for name, values in shapes.ATTRIBUTES.items():
        for value in values:
            assert all(" ".join(words) in text for words in words_of(name, value))


def test_a_clip_is_a_function_of_seed_and_index():
    """And two clips of one combination are two videos."""
    again = shapes.read(PLAN, "train", 5)
    np.testing.assert_array_equal(shapes.read(PLAN, "train", 5), again)
    assert again.shape == (16, 64, 64, 3) and again.dtype == np.uint8
    count = len(shapes.combinations(0)[0])
    assert shapes.describe(0, "train", 5 + count)[0] == clips("train")[5][0]
    assert np.abs(shapes.read(PLAN, "train", 5 + count).astype(int) - again).mean() > 1
    assert shapes.describe(1, "train", 5) != shapes.describe(0, "train", 5)


# What pictures show, measured without the renderer: colourful pixels are the shape.


def cover(frames):
    """Bool "t h w": pixels of the shape, which alone is colourful."""
    return np.ptp(frames.astype(int), axis=-1) > 90


def track(frames):
    """Centres (x, y) of the shape in the frames that show it, in pixels."""
    seen = cover(frames)
    return np.asarray([[np.nonzero(f)[1].mean(), np.nonzero(f)[0].mean()] for f in seen if f.any()])


def tell_motion(frames):
    """The motion, by rules on the track of the eight frames shown in training."""
    if not cover(frames).any((1, 2)).all():
        return "blinking"
    wide, high = np.ptp(track(frames), axis=0)
    if max(wide, high) < 3:
        return "resting"
    return "sliding" if wide > high else "falling"


def tell_colour(frames):
    red, green, blue = frames[cover(frames)].mean(0)
    hue = np.degrees(np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue))
    away = {name: abs((hue - angle + 180) % 360 - 180) for name, angle in shapes.HUES.items()}
    return min(away, key=away.get)


def tell_size(frames):
    area = max(f.sum() for f in cover(frames))
    small, large = (3 * (64 * shapes.RADII[name]) ** 2 for name in ("small", "large"))
    return "small" if area < (small * large) ** 0.5 else "large"


def tell_background(frames):
    edge = frames[:, [0, -1]].reshape(-1, 64, 3).astype(int)
    found = Counter()
    for column in np.median(edge, axis=0):
        away = {k: np.abs(column - v).max() for k, v in shapes.GROUNDS.items()}
        found[min(away, key=away.get)] += 1
    two = {name for name, _ in found.most_common(2)}
    return " and ".join(name for name in shapes.GROUNDS if name in two)


@pytest.mark.parametrize(
    "name, tell",
    [
        ("motion", tell_motion),
        ("colour", tell_colour),
        ("size", tell_size),
        ("background", tell_background),
    ],
)
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_every_value_can_be_seen(name, tell):
    """A simple rule finds each held-out clip's value from every second frame."""
    wrong = [
        (i, getattr(attributes, name), said)
        for i, (attributes, _) in enumerate(clips("val"))
        if (said := tell(shapes.read(PLAN, "val", i)[::2])) != getattr(attributes, name)
    ]
    assert not wrong


def test_outlines_can_be_distinguished():
    """Small and turned as far as they may be, every outline is nearest to its own kind."""

    def outline(shape, tilt):
        image = shapes.draw_outline(shape, shapes.RADII["small"] * 64, tilt)
        return shapes.cover_frame(image, np.asarray([16.0, 16.0]), 32).astype(float)

    plain = {shape: outline(shape, 0.0) for shape in shapes.SHAPES}
    for shape in shapes.SHAPES:
        for tilt in (-0.14, 0.14):
            turned = outline(shape, tilt)
            far = {other: np.abs(turned - plain[other]).sum() for other in plain}
            assert min(far, key=far.get) == shape


# Files.


def test_a_corpus_is_written_once_and_completed_if_interrupted(tmp_path, capsys):
    plan = shapes.Plan(train=6, val=3, frames=8, seed=3)
    assert shapes.write(tmp_path, plan, workers=2) is True
    assert "\x1b" not in capsys.readouterr().err
    assert json.loads((tmp_path / "manifest.json").read_text())["seed"] == 3
    for split, count in (("train", 6), ("val", 3)):
        with (tmp_path / f"{split}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == count
        for i, row in enumerate(rows):
            attributes, caption = shapes.describe(3, split, i)
            assert row == dict(path=f"{split}/{i:05d}.mp4", caption=caption, **attributes._asdict())
            assert video.probe(tmp_path / row["path"])[:5] == (8, 64, 64, 8.0, "h264")
            drawn = shapes.read(plan, split, i).astype(int)
            shown = video.read_frames(tmp_path / row["path"], np.arange)
            assert np.abs(drawn - shown).mean() < 8
    # Existing files stay; an interrupted corpus has no manifest and is made again.
    before = (tmp_path / "train" / "00000.mp4").stat().st_mtime_ns
    assert shapes.write(tmp_path, plan) is False
    assert (tmp_path / "train" / "00000.mp4").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another corpus"):
        shapes.write(tmp_path, plan._replace(seed=4))
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "train" / "00000.mp4").write_bytes(b"half")
    assert shapes.write(tmp_path, plan) is True
    video.scan(tmp_path / "train" / "00000.mp4")


def test_more_clips_than_held_out_combinations(tmp_path):
    with pytest.raises(UserError, match="only 200 combinations"):
        shapes.write(tmp_path, shapes.Plan(val=201))
