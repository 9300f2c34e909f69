"""What the papers of VideoMAE and V2 promise of masks, targets and the loss.
test_videomae_golden.py compares numbers with the official code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import fill
from tests.methods import cases
from tests.methods.laws import SIZE, shapes
from vtp_jax import masking
from vtp_jax.methods import videomae
from vtp_jax.nn import embed
from vtp_jax.types import UserError

KEY = jax.random.key(0)
STEP = jnp.zeros((), jnp.int32)
# Half of the places are hidden, and V2's cells are half of them: both papers run one program.
SMALL = dict(size=SIZE, decoder=SIZE, cube=(2, 8, 8), ratio=0.5, dtype="float32")
GRID, CLIPS, VIEWS = (2, 4, 4), 3, 4
NET, RECIPE = videomae.build(**SMALL)


def example(seed=0):
    """Four views of each of three clips, as rows."""
    video = np.random.default_rng(seed).integers(0, 256, (CLIPS * VIEWS, 4, 32, 32, 3))
    return dict(video=jnp.asarray(video, jnp.uint8), valid=jnp.ones(CLIPS * VIEWS, bool))


def make(**changes):
    return videomae.make(**{**SMALL, **changes})


@functools.cache
def params():
    """No change of the recipe changes a shape."""
    return fill(lambda key: make().init(key, shapes(example())), KEY)


def draw(recipe, video, key=KEY):
    net, recipe = videomae.build(**{**SMALL, **recipe})
    return jax.jit(lambda key: videomae.draw(net, recipe, key, video))(key)


@functools.cache
def drawn(ratio):
    """With the key that the loss draws with, of KEY."""
    return draw(dict(decoder_ratio=ratio), example()["video"], jax.random.split(KEY)[0])


forward = jax.jit(functools.partial(videomae.forward, NET, RECIPE))  # params, batch, draws


def both_papers():
    return pytest.mark.parametrize("ratio", [0.0, 0.5], ids=["videomae", "v2"])


@pytest.mark.parametrize(
    "recipe, side, seen, asked",
    [
        (dict(size="B"), 224, 160, 1408),
        (dict(size="B", decoder_ratio=0.5), 224, 160, 784),
        (dict(size="B", decoder_ratio=0.25), 224, 160, 1176),
        (dict(size="B", decoder_ratio=0.75), 224, 160, 392),
        (dict(size="g", cube=(2, 14, 14), decoder_ratio=0.5), 224, 208, 1024),
        (dict(size="B", ratio=0.75), 224, 392, 1176),  # UCF101
    ],
)
def test_counts_of_visible_and_predicted_tokens_are_the_papers(recipe, side, seen, asked):
    """The decoder reads both together: 944 for V2's B."""
    video = jax.ShapeDtypeStruct((16, 16, side, side, 3), jnp.uint8)
    draws = jax.eval_shape(lambda k: videomae.draw(*videomae.build(**recipe), k, video), KEY)
    assert draws.mask.keep.shape == (16, seen) and draws.ask.shape == (16, asked)


@pytest.mark.parametrize("recipe, scored", [(dict(), 704), (dict(cube=(2, 14, 14)), 920)])
def test_counts_of_v2s_scored_tokens_are_the_papers(recipe, scored):
    video = jax.ShapeDtypeStruct((16, 16, 224, 224, 3), jnp.uint8)
    draws = draw(dict(cube=(2, 16, 16), ratio=0.9, decoder_ratio=0.5) | recipe, video)
    assert (draws.scored.sum(axis=1) == scored).all()
    assert len({bytes(np.asarray(row)) for row in draws.ask}) == 4  # the cells' four phases


def test_views_have_their_own_masks_and_tokens_are_no_tubes():
    masks = np.asarray(drawn(0.0).mask.dropped)
    assert len({bytes(row) for row in masks}) == CLIPS * VIEWS
    tokens = np.asarray(draw(dict(mask="tokens"), example()["video"]).mask.dropped)
    for found, same in ((masks, True), (tokens, False)):
        frames = found.reshape(len(found), GRID[0], -1)
        assert (frames[:, 0] == frames[:, 1]).all() == same


@both_papers()
def test_each_predicted_cube_has_its_own_target(ratio):
    batch, draws = example(), drawn(ratio)
    predicted, target = forward(params(), batch, draws)
    cubes = np.asarray(embed.cut(batch["video"], NET.cube), np.float64) / 255
    x = np.take_along_axis(cubes, np.asarray(draws.ask)[..., None], axis=1)
    x = x.reshape(*x.shape[:2], -1, 3)
    want = (x - x.mean(axis=2, keepdims=True)) / (x.std(axis=2, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(target.reshape(x.shape), want, atol=1e-4)
    hidden = masking.take(draws.mask.dropped, draws.ask)
    assert (draws.scored == hidden).all() and predicted.shape == target.shape
    assert draws.scored.all() == (ratio == 0)


@both_papers()
def test_hidden_pixels_reach_no_prediction(ratio):
    batch, draws = example(), drawn(ratio)
    cubes = embed.cut(batch["video"], NET.cube)

    def predict(where):
        noise = embed.join(jnp.where(where[..., None], 255 - cubes, cubes), GRID, NET.cube)
        return forward(params(), {**batch, "video": noise}, draws)[0]

    predicted = predict(jnp.zeros_like(draws.mask.dropped))
    assert (predicted == predict(draws.mask.dropped)).all()
    assert not (predicted == predict(~draws.mask.dropped)).any()


def test_the_loss_is_the_mean_over_hidden_predicted_cubes_of_every_view_of_valid_clips():
    batch, draws, valid = example(), drawn(0.5), jnp.array([True, False, True])
    predicted, target = forward(params(), batch, draws)
    counted = draws.scored & jnp.repeat(valid, VIEWS)[:, None]
    video = batch["video"].reshape(CLIPS, VIEWS, *batch["video"].shape[1:])
    loss = jax.jit(make(decoder_ratio=0.5).loss)
    value, out = loss(params(), {}, dict(video=video, valid=valid), KEY, STEP)
    np.testing.assert_allclose(value, ((predicted - target) ** 2)[counted].mean(), rtol=1e-5)
    assert out.metrics["loss_video"].count == counted.sum() * target.shape[-1]


def test_visible_tokens_are_a_set():
    """Only positions distinguish them: order changes nothing, and there is no class token."""
    batch, draws = example(), drawn(0.0)
    turned = draws._replace(mask=draws.mask._replace(keep=draws.mask.keep[:, ::-1]))
    a, b = (forward(params(), batch, d)[0] for d in (draws, turned))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_embedding_is_the_mean_of_all_tokens():
    made = cases.made("videomae")
    found = made.encoders(made.params, {}, made.case.batch())["video"]
    assert found["tokens"].shape == found["raw"].shape == (8, 8, 16) and found["mask"].all()
    np.testing.assert_allclose(found["tokens"].mean(axis=1), found["embedding"], atol=1e-5)


def test_pixels_are_their_own_targets_and_pictures_need_no_statistics():
    batch, method = example(), make(target="pixels")
    value, _ = jax.jit(method.loss)(params(), {}, batch, KEY, 0)
    predicted, _ = forward(params(), batch, drawn(0.0))
    cubes = np.asarray(embed.cut(batch["video"], NET.cube)) / 255.0
    own = np.take_along_axis(cubes, np.asarray(drawn(0.0).ask)[..., None], axis=1)
    np.testing.assert_allclose(value, np.mean((np.asarray(predicted) - own) ** 2), rtol=1e-5)
    shown = jax.eval_shape(method.encode["reconstruct"], params(), {}, batch)
    assert list(shown["restored"]) == ["none"]


def test_reconstructions_use_no_statistics_of_hidden_cubes_unless_asked():
    """V2's too are of every hidden cube; these cells are more than half of the places."""
    batch, verb = example(), make(decoder_ratio=0.25).encode["reconstruct"]
    reconstruct = jax.jit(verb)
    a = reconstruct(params(), {}, batch, KEY)
    hidden = a["hidden"][..., None]
    changed = jnp.where(hidden, 255 - batch["video"], batch["video"])
    b = reconstruct(params(), {}, {**batch, "video": changed}, KEY)
    for name, same in (("visible", True), ("normalised", True), ("true", False)):
        x, y = (jnp.where(hidden, z["restored"][name], 0) for z in (a, b))
        assert bool((x == y).all()) == same
    assert float(hidden.mean()) == 0.5
    again = jax.eval_shape(verb, params(), {}, batch)
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
        method, batch = make(**wrong), shapes(example())
        drawn = jax.eval_shape(lambda key: method.init(key, batch), KEY)
        jax.eval_shape(method.loss, drawn, {}, batch, KEY, STEP)
