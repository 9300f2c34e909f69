"""The backbone verb, for every net that has it: grids, places, and what is hidden."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import fill
from vtp_jax import masking
from vtp_jax.nn import backbone, divided, embed, mae, sizes, spacetime, vit
from vtp_jax.types import UserError

KEY, SIZE, GRID = jax.random.key(0), sizes.Size(16, 1, 2, 24), (2, 2, 3)
STATISTICS = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3))
NETS = {
    "vit": vit.ViT(SIZE, math.prod(GRID), (2, 4, 4), **STATISTICS),
    "mae": mae.MaskedAutoencoder(
        SIZE, SIZE, (2, 4, 4), drop_path=0.0, dtype="float32", remat=None, unroll=1,
        attention="auto", **STATISTICS,
    ),
    "divided": divided.DividedViT(SIZE, 6, 3, (2, 4, 4), **STATISTICS),
    "spacetime": spacetime.SpaceTimeViT(SIZE, 6, (2, 4, 4), frames=3, **STATISTICS),
}  # fmt: skip


def video():
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 4, 8, 12, 3)), jnp.uint8)


def tubes():
    return masking.tubes(KEY, 2, GRID, 0.5)


@functools.cache
def given(name):
    """see(video, hide) -> (raw, index), compiled; and the tokens' first and grid."""
    net = NETS[name]
    params = jax.tree.map(jnp.asarray, fill(lambda: net.init(KEY, video(), method="see")))
    shapes = jax.eval_shape(lambda p: net.apply(p, video(), method="see").raw, params)
    found = {}

    @functools.partial(jax.jit, static_argnums=1)
    def see(video, some, hide=None):
        tokens = net.apply(params, video, hide if some else None, method="see")
        found.update(first=tokens.first, grid=tokens.grid)
        return tokens.raw, tokens.index

    see(video(), False)
    assert shapes.shape[1] == found["first"] + math.prod(GRID)
    return see, found["first"], found["grid"]


@pytest.mark.parametrize("name", NETS)
def test_a_video_has_one_token_for_each_position_of_its_grid(name):
    see, first, grid = given(name)
    raw, index = see(video(), False)
    assert grid == GRID and first == (name != "mae")
    assert (index == jnp.arange(12)).all() and raw.shape == (2, first + 12, 16)


@pytest.mark.parametrize("name", NETS)
def test_no_token_reads_hidden_cubes_and_visible_ones_keep_their_positions(name):
    see, first, _ = given(name)
    hide, clip = tubes(), video()
    raw, index = see(clip, True, hide)
    assert (index == hide.keep).all() and raw.shape == (2, first + 6, 16)
    cubes = embed.cut(clip, (2, 4, 4))
    noise = jnp.where(hide.dropped[..., None], 255 - cubes, cubes)
    again, _ = see(embed.join(noise, GRID, (2, 4, 4)), True, hide)
    assert (raw == again).all()
    # The same visible cubes at other positions have other tokens.
    moved, _ = see(embed.join(jnp.roll(cubes, 1, axis=1), GRID, (2, 4, 4)), True, hide)
    assert not (raw == moved).all()


@pytest.mark.parametrize("name", NETS)
def test_hiding_no_cube_changes_nothing(name):
    see, _, _ = given(name)
    none = masking.tubes(KEY, 2, GRID, 0.0)
    np.testing.assert_allclose(see(video(), True, none)[0], see(video(), False)[0], atol=1e-5)


def test_frames_one_by_one_are_images_in_order():
    net = vit.ViT(SIZE, 6, (1, 4, 4), **STATISTICS)
    clip = video()
    params = jax.tree.map(jnp.asarray, fill(lambda: net.init(KEY, clip[:, :1], method="see")))
    see = functools.partial(net.apply, params, method="see")
    found = backbone.by_frame(see, clip)
    assert found.first == 4 and found.grid == (4, 2, 3)
    assert (found.index == jnp.arange(24)).all()
    for t in range(4):
        one = see(clip[:, t : t + 1]).raw
        np.testing.assert_allclose(found.raw[:, t], one[:, 0], atol=1e-5)
        rest = found.raw[:, 4 + 6 * t : 10 + 6 * t]
        np.testing.assert_allclose(rest, one[:, 1:], atol=1e-5)


def test_masks_and_grids_that_do_not_fit_are_errors():
    clip, other = video(), masking.tubes(KEY, 2, (2, 2, 2), 0.5)
    with pytest.raises(UserError, match=r"a mask of \(2, 8\) for 2 videos of 12 tokens"):
        embed.visible(clip, (2, 4, 4), (0.0,), (1.0,), other)
    with pytest.raises(UserError, match=r"a grid of \(1, 2, 3\); the position table has 12"):
        NETS["vit"].init(KEY, clip[:, :2], method="see")
