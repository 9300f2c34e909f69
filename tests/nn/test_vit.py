"""Laws of ViT, of MAE's decoder and of resizing pretrained tables. tests/torch compares their
numbers with other implementations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.arrays import fill
from vtp_jax import masking, tree
from vtp_jax.nn import embed, mae, resize, sizes, vit
from vtp_jax.nn.transformer import CLIP
from vtp_jax.types import UserError

KEY = jax.random.key(0)
SIZE, PLACES = sizes.Size(16, 2, 2, 32), 6


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


CUBES = normal(2, PLACES, 48)
KINDS = {
    "vit": {},
    "mean": dict(pooling="mean"),
    "no class": dict(has_class=False, pooling="mean"),
    "clip": dict(first_norm=True, style=CLIP, features=8),
}


@functools.cache
def build(kind):
    net = vit.ViT(SIZE, PLACES, (1, 4, 4), **KINDS[kind])
    # Norms and biases away from 1 and 0, so that omitting one changes the output.
    return net, jax.tree.map(jnp.asarray, fill(net.init, KEY, CUBES))


@pytest.mark.parametrize("kind", KINDS)
def test_the_verbs_in_sequence_equal_the_whole(kind):
    net, params = build(kind)

    def verbs(params):
        bound = net.bind(params)
        raw = bound.encoder(bound.begin(bound.embed(CUBES)))
        return raw, bound.encode(CUBES), bound.pool(raw), bound(CUBES)

    raw, encoded, pooled, whole = jax.jit(verbs)(params)
    assert raw.shape == (2, PLACES + (kind != "no class"), 16) and (raw == encoded).all()
    assert pooled.shape == (2, 8 if kind == "clip" else 16) and (pooled == whole).all()


@pytest.mark.parametrize("kind", KINDS)
def test_positions_come_from_the_index_alone(kind):
    """Cubes in another order, with their indices, have the same tokens in that order."""
    net, params = build(kind)
    order = np.array([[3, 1, 5, 0, 2, 4], [5, 4, 3, 2, 1, 0]])
    encode = jax.jit(lambda cubes, index: net.apply(params, cubes, index, method="encode"))
    whole = np.asarray(encode(CUBES, np.tile(np.arange(PLACES), (2, 1))))
    moved = np.asarray(encode(reorder(np.asarray(CUBES), order), order))
    first = whole.shape[1] - PLACES
    np.testing.assert_allclose(moved[:, :first], whole[:, :first], atol=2e-5)
    np.testing.assert_allclose(moved[:, first:], reorder(whole[:, first:], order), atol=2e-5)


def reorder(x: np.ndarray, order: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x, order[..., None], axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_used_and_only_the_positions_that_are_indexed(kind):
    net, params = build(kind)
    keep = jnp.array([[0, 2, 5], [5, 2, 0]])

    @jax.jit
    @jax.grad
    def gradient(params):
        raw = net.apply(params, masking.take(CUBES, keep), keep, method="encode")
        return jnp.sum(net.apply(params, raw, method="pool") ** 2)

    found = tree.flatten(jax.device_get(gradient(params)["params"]))
    assert all(g.any() for g in found.values()), [n for n, g in found.items() if not g.any()]
    used = found["position"].any(axis=1)[-PLACES:]
    assert (used == np.isin(np.arange(PLACES), keep)).all()


def test_means_exclude_the_class_token_and_masked_tokens():
    net, params = build("mean")
    raw = np.array(normal(2, PLACES + 1, 16))
    mask = np.array([[True] * 4 + [False] * 3] * 2)
    pool = jax.jit(lambda raw, mask: net.apply(params, raw, mask, method="pool"))
    pooled, whole = (np.asarray(pool(raw, m)) for m in (mask, np.ones_like(mask)))
    assert not (pooled == whole).all()
    raw[:, 0], raw[:, 4:] = 9.0, 7.0
    assert (pooled == np.asarray(pool(raw, mask))).all()


def test_a_wrong_number_of_cubes_and_an_impossible_pooling_are_rejected():
    net, params = build("vit")
    with pytest.raises(UserError, match="5 cubes; the position table has 6"):
        net.apply(params, CUBES[:, :5])
    for wrong in (dict(pooling="class", has_class=False), dict(pooling="max")):
        with pytest.raises(UserError, match="pooling"):
            vit.ViT(SIZE, PLACES, (1, 4, 4), **wrong).init(KEY, CUBES)


def test_the_decoder_output_depends_on_positions_and_not_on_order():
    decoder = mae.Decoder(sizes.Size(8, 1, 2, 16), PLACES, 48)
    draw = jax.jit(lambda: masking.tokens(KEY, 2, PLACES, 0.5))
    mask = jax.tree.map(np.asarray, draw())
    seen = np.asarray(normal(2, 1 + mask.keep.shape[1], 16))
    params = fill(decoder.init, KEY, seen, mask)
    run = jax.jit(decoder.apply)
    out = np.asarray(run(params, seen, mask))
    assert out.shape == (2, 3, 48)
    order = [2, 0, 1]
    moved = mask._replace(keep=mask.keep[:, order], drop=mask.drop[:, order])
    tokens = np.concatenate([seen[:, :1], seen[:, 1:][:, order]], axis=1)
    np.testing.assert_allclose(run(params, tokens, moved), out[:, order], atol=2e-5)


def count(net, *inputs):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(net.init, KEY, *inputs)))


def test_parameter_counts_are_the_published_ones():
    """timm's ViT-B/16 with its 1,000 classes, MAE-B with its decoder of 8 blocks, CLIP's L/14."""
    base, large = sizes.ENCODERS["B"], sizes.ENCODERS["L"]
    cubes = jax.ShapeDtypeStruct((1, 196, 768), jnp.float32)
    encoder = count(vit.ViT(base, 196), cubes)
    assert encoder + 768 * 1000 + 1000 == 86_567_656
    mask = jax.eval_shape(lambda: masking.tokens(KEY, 1, 196, 0.75))
    seen = jax.ShapeDtypeStruct((1, 50, 768), jnp.float32)
    decoder = mae.Decoder(sizes.Size(512, 8, 16, 2048), 196, 768)
    assert encoder + count(decoder, seen, mask) == 111_907_840
    clip = vit.ViT(large, 256, (1, 14, 14), style=CLIP, first_norm=True, features=768)
    assert count(clip, jax.ShapeDtypeStruct((1, 256, 588), jnp.float32)) == 303_966_208


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 2),
)
def test_resizing_keeps_class_rows_and_constants_and_is_the_identity_on_the_same_grid(
    old, new, first
):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((first + old[0] * old[1], 3)).astype(np.float32)
    out = resize.grid_positions(table, old, new)
    assert out.shape == (first + new[0] * new[1], 3) and out.dtype == table.dtype
    assert (out[:first] == table[:first]).all()
    assert (resize.grid_positions(table, old, old) == table).all()
    np.testing.assert_allclose(resize.grid_positions(table * 0 + 2.5, old, new), 2.5, rtol=1e-6)
    # Rows and columns are not confused: transposing commutes.
    grid = table[first:].reshape(*old, 3).swapaxes(0, 1).reshape(-1, 3)
    turned = resize.grid_positions(grid, old[::-1], new[::-1]).reshape(*new[::-1], 3)
    expected = out[first:].reshape(*new, 3)
    np.testing.assert_allclose(turned.swapaxes(0, 1), expected, atol=1e-6)


def test_square_tables_are_resized_given_only_their_numbers_of_rows():
    table = np.random.default_rng(0).standard_normal((1 + 14 * 14, 4))
    expected = resize.grid_positions(table, (14, 14), (7, 7))
    assert (resize.positions(table, 50) == expected).all()
    assert (resize.positions(table[1:], 49) == expected[1:]).all()
    for rows in (49, 51):
        with pytest.raises(UserError, match=f"197 and {rows} rows"):
            resize.positions(table, rows)
    with pytest.raises(UserError, match="no grid of 15 x 14"):
        resize.grid_positions(table, (15, 14), (7, 7))


@pytest.mark.parametrize("how", ["mean", "centre"])
def test_an_inflated_kernel_maps_a_still_clip_as_the_original_maps_its_image(how):
    picture = np.asarray(normal(1, 1, 8, 8, 3))
    flat, deep = (embed.CubeEmbed(16, (t, 4, 4)) for t in (1, 4))
    params = fill(lambda: flat.init(KEY, embed.cut(jnp.asarray(picture), (1, 4, 4))))["params"]
    kernel = resize.inflate(params["kernel"], 4, how)

    @jax.jit
    def both(params, kernel, picture, still):
        expected = flat.apply({"params": params}, embed.cut(picture, (1, 4, 4)))
        inflated = {"params": {**params, "kernel": kernel}}
        return expected, deep.apply(inflated, embed.cut(still, (4, 4, 4)))

    expected, got = both(params, kernel, picture, np.repeat(picture, 4, axis=1))
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert np.count_nonzero(kernel.any(axis=(1, 2, 3, 4))) == (4 if how == "mean" else 1)


def test_an_unknown_way_to_inflate_a_kernel_is_rejected():
    with pytest.raises(UserError, match="'mean' or 'centre', not 'median'"):
        resize.inflate(np.zeros((1, 4, 4, 3, 8)), 2, "median")
