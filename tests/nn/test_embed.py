"""Cutting into cubes, positions and both embeddings, against known values and other versions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.nn import embed
from vtp_jax.types import UserError

KEY = jax.random.key(0)


def test_cut_orders_tokens_by_time_row_column_and_pixels_by_time_row_column_colour():
    video = jnp.arange(2 * 4 * 6 * 8 * 3).reshape(2, 4, 6, 8, 3)
    cubes = embed.cut(video, (2, 3, 2))
    assert cubes.shape == (2, 2 * 2 * 4, 2 * 3 * 2 * 3)
    n = 0
    for t in range(0, 4, 2):
        for h in range(0, 6, 3):
            for w in range(0, 8, 2):
                cube = video[1, t : t + 2, h : h + 3, w : w + 2]
                assert (cubes[1, n] == cube.reshape(-1)).all()
                n += 1


def test_join_undoes_cut():
    video = jax.random.normal(KEY, (2, 4, 6, 8, 3))
    grid = embed.grid_of(video.shape, (2, 3, 2))
    assert (embed.join(embed.cut(video, (2, 3, 2)), grid, (2, 3, 2)) == video).all()


def test_a_video_that_does_not_divide_into_cubes_is_rejected():
    with pytest.raises(UserError, match="15x32x32 .* does not divide into cubes of 2x16x16"):
        embed.grid_of((1, 15, 32, 32, 3), (2, 16, 16))


@pytest.mark.parametrize("d, total", [(768, 245744.98957), (384, 122425.85787)])
def test_sinusoid_is_the_reference_table(d, total):
    table = embed.sinusoid(1568, d)
    assert abs(table.astype(np.float32).sum(dtype=np.float64) - total) < 5e-4
    assert (table[0] == np.tile([0.0, 1.0], d // 2)).all()
    np.testing.assert_allclose((table**2).sum(axis=1), d / 2)
    if d == 768:
        np.testing.assert_allclose(table[1, :4], [0.8415, 0.5403, 0.8284, 0.5601], atol=5e-5)


def test_cube_embed_is_the_strided_convolution():
    module = embed.CubeEmbed(16, (2, 4, 4))
    video = jax.random.normal(KEY, (2, 4, 8, 12, 3))
    cubes = embed.cut(video, (2, 4, 4))
    params = module.init(KEY, cubes)
    kernel, bias = params["params"]["kernel"], params["params"]["bias"]
    conv = jax.lax.conv_general_dilated(
        video, kernel, (2, 4, 4), "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    expected = conv.reshape(2, -1, 16) + bias
    np.testing.assert_allclose(module.apply(params, cubes), expected, atol=2e-5)
    bound = 1 / np.sqrt(2 * 4 * 4 * 3)
    assert 0.95 * bound < jnp.abs(kernel).max() <= bound and jnp.abs(bias).max() <= bound


def test_pixels_are_scaled_to_1_and_standardised_by_channel():
    video = jnp.full((1, 2, 2, 2, 3), 255, jnp.uint8)
    x = embed.standardise(
        embed.to_unit(embed.cut(video, (2, 2, 2))), (0.5, 0.4, 0.3), (0.1, 0.2, 0.5)
    )
    np.testing.assert_allclose(x[0, 0].reshape(-1, 3), np.tile([5.0, 3.0, 1.4], (8, 1)), rtol=1e-5)
    assert embed.to_unit(jnp.array([0.25])) == 0.25


def test_word_embed_gives_the_padding_word_no_gradient():
    module = embed.WordEmbed(10, 8, pad_id=0)
    ids = jnp.array([[2, 5, 3, 0, 0]])
    params = module.init(KEY, ids)
    weight = jax.random.normal(KEY, (1, 5, 8))
    grad = jax.grad(lambda p: jnp.sum(weight * module.apply(p, ids)))(params)["params"]
    assert not grad["word"][0].any() and grad["word"][5].any()
    assert grad["position"][4].any()  # the position is trained, the padding word is not
    assert not grad["position"][5:].any() and not grad["type"][1].any()


def test_word_embed_drops_out_only_with_a_key():
    module = embed.WordEmbed(10, 64)
    ids = jnp.array([[2, 5, 3]])
    params = module.init(KEY, ids)
    still = module.apply(params, ids)
    assert (still == module.apply(params, ids)).all()
    a, b = (module.apply(params, ids, rngs={"dropout": jax.random.key(i)}) for i in (1, 2))
    assert not (a == b).all()
    assert 0.02 < float((a == 0).mean()) < 0.25
    np.testing.assert_allclose(a[a != 0], (still / 0.9)[a != 0], rtol=1e-5)


def test_texts_longer_than_the_position_table_are_rejected():
    with pytest.raises(UserError, match="9 tokens; the table has 8"):
        embed.WordEmbed(10, 8, length=8).init(KEY, jnp.zeros((1, 9), jnp.int32))
