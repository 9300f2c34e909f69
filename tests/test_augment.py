"""Views of clips: each change against a library's, and what is drawn once per clip."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter1d

from tests.configs import ROOT
from vtp_jax import augment
from vtp_jax.setup import build, config
from vtp_jax.types import UserError

KEY = jax.random.key(0)
VIDEO = jax.random.uniform(KEY, (4, 2, 12, 10, 3))
OFF = augment.View(jittered=0.0, grey=0.0, blur=0.0, solarise=0.0, flip=0.0)


def test_methods_of_one_view_reject_several_with_a_one_line_error():
    spec = {"video": jax.ShapeDtypeStruct((4, 2, 3, 8, 8, 3), np.uint8)}
    with pytest.raises(UserError, match="coca reads one view of a clip, but rows have 2: leave"):
        augment.one_view(spec, "coca")
    for path in ("coca/pretrain", "omnivl/pretrain", "tvtsv2/pretrain_yt_webvid"):
        cfg = config.load(str(ROOT / f"configs/{path}.py:tiny"))
        cfg.data["train"].pop("pieces", None)  # these are not views
        cfg.data["video"]["repeats"] = 2
        data = build.data(cfg.data, batch=cfg.batch, seed=0)
        method = build.method(cfg, data.facts)
        with pytest.raises(UserError, match="data.video.repeats at 1"):
            jax.eval_shape(build.start(method, cfg.optim, data.spec, 0)[0])


def test_hue_turns_as_in_hsv():
    pixels = np.asarray(VIDEO[0, 0]).reshape(-1, 3)
    turn = jnp.array([0.07, -0.1, 0.5, 0.0]).reshape(-1, 1, 1, 1)
    found = np.asarray(augment.turn_hue(VIDEO, turn))
    for row, t in enumerate(turn.ravel()):
        pixels = np.asarray(VIDEO[row, 0]).reshape(-1, 3)
        wanted = [colorsys.hsv_to_rgb((h + float(t)) % 1, s, v) for h, s, v in map(to_hsv, pixels)]
        np.testing.assert_allclose(found[row, 0].reshape(-1, 3), wanted, atol=1e-5)
    greys = jnp.full((1, 1, 2, 2, 3), 0.3)
    np.testing.assert_allclose(augment.turn_hue(greys, turn[:1]), greys, atol=1e-6)


def to_hsv(pixel):
    return colorsys.rgb_to_hsv(*(float(c) for c in pixel))


def test_grey_and_solarise_are_pillows():
    bytes_ = np.round(255 * np.asarray(VIDEO[:1, 0])).astype(np.uint8)
    image = Image.fromarray(bytes_[0])
    unit = jnp.asarray(bytes_[:, None] / 255, jnp.float32)
    np.testing.assert_allclose(
        255 * augment.grey(unit)[0, 0, :, :, 0], np.asarray(image.convert("L")), atol=0.6
    )
    np.testing.assert_allclose(
        255 * augment.solarise(unit)[0, 0], np.asarray(ImageOps.solarize(image)), atol=1e-3
    )


def test_blur_is_a_gaussian():
    sigma = jnp.array([0.1, 0.6, 1.0, 1.4])
    found = np.asarray(augment.blur(VIDEO, sigma))
    np.testing.assert_allclose(found[0], VIDEO[0], atol=1e-6)
    inner = np.zeros((1, 1, 31, 31, 3), np.float32)
    inner[:, :, 15, 15] = 1
    spot = np.asarray(augment.blur(jnp.asarray(inner), sigma[2:3]))[0, 0, :, :, 0]
    line = gaussian_filter1d(inner[0, 0, 15, :, 0], 1.0, truncate=12)
    np.testing.assert_allclose(spot, np.outer(line, line), atol=1e-5)
    flat = jnp.full((4, 1, 6, 6, 3), 0.25)
    np.testing.assert_allclose(augment.blur(flat, sigma), flat, rtol=1e-5)


def test_jitter_keeps_within_its_strengths():
    np.testing.assert_allclose(augment.jitter(KEY, VIDEO, (0.0, 0.0, 0.0, 0.0)), VIDEO, atol=1e-6)
    brighter = augment.jitter(KEY, 0.5 * VIDEO, (0.4, 0.0, 0.0, 0.0)) / (0.5 * VIDEO)
    ratio = np.asarray(brighter).reshape(4, -1)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-3)
    assert (np.abs(ratio - 1) < 0.4 + 1e-3).all() and np.ptp(ratio[:, 0]) > 0.01
    all_of_it = augment.jitter(KEY, VIDEO, (0.4, 0.4, 0.2, 0.1))
    assert all_of_it.min() >= 0 and all_of_it.max() <= 1


@pytest.mark.parametrize("name", ["jittered", "grey", "blur", "solarise", "flip"])
def test_each_change_has_its_probability_and_is_the_same_in_all_frames(name):
    np.testing.assert_array_equal(augment.view(KEY, VIDEO, OFF), VIDEO)
    many = jnp.broadcast_to(VIDEO[:1, :1], (64, 2, *VIDEO.shape[2:]))
    found = np.asarray(augment.view(KEY, many, OFF._replace(**{name: 0.5})))
    changed = np.abs(found - many).max(axis=(1, 2, 3, 4)) > 1e-4
    assert 16 < changed.sum() < 48
    np.testing.assert_allclose(found[:, 0], found[:, 1], atol=1e-6)
    everywhere = np.asarray(augment.view(KEY, many, OFF._replace(**{name: 1.0})))
    assert (np.abs(everywhere - many).max(axis=(1, 2, 3, 4)) > 1e-4).mean() > 0.9
