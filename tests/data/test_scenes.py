"""Scenes: a caption says what is shown, held-out ones are unseen, and interpolation does not find
what a net can."""

import numpy as np
import pytest

from vtp_jax.data import scenes, shapes
from vtp_jax.data.scenes import TWINS, VALUES, describe, read
from vtp_jax.data.shapes import Plan
from vtp_jax.types import UserError


def film(scene, seed=0, frames=16):
    return scenes.render(scene, np.random.default_rng(seed), 64, frames)


SCENE = scenes.Scene(
    "red", "disc", "slides", "above", "green", "grey", "stripes", "golden", "azure"
)


def test_scenes_of_val_never_occur_in_training():
    train = {describe(0, "train", i)[0] for i in range(3000)}
    val = {describe(0, "val", i)[0] for i in range(200)}
    assert not train & val and len(val) == 200
    assert {scenes.checksum(s) == 0 for s in train} == {False}
    assert {scenes.checksum(s) for s in val} == {0}


def test_training_shows_every_value_of_every_attribute():
    seen = [
        set(column)
        for column in zip(*(describe(0, "train", i)[0] for i in range(500)), strict=True)
    ]
    assert seen == [set(words) for words in VALUES.values()]


def test_a_caption_says_every_attribute_once():
    for i in range(100):
        scene, caption = describe(0, "train", i)
        words = caption.split()
        assert all(words.count(x) == list(scene).count(x) for x in scene)
        assert scene.before != scene.after


def test_twins_have_the_same_words_in_another_order():
    for i in range(0, 80, 2):
        (a, one), (b, two) = describe(0, "val", i), describe(0, "val", i + 1)
        assert (sorted(one.split()) == sorted(two.split())) == (i // 2 % TWINS == 0)
        assert a != b


@pytest.mark.parametrize("name", scenes.Scene._fields)
def test_every_attribute_shows(name):
    """Another value changes the picture; nothing else does."""
    other = next(x for x in VALUES[name] if x not in SCENE)
    changed = film(SCENE._replace(**{name: other})).astype(int) - film(SCENE)
    assert (np.abs(changed) > 30).any(axis=-1).sum() > 16 * 15
    assert (film(SCENE) == film(SCENE)).all()


def test_twins_show_the_same_light_in_another_order():
    a, b = film(SCENE), film(SCENE._replace(before=SCENE.after, after=SCENE.before))
    lamp = a[:, 2:10, 2:10].astype(int), b[:, 2:10, 2:10].astype(int)
    np.testing.assert_array_equal(lamp[0], lamp[1][::-1])
    np.testing.assert_array_equal(a[:, 20:], b[:, 20:])


@pytest.mark.parametrize("pattern", scenes.PATTERNS)
def test_patterns_repeat_from_cube_to_cube(pattern):
    """So that what a hidden cube shows follows from visible ones."""
    y, x = (np.mgrid[:64, :64].astype(np.float32) + 0.5) / 64
    scene = SCENE._replace(pattern=pattern)
    ground = scenes.draw_ground(scene, np.random.default_rng(1), x, y)
    noise = ground[:, 8:] - ground[:, :-8]
    assert np.abs(noise).mean() < 0.25 * ground.std()


def test_a_corpus_is_rendered_once_and_is_not_taken_for_another(tmp_path):
    plan = Plan(train=3, val=2, side=32, frames=8)
    assert shapes.write(tmp_path, plan, corpus=scenes.SCENES)
    assert not shapes.write(tmp_path, plan, corpus=scenes.SCENES)
    with pytest.raises(UserError, match="another corpus"):
        shapes.write(tmp_path, plan)
    head, *lines = (tmp_path / "val.csv").read_text().splitlines()
    assert head.split(",") == ["path", "caption", *scenes.Scene._fields] and len(lines) == 2
    assert describe(0, "val", 1)[1] in lines[1]
    assert read(plan, "train", 0).shape == (8, 32, 32, 3)


def test_a_table_without_rows_has_its_header(tmp_path):
    shapes.write(tmp_path, Plan(train=1, val=0, side=32, frames=8), corpus=scenes.SCENES)
    (head,) = (tmp_path / "val.csv").read_text().splitlines()
    assert head.split(",") == ["path", "caption", *scenes.Scene._fields]
