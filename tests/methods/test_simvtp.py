"""Laws of SimVTP's loss, encoders and reconstructions. test_simvtp_golden.py compares numbers with
the released model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax import masking, tree
from vtp_jax.methods import simvtp
from vtp_jax.nn import embed, sizes
from vtp_jax.types import UserError

KEY = jax.random.key(0)
STEP = jnp.zeros((), jnp.int32)
SMALL = dict(
    size=(64, 2, 1, 96), decoder=(64, 1, 1, 96), cube=(2, 8, 8), vocab_size=50, pad_id=0, mask_id=4,
    dtype="float32", dropout=0.0, video_ratio=0.75,
)  # fmt: skip


def example(b=4, seed=0):
    rng, length = np.random.default_rng(seed), 9
    lengths = np.array([length, length - 2, 5, 4])[np.arange(b) % 4]
    mask = np.arange(length) < lengths[:, None]
    text = np.where(mask, rng.integers(5, 50, (b, length)), 0).astype(np.int32)
    text[:, 0] = 2
    return dict(
        video=jnp.asarray(rng.integers(0, 256, (b, 4, 32, 32, 3)), jnp.uint8),
        text=jnp.asarray(text),
        text_mask=jnp.asarray(mask),
        maskable=jnp.asarray(mask & (text > 4)),
        valid=jnp.ones(b, bool),
    )


def spec_of(batch):
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}


def build(**changes):
    return simvtp.make(**{**SMALL, **changes})


def both(**changes):
    """(net, recipe) of the method that `build` gives."""
    return simvtp.build(**{**SMALL, **changes})


METHOD = build()
ENCODE = {name: jax.jit(verb) for name, verb in METHOD.encode.items()}


@functools.cache
def drawn():
    """Parameters for all of the methods below: no change of the recipe changes a shape."""
    return jax.jit(lambda key: METHOD.init(key, spec_of(example())))(KEY)


def only(*names):
    """Weights without the losses that a test does not need, which are then not compiled."""
    return {name: float(name in names) for name in simvtp.WEIGHTS}


def draw(net, recipe, batch):
    return jax.jit(lambda b: simvtp.draw(net, recipe, KEY, b))(batch)


def losses(batch, method=METHOD, seed=1):
    value, out = jax.jit(method.loss)(drawn(), {}, batch, jax.random.key(seed), STEP)
    return float(value), {k: float(v.value()) for k, v in out.metrics.items()}


def test_parameters_of_the_published_model():
    method = simvtp.make(size="B", vocab_size=30522)
    spec = dict(
        video=jax.ShapeDtypeStruct((2, 16, 224, 224, 3), np.uint8),
        text=jax.ShapeDtypeStruct((2, 32), np.int32),
    )
    shapes = jax.eval_shape(lambda key: method.init(key, spec), KEY)
    assert tree.size(shapes) == 141_521_084
    flat = tree.flatten(shapes)
    text = sum(v.size for k, v in flat.items() if k.startswith("text_embed/"))
    decoder = sum(v.size for k, v in flat.items() if k.startswith("decoder"))
    assert text == 23_837_184 and decoder == 7_688_448


@pytest.mark.parametrize("size", sizes.ENCODERS)
def test_every_size_has_a_loss(size):
    method = simvtp.make(**{**SMALL, "size": size, "decoder": None})
    batch = example()
    params = jax.eval_shape(lambda key: method.init(key, spec_of(batch)), KEY)
    value, out = jax.eval_shape(method.loss, params, {}, batch, KEY, STEP)
    assert value.shape == () and value.dtype == jnp.float32
    assert set(out.metrics) >= {"loss_video", "loss_text", "loss_vtc", "loss_vtm"}


def test_the_loss_is_the_weighted_sum_of_four():
    value, found = losses(example())
    four = [found[f"loss_{n}"] for n in ("video", "text", "vtc", "vtm")]
    np.testing.assert_allclose(value, sum(four), rtol=1e-6)


OTHERS = pytest.mark.slow(reason="compiles the loss again, as the first pair does")


@pytest.mark.parametrize(
    "off, half",
    [
        ("text", "vtc"),
        pytest.param("video", "text", marks=OTHERS),
        pytest.param("vtc", "vtm", marks=OTHERS),
        pytest.param("vtm", "video", marks=OTHERS),
    ],
)
def test_a_loss_with_weight_zero_is_not_computed_and_leaves_the_others(off, half):
    weights = {**simvtp.WEIGHTS, off: 0.0, half: 0.5}
    _, all_four = losses(example())
    value, found = losses(example(), build(weights={off: 0.0, half: 0.5}))
    assert f"loss_{off}" not in found
    for name, x in found.items():
        np.testing.assert_allclose(x, all_four[name], rtol=1e-5)
    told = sum(weights[n] * found[f"loss_{n}"] for n in simvtp.WEIGHTS if n != off)
    np.testing.assert_allclose(value, told, rtol=1e-6)


def test_an_invalid_row_changes_nothing_with_every_quirk():
    """Gradients, and the recipe without quirks: test_laws.py."""
    method = build(
        contrast_text="masked",
        match_text="masked",
        pool_padding=True,
        sum_directions=True,
        groups=2,
    )
    good, other = example(8), example(8, seed=7)
    valid = jnp.array([True, True, False, True, True, False, True, True])
    row = {k: valid.reshape(-1, *[1] * (v.ndim - 1)) for k, v in good.items()}
    mixed = {k: jnp.where(row[k], good[k], other[k]) for k in good}
    run = jax.jit(lambda batch: method.loss(drawn(), {}, {**batch, "valid": valid}, KEY, STEP))
    (value, out), (value2, out2) = run(good), run(mixed)
    np.testing.assert_allclose(value2, value, rtol=1e-6)
    for name, mean in out.metrics.items():
        np.testing.assert_allclose(mean.value(), out2.metrics[name].value(), rtol=1e-6)
    assert out.metrics["match_accuracy"].count == 12  # six valid rows, right and wrong


def test_a_single_valid_row_has_no_contrast_and_no_matching_loss():
    batch = {**example(), "valid": jnp.array([False, True, False, False])}
    value, found = losses(batch)
    assert found["loss_vtm"] == 0 and found["loss_vtc"] == 0 and np.isfinite(value)


def test_hidden_pixels_and_words_reach_no_prediction():
    (net, recipe), batch = both(weights=dict(vtm=0.0)), example()
    draws = draw(net, recipe, batch)
    run = jax.jit(lambda p, b: simvtp.forward(net, recipe, p, b, draws))
    dropped = draws.mask.dropped[..., None]
    cubes = embed.cut(batch["video"], net.cube)
    grid = embed.grid_of(batch["video"].shape, net.cube)
    noise = jnp.where(dropped, 255 - cubes, cubes)
    words = jnp.where(draws.hidden, 49, batch["text"])
    a = run(drawn(), batch)
    b = run(drawn(), {**batch, "video": embed.join(noise, grid, net.cube), "text": words})
    assert (a.pixels == b.pixels).all() and (a.words == b.words).all()
    assert not (a.target == b.target).all() and not (a.text == b.text).all()


def test_contrast_over_groups_is_the_mean_of_the_groups():
    grouped, alone = both(groups=2, weights=only("vtc")), both(weights=only("vtc"))
    batch = example()
    draws = draw(*grouped, batch)

    def vtc(net, recipe):
        @jax.jit
        def run(params, part, own):
            out = simvtp.forward(net, recipe, params, part, own)
            return simvtp.compare(recipe, out, part, own)["loss_vtc"].value()

        return run

    def rows(start, end):
        part, own = jax.tree.map(lambda x: x[start:end], (batch, draws))
        return drawn(), part, own._replace(negative=jnp.zeros(end - start, jnp.int32))

    half = vtc(*alone)
    halves = [half(*rows(0, 2)), half(*rows(2, 4))]
    np.testing.assert_allclose(vtc(*grouped)(*rows(0, 4)), np.mean(halves), rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_sharing_the_joint_pass_is_the_same_without_dropout_only(dropout):
    recipe = dict(match_text="masked", weights=only("vtm"), dropout=dropout)
    shared, twice = build(**recipe), build(**recipe, second_draw=True)
    a, b = (losses(example(), method)[1]["loss_vtm"] for method in (shared, twice))
    if dropout:
        assert abs(a - b) > 1e-6
    else:
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.slow(reason="compiles two gradients")
def test_chunks_of_rows_change_neither_losses_nor_gradients():
    batch = example(8)

    def run(**changes):
        loss = jax.value_and_grad(build(groups=2, **changes).loss, has_aux=True)
        (value, out), grads = jax.jit(loss)(drawn(), {}, batch, KEY, STEP)
        return value, {k: v.value() for k, v in out.metrics.items()}, grads

    whole, parts = run(), run(chunks=4, contrast_chunks=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole[:2], parts[:2])
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(whole[2]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * scale),
        whole[2], parts[2],
    )  # fmt: skip


def test_with_running_cells_the_loss_counts_hidden_cubes_alone():
    (net, recipe), batch = both(decoder_ratio=0.5, weights=only("video")), example()
    draws = draw(net, recipe, batch)
    assert draws.ask.shape == (4, 16) and draws.mask.drop.shape == (4, 24)
    out = jax.jit(lambda p: simvtp.forward(net, recipe, p, batch, draws))(drawn())
    assert out.pixels.shape == out.target.shape == (4, 16, 384)
    scored = masking.take(draws.mask.dropped, draws.ask)
    assert 0 < scored.sum() < scored.size
    error = ((out.pixels - out.target) ** 2).mean(axis=-1)
    found = simvtp.compare(recipe, out, batch, draws)["loss_video"].value()
    np.testing.assert_allclose(found, error[scored].mean(), rtol=1e-5)


def test_embeddings_depend_on_their_own_row_and_not_on_padding():
    batch, other = example(), example(seed=7)
    video, others = ({"video": b["video"]} for b in (batch, other))  # it reads nothing else
    text, mates = ({k: b[k] for k in ("text", "text_mask")} for b in (batch, other))
    longer = {k: jnp.pad(v, ((0, 0), (0, 3))) for k, v in text.items()}
    for name, own, rest in (("video", video, others), ("text", text, mates)):
        whole = ENCODE[name](drawn(), {}, own)["embedding"]
        assert whole.dtype == jnp.float32 and whole.shape == (4, 64)
        mixed = {k: rest[k].at[2].set(own[k][2]) for k in own}
        among = ENCODE[name](drawn(), {}, mixed)["embedding"]
        np.testing.assert_allclose(whole[2], among[2], atol=1e-5)
        assert jnp.abs(whole - among)[jnp.array([0, 1, 3])].max() > 1e-3
    np.testing.assert_allclose(ENCODE["text"](drawn(), {}, longer)["embedding"], whole, atol=1e-5)
    quirky = jax.jit(build(pool_padding=True).encode["text"])
    with_pads = [quirky(drawn(), {}, b)["embedding"] for b in (text, longer)]
    assert jnp.abs(with_pads[0] - with_pads[1]).max() > 1e-3


def test_pair_scores_rows_by_the_matching_head():
    batch = example()
    text = ENCODE["text"](drawn(), {}, {k: batch[k] for k in ("text", "text_mask")})
    video = ENCODE["video"](drawn(), {}, {"video": batch["video"]})
    score = ENCODE["pair"](drawn(), {}, video, text)["score"]
    turned = jax.tree.map(lambda x: x[::-1], (video, text))
    np.testing.assert_allclose(
        ENCODE["pair"](drawn(), {}, *turned)["score"], score[::-1], atol=1e-5
    )
    assert score.shape == (4,) and jnp.ptp(score) > 0


def test_reconstructions_use_no_statistics_of_hidden_cubes_unless_asked():
    batch = example()
    a = ENCODE["reconstruct"](drawn(), {}, batch, KEY)
    hidden = a["hidden"][..., None]
    changed = jnp.where(hidden, 255 - batch["video"], batch["video"])
    b = ENCODE["reconstruct"](drawn(), {}, {**batch, "video": changed}, KEY)
    for name, same in (("visible", True), ("normalised", True), ("true", False)):
        x, y = (jnp.where(hidden, z["restored"][name], 0) for z in (a, b))
        assert bool((x == y).all()) == same
    shown = jnp.where(hidden, 0, a["restored"]["visible"] - batch["video"] / 255.0)
    np.testing.assert_allclose(shown, 0, atol=1e-6)
    assert 0 < float(hidden.mean()) < 1
    asked = a["text_hidden"]
    assert (a["masked_text"] == jnp.where(asked, 4, a["text"])).all()
    assert (a["predicted_text"] == a["text"])[~asked].all()


def test_without_masks_there_is_contrast_and_matching_alone():
    method = build(video_ratio=0.0, text_ratio=0.0, weights=only("vtc", "vtm"))
    value, found = losses(example(), method)
    np.testing.assert_allclose(value, found["loss_vtc"] + found["loss_vtm"], rtol=1e-6)
    shown = jax.eval_shape(METHOD.encode["reconstruct"], drawn(), {}, example())
    assert shown["text"].shape == (4, 9)


def test_reconstructions_predict_every_hidden_cube_whatever_training_predicts():
    some = build(decoder_ratio=0.5).encode["reconstruct"]
    shown = jax.eval_shape(some, drawn(), {}, example())
    assert shown["restored"]["visible"].shape == (4, 4, 32, 32, 3)


def test_views_of_a_clip_are_rows_that_are_never_negatives_of_each_other():
    """With nothing hidden, contrast of two views is the mean of each view's own, though both have
    the same words; in one group, no loss could be below log 2."""
    method = build(video_ratio=0.0, text_ratio=0.0, weights=only("vtc"), temperature=0.01)
    batch, other = example(), example(seed=1)["video"]
    views = dict(batch, video=jnp.stack([batch["video"], other], axis=1))
    each = [losses(dict(batch, video=v), method)[0] for v in (batch["video"], other)]
    value, found = losses(views, method)
    np.testing.assert_allclose(value, np.mean(each), rtol=1e-5)
    assert losses(views)[1].keys() == losses(batch)[1].keys() and len(found) == 1


@pytest.mark.parametrize(
    "wrong, told",
    [
        (dict(mask="frames"), "method.mask='frames'"),
        (dict(weights=dict(vtx=1.0)), "no loss 'vtx'"),
        (dict(contrast_text="none"), "method.contrast_text"),
        (dict(size="XL"), "no size 'XL'"),
    ],
)
def test_wrong_recipes_are_reported(wrong, told):
    with pytest.raises(UserError, match=told):
        build(**wrong)
