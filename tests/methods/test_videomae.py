"""Laws of VideoMAE's and V2's loss. test_videomae_golden.py compares numbers with the official
code."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import fill
from vtp_jax import masking
from vtp_jax.methods import videomae
from vtp_jax.nn import embed, mae
from vtp_jax.types import UserError

KEY = jax.random.key(0)
STEP = jnp.zeros((), jnp.int32)
SMALL = dict(
    size=(32, 2, 2, 64), decoder=(16, 1, 1, 32), cube=(2, 8, 8), ratio=0.75, dtype="float32"
)


def example(b=3, seed=0, views=()):
    rng = np.random.default_rng(seed)
    video = rng.integers(0, 256, (b, *views, 8, 32, 32, 3))
    return dict(video=jnp.asarray(video, jnp.uint8), valid=jnp.ones(b, bool))


class Both(NamedTuple):
    net: mae.MaskedAutoencoder
    recipe: videomae.Recipe


@functools.cache
def build(**changes):
    method = videomae.make(**{**SMALL, **changes})
    spec = jax.eval_shape(example)
    net, recipe = videomae.build(**{**SMALL, **changes})
    return method, fill(lambda key: method.init(key, spec), KEY), Both(net, recipe)


def draw(both, video):
    return draw_shape(*both, jax.ShapeDtypeStruct(video.shape, video.dtype))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def draw_shape(net, recipe, video):
    return videomae.draw(net, recipe, KEY, video)


run_forward = jax.jit(videomae.forward, static_argnums=0)


def both_papers():
    return pytest.mark.parametrize("ratio", [0.0, 0.5], ids=["videomae", "v2"])


@pytest.mark.parametrize(
    "recipe, side, counts",
    [
        (dict(size="B"), 224, (160, 1408, 1408)),
        (dict(size="B", decoder_ratio=0.5), 224, (160, 784, 704)),
        (dict(size="B", decoder_ratio=0.25), 224, (160, 1176, None)),
        (dict(size="B", decoder_ratio=0.75), 224, (160, 392, None)),
        (dict(size="g", cube=(2, 14, 14), decoder_ratio=0.5), 224, (208, 1024, 920)),
        (dict(size="B", ratio=0.75), 224, (392, 1176, 1176)),  # UCF101
    ],
)
def test_counts_of_visible_predicted_and_scored_tokens_are_the_papers(recipe, side, counts):
    """Section 10 of both papers' sheets. The decoder reads the first two together: 944 for B."""
    both = Both(*videomae.build(**recipe))
    draws = draw(both, jax.ShapeDtypeStruct((16, 16, side, side, 3), jnp.uint8))
    seen, asked, scored = counts
    assert draws.mask.keep.shape == (16, seen) and draws.ask.shape == (16, asked)
    if scored:
        assert (draws.scored.sum(axis=1) == scored).all()
    assert len({bytes(np.asarray(row)) for row in draws.ask}) == (
        4 if "decoder_ratio" in recipe else 16
    )


@both_papers()
def test_each_predicted_cube_has_its_own_target(ratio):
    _, params, both = build(decoder_ratio=ratio)
    batch = example()
    draws = draw(both, batch["video"])
    predicted, target = run_forward(both.net, params, batch, draws)
    cubes = np.asarray(embed.cut(batch["video"], both.net.cube), np.float64) / 255
    x = np.take_along_axis(cubes, np.asarray(draws.ask)[..., None], axis=1)
    x = x.reshape(*x.shape[:2], -1, 3)
    want = (x - x.mean(axis=2, keepdims=True)) / (x.std(axis=2, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(target.reshape(x.shape), want, atol=1e-4)
    hidden = masking.take(draws.mask.dropped, draws.ask)
    assert (draws.scored == hidden).all() and predicted.shape == target.shape


@both_papers()
def test_hidden_pixels_reach_no_prediction_and_unscored_cubes_no_gradient(ratio):
    method, params, both = build(decoder_ratio=ratio)
    batch = example()
    draws = draw(both, batch["video"])
    cubes, grid = embed.cut(batch["video"], both.net.cube), (4, 4, 4)
    asked = jnp.zeros(draws.mask.dropped.shape, bool)
    asked = jax.vmap(lambda row, i: row.at[i].set(True))(asked, draws.ask)

    def changed(where):
        noise = jnp.where(where[..., None], 255 - cubes, cubes)
        return {**batch, "video": embed.join(noise, grid, both.net.cube)}

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, batch):
        predicted, target = videomae.forward(both.net, params, batch, draws)
        error = jnp.where(draws.scored[..., None], (predicted - target) ** 2, 0)
        return error.mean(), predicted

    (value, predicted), grads = run(params, batch)
    (_, same), _ = run(params, changed(draws.mask.dropped))
    assert (predicted == same).all()
    unscored = draws.mask.dropped & ~asked
    assert unscored.any() == (ratio > 0)
    (value2, _), grads2 = run(params, changed(unscored))
    assert value == value2
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (grads, grads2)), strict=True))


def test_visible_cubes_are_not_scored():
    """They are predicted, but what is predicted there changes nothing."""
    _, params, both = build(decoder_ratio=0.5)
    batch = example()
    draws = draw(both, batch["video"])
    assert (~draws.scored).any()
    predicted, target = run_forward(both.net, params, batch, draws)
    where = draws.scored & batch["valid"][:, None]
    error = videomae.reconstruction.squared_error
    wrong = jnp.where(draws.scored[..., None], predicted, 1e6)
    assert error(predicted, target, where).value() == error(wrong, target, where).value()
    assert error(predicted, target, where).count == draws.scored.sum() * target.shape[-1]


def test_views_are_rows_with_their_own_masks():
    method, params, both = build(decoder_ratio=0.5)
    batch = example(views=(4,))
    rows = dict(
        video=batch["video"].reshape(12, *batch["video"].shape[2:]), valid=jnp.ones(12, bool)
    )
    run = jax.jit(method.loss)
    a, b = (run(params, {}, x, KEY, STEP) for x in (batch, rows))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    masks = draw(both, rows["video"]).mask.dropped
    assert len({bytes(np.asarray(row)) for row in masks[:4]}) == 4
    half = run(params, {}, batch | dict(valid=jnp.array([True, False, True])), KEY, STEP)[1]
    assert half.metrics["loss_video"].count == a[1].metrics["loss_video"].count * 2 / 3


def test_visible_tokens_are_a_set():
    """Only positions distinguish them: order changes nothing, and there is no class token."""
    _, params, both = build()
    batch = example()
    draws = draw(both, batch["video"])
    turned = draws._replace(mask=draws.mask._replace(keep=draws.mask.keep[:, ::-1]))
    a, b = (run_forward(both.net, params, batch, d)[0] for d in (draws, turned))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_key_determines_all_randomness():
    method, params, _ = build(drop_path=0.3)
    still, tokens = build()[0], build(mask="tokens")[0]

    def values(method, *seeds):
        run = jax.jit(method.loss)
        return [float(run(params, {}, example(), jax.random.key(s), STEP)[0]) for s in seeds]

    a, same, other = values(method, 3, 3, 4)
    assert a == same != other
    assert values(still, 3)[0] not in (a, values(tokens, 3)[0])  # drop path is on; masks differ


def test_encoding_is_row_by_row_and_needs_the_encoder_alone():
    method, params, _ = build()
    encode, batch = jax.jit(method.encode["video"]), example()
    whole = encode(params, {}, batch)
    assert whole["embedding"].dtype == jnp.float32
    assert whole["tokens"].shape == whole["raw"].shape == (3, 64, 32) and whole["mask"].all()
    np.testing.assert_allclose(whole["tokens"].mean(axis=1), whole["embedding"], atol=1e-5)
    one = encode(params, {}, {k: v[1:2] for k, v in batch.items()})
    np.testing.assert_allclose(whole["embedding"][1:2], one["embedding"], atol=1e-5)
    less = {k: v for k, v in params.items() if k in ("patch_embed", "encoder")}
    bare = encode(less, {}, batch)
    np.testing.assert_allclose(bare["raw"], whole["raw"], atol=1e-5)
    assert "tokens" not in bare


@both_papers()
def test_reconstructions_use_no_statistics_of_hidden_cubes_unless_asked(ratio):
    method, params, _ = build(decoder_ratio=ratio)
    batch, reconstruct = example(), jax.jit(method.encode["reconstruct"])
    a = reconstruct(params, {}, batch, KEY)
    hidden = a["hidden"][..., None]
    changed = jnp.where(hidden, 255 - batch["video"], batch["video"])
    b = reconstruct(params, {}, {**batch, "video": changed}, KEY)
    for name, same in (("visible", True), ("normalised", True), ("true", False)):
        x, y = (jnp.where(hidden, z["restored"][name], 0) for z in (a, b))
        assert bool((x == y).all()) == same
    assert float(hidden.mean()) == 0.75
    again = jax.eval_shape(method.encode["reconstruct"], params, {}, batch)
    assert again["video"].shape == batch["video"].shape


@pytest.mark.parametrize(
    "wrong, told",
    [
        (dict(mask="frames"), "method.mask='frames'; known: tubes, tokens"),
        (dict(size="XL"), "no size 'XL'"),
        (dict(ratio=1.0), "mask ratio 1.0"),
        (dict(decoder_ratio=0.1), "running cells drop 1, 2 or 3 of 4"),
        (dict(cube=(2, 5, 8)), "does not divide into cubes of 2x5x8"),
        (dict(cube=(2, 32, 32), ratio=0.0, decoder_ratio=0.5), "do not tile a grid of 1 x 1"),
    ],
)
def test_wrong_recipes_are_reported(wrong, told):
    with pytest.raises(UserError, match=told):
        method, params, _ = build(**wrong)
        jax.eval_shape(method.loss, params, {}, example(), KEY, STEP)
