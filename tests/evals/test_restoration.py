"""Restoration against its definition, on a method that restores by a rule; interpolation by its
laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.evals import restoration
from vtp_jax.run import sharding
from vtp_jax.types import State, Stream, UserError

STATE = State(jnp.int32(0), {}, None, {})
RNG = np.random.default_rng(0)
HIDDEN = np.zeros((2, 12, 16), bool)
HIDDEN[:, 3:9, 4:12] = True
HIDDEN[:, :2, :3] = True


def rows(n=5):
    text = RNG.integers(5, 9, (n, 4)).astype(np.int32)
    return dict(
        video=RNG.integers(0, 256, (n, 2, 12, 16, 3)).astype(np.uint8),
        text=text,
        text_mask=np.ones_like(text, bool),
        maskable=np.ones_like(text, bool),
        valid=np.arange(n) != 2,
        id=np.arange(n, dtype=np.int32),
    )


def reconstruct(params, extra, batch, rng=None):
    """Pixels are off by .1, without the caption by .2; every word but the first of a row is right,
    without the video none is."""
    true = batch["video"] / 255.0
    hidden = jnp.broadcast_to(jnp.asarray(HIDDEN), true.shape[:-1])
    asked = jnp.broadcast_to(jnp.arange(4) < 3, batch["text"].shape)

    def off(by):
        return {"none": jnp.where(hidden[..., None], true + by, 7.0)}

    return dict(
        video=true, hidden=hidden, restored=off(0.1), restored_alone=off(0.2),
        text=batch["text"], text_hidden=asked,
        predicted_text=batch["text"].at[:, 0].add(1), predicted_text_alone=batch["text"] + 1,
    )  # fmt: skip


def run(verb, batch):
    streams = {"val": Stream(lambda: iter([batch]), int(batch["valid"].sum()), {})}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    check = restoration.make(encode={"reconstruct": verb}, streams=streams, mesh=mesh)
    return dict(check.run(STATE))


def test_hidden_pixels_and_words_of_valid_rows_count():
    batch = rows()
    found = run(reconstruct, batch)
    assert found["restored_db"] == pytest.approx(20, abs=1e-3)
    assert found["restored_db_without_caption"] == pytest.approx(-20 * np.log10(0.2), abs=1e-3)
    assert found["words_right"] == pytest.approx(2 / 3) and found["words_right_without_video"] == 0
    films = batch["video"][batch["valid"]] / 255.0
    filled = [restoration.interpolate(film, HIDDEN) for film in films]
    errors = [np.mean((a - b)[HIDDEN] ** 2) for a, b in zip(filled, films, strict=True)]
    assert found["interpolated_db"] == pytest.approx(np.mean(-10 * np.log10(errors)), abs=1e-3)


def test_a_method_without_captions_has_pixels_alone():
    keys = ("video", "hidden", "restored")
    found = run(lambda *a: {k: v for k, v in reconstruct(*a).items() if k in keys}, rows())
    assert set(found) == {"restored_db", "interpolated_db"}


def test_a_method_that_hides_nothing_is_an_error():
    def whole(*args):
        found = reconstruct(*args)
        return {**found, "hidden": jnp.zeros_like(found["hidden"])}

    with pytest.raises(UserError, match="hides nothing"):
        run(whole, rows())


def test_normalised_cubes_get_no_statistics_of_hidden_ones():
    assert restoration.blind({"true": 1, "visible": 2, "normalised": 3}) == "visible"


def test_interpolation_is_exact_on_planes_and_keeps_what_is_visible():
    y, x = np.mgrid[:12, :16] / 16
    plane = np.stack([0.2 + 0.3 * x + 0.4 * y, x, np.full_like(x, 0.3)], -1)[None].repeat(2, 0)
    hidden = HIDDEN.copy()
    hidden[:, :2, :3] = False  # at the border a plane is not harmonic
    seen = np.where(hidden[..., None], 9.0, plane)
    np.testing.assert_allclose(restoration.interpolate(seen, hidden), plane, atol=1e-12)


def test_interpolated_pixels_are_the_mean_of_their_neighbours():
    video = RNG.random((2, 12, 16, 3))
    other = HIDDEN.copy()
    other[1] = RNG.random((12, 16)) < 0.8  # each frame has a mask of its own
    filled = restoration.interpolate(video, other)
    np.testing.assert_array_equal(filled[~other], video[~other])
    padded = np.pad(filled, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=np.nan)
    around = [padded[:, 2:, 1:-1], padded[:, :-2, 1:-1], padded[:, 1:-1, 2:], padded[:, 1:-1, :-2]]
    np.testing.assert_allclose(np.nanmean(around, axis=0)[other], filled[other], atol=1e-9)


def test_a_frame_without_visible_pixels_is_grey():
    video = RNG.random((2, 12, 16, 3))
    hidden = np.stack([np.ones((12, 16), bool), np.zeros((12, 16), bool)])
    filled = restoration.interpolate(video, hidden)
    assert (filled[0] == 0.5).all() and (filled[1] == video[1]).all()


def test_masks_are_the_same_in_every_run():
    def noisy(params, extra, batch, rng=None):
        found = reconstruct(params, extra, batch)
        noise = 0.1 * jax.random.normal(rng, found["video"].shape)
        return {**found, "restored": {"none": found["video"] + noise}}

    batch = rows()
    assert run(noisy, batch) == run(noisy, batch)
