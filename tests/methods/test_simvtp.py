"""What SimVTP's paper and reference promise of its loss, encoders and reconstructions, on the net
of the laws' case. test_simvtp_golden.py compares numbers with the released model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import cases
from tests.methods.laws import ROWS, draws, mixed, shapes
from vtp_jax import masking, tree
from vtp_jax.methods import simvtp
from vtp_jax.nn import embed, sizes
from vtp_jax.types import UserError

KEY = jax.random.key(0)
STEP = jnp.zeros((), jnp.int32)
CASE = cases.CASES["simvtp"]
BATCH = CASE.batch()
STILL = dict(dropout=0.0)  # what is compared must not differ by another draw
NOTHING_HIDDEN = dict(video_ratio=0.0, text_ratio=0.0)


def made():
    """No change of the recipe changes a shape: all methods below have these parameters."""
    return cases.made("simvtp")


def encode(batch):
    return made().encoders(made().params, {}, batch)


def both(**changes):
    """(net, recipe) of the method that `CASE.build` gives."""
    return simvtp.build(**CASE.arguments(**{**STILL, **changes}))


def only(*names):
    """Weights without the losses that a test does not need, which are then not compiled."""
    return {name: float(name in names) for name in simvtp.WEIGHTS}


def trace(method, batch):
    """The program of a loss, and its metrics."""
    loss = jax.make_jaxpr(method.loss, return_shape=True)
    program, (_, out) = loss(made().params, {}, shapes(batch), KEY, STEP)
    return program, out.metrics


def test_parameters_of_the_published_model():
    method = simvtp.make(size="B", vocab_size=30522)
    spec = dict(
        video=jax.ShapeDtypeStruct((2, 16, 224, 224, 3), np.uint8),
        text=jax.ShapeDtypeStruct((2, 32), np.int32),
    )
    found = jax.eval_shape(lambda key: method.init(key, spec), KEY)
    assert tree.size(found) == 141_521_084
    flat = tree.flatten(found)
    text = sum(v.size for k, v in flat.items() if k.startswith("text_embed/"))
    decoder = sum(v.size for k, v in flat.items() if k.startswith("decoder"))
    assert text == 23_837_184 and decoder == 7_688_448


def test_every_size_has_a_decoder_and_heads_that_divide_its_widths():
    nets = [simvtp.build(size=name)[0] for name in sizes.ENCODERS]
    assert all(x.width % x.heads == 0 for net in nets for x in (net.encoder_size, net.decoder_size))


@functools.cache
def cells():
    """(parameters, batch) -> all of a step but matching. The decoder predicts V2's cells, and all
    words are hidden."""
    ratios = dict(video_ratio=0.75, text_ratio=1.0, decoder_ratio=0.5)
    net, recipe = both(**ratios, weights=only("video", "text", "vtc"))

    @jax.jit
    def run(params, batch):
        drawn = simvtp.draw(net, recipe, KEY, batch)
        out = simvtp.forward(net, recipe, params, batch, drawn)
        found = simvtp.compare(recipe, out, batch, drawn)
        return drawn, out, {name: mean.value() for name, mean in found.items()}

    return run


def test_hidden_pixels_and_words_reach_no_prediction():
    drawn, a, _ = cells()(made().params, BATCH)
    cube = CASE.cfg["cube"]
    cubes, grid = embed.cut(jnp.asarray(BATCH["video"]), cube), (2, 2, 2)
    noise = jnp.where(drawn.mask.dropped[..., None], 255 - cubes, cubes)
    video, words = embed.join(noise, grid, cube), jnp.where(drawn.hidden, 29, BATCH["text"])
    again, b, _ = cells()(made().params, {**BATCH, "video": video, "text": words})
    jax.tree.map(np.testing.assert_array_equal, again, drawn)
    assert (drawn.hidden == BATCH["maskable"]).all()
    assert (a.pixels == b.pixels).all() and (a.words == b.words).all()
    assert not (a.target == b.target).all() and not (a.text == b.text).all()


def test_with_running_cells_the_loss_counts_hidden_cubes_alone():
    drawn, out, found = cells()(made().params, BATCH)
    assert drawn.mask.drop.shape == (ROWS, 6) and drawn.ask.shape == (ROWS, 4)  # of 2 x 2 x 2
    scored = masking.take(drawn.mask.dropped, drawn.ask)
    assert 0 < scored.sum() < scored.size
    error = ((out.pixels - out.target) ** 2).mean(axis=-1)
    np.testing.assert_allclose(found["loss_video"], error[scored].mean(), rtol=1e-5)


@functools.cache
def quirky():
    """(parameters, batch) -> a step's metrics with every quirk of the reference, and its outputs;
    and the outputs of one that predicts no word and draws matching's right pairs again."""
    quirks = dict(contrast_text="masked", match_text="masked", pool_padding=True)
    net, recipe = both(**quirks, sum_directions=True)
    twice = recipe._replace(second_draw=True, weights=only("video", "vtc", "vtm"))

    @jax.jit
    def run(params, batch):
        drawn = simvtp.draw(net, recipe, KEY, batch)
        out = simvtp.forward(net, recipe, params, batch, drawn)
        other = simvtp.forward(net, twice, params, batch, drawn)
        return simvtp.compare(recipe, out, batch, drawn), out, other

    return run


def test_an_invalid_row_changes_nothing_with_every_quirk():
    """Gradients, and the recipe without quirks: test_laws.py."""
    valid = np.isin(np.arange(ROWS), (2, 6), invert=True)
    other = mixed(valid, BATCH, CASE.batch(seed=7))
    a, b = (quirky()(made().params, {**x, "valid": valid})[0] for x in (BATCH, other))
    assert a.keys() >= {f"loss_{name}" for name in simvtp.WEIGHTS}
    for name, mean in a.items():
        np.testing.assert_allclose(mean.value(), b[name].value(), rtol=1e-6, err_msg=name)
    assert a["match_accuracy"].count == 12  # six valid rows, right and wrong


def test_sharing_the_joint_pass_is_the_same_without_dropout_only():
    _, shared, twice = quirky()(made().params, BATCH)
    np.testing.assert_allclose(shared.match, twice.match, rtol=1e-5, atol=1e-6)
    recipe = dict(match_text="masked", weights=only("vtm"), dropout=0.5)
    once, again = (trace(CASE.build(**recipe, second_draw=x), BATCH)[0] for x in (False, True))
    assert draws(again) > draws(once)


def test_a_loss_of_weight_0_leaves_the_others():
    _, out, other = quirky()(made().params, BATCH)
    assert other.words is None
    for name in ("pixels", "target", "video", "text"):
        a, b = getattr(out, name), getattr(other, name)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow(reason="compiles a loss for each, where one forward pass shows the same of words")
@pytest.mark.parametrize("off", simvtp.WEIGHTS)
def test_a_loss_of_weight_0_leaves_the_losses_of_the_others(off):
    weights = dict.fromkeys(simvtp.WEIGHTS, 1.0)
    all_four, found = (
        jax.jit(CASE.build(**STILL, weights=w).loss)(made().params, {}, BATCH, KEY, STEP)[1].metrics
        for w in (weights, {**weights, off: 0.0})
    )
    assert all_four.keys() - found.keys() >= {f"loss_{off}"}
    for name, mean in found.items():
        np.testing.assert_allclose(mean.value(), all_four[name].value(), rtol=1e-5, err_msg=name)


def test_a_single_valid_row_has_no_contrast_and_no_matching_loss():
    found, _, _ = quirky()(made().params, {**BATCH, "valid": np.arange(ROWS) == 1})
    losses = {name: float(mean.value()) for name, mean in found.items()}
    assert losses["loss_vtm"] == 0 and losses["loss_vtc"] == 0
    assert losses["loss_video"] > 0 and np.isfinite(list(losses.values())).all()


@pytest.mark.slow(reason="compiles two gradients")
def test_chunks_of_rows_change_neither_losses_nor_gradients():
    def run(**changes):
        loss = jax.value_and_grad(CASE.build(**STILL, **changes).loss, has_aux=True)
        (value, out), grads = jax.jit(loss)(made().params, {}, BATCH, KEY, STEP)
        return value, {k: v.value() for k, v in out.metrics.items()}, grads

    whole, parts = run(), run(chunks=4, contrast_chunks=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole[:2], parts[:2])
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(whole[2]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * scale),
        whole[2], parts[2],
    )  # fmt: skip


def test_with_padding_pooled_a_texts_embedding_is_the_mean_of_all_tokens():
    found = jax.jit(CASE.build(pool_padding=True).encode["text"])(made().params, {}, BATCH)
    np.testing.assert_allclose(found["embedding"], found["tokens"].mean(axis=1), atol=1e-5)
    assert not BATCH["text_mask"].all(axis=1).any()  # every row has padding
    other = encode(BATCH)["text"]["embedding"]
    assert jnp.abs(found["embedding"] - other).max(axis=1).min() > 1e-3


def test_where_no_cube_is_hidden_contrast_and_matching_see_what_the_encoders_see():
    """They read the clean caption, though all of its words are masked for prediction. `pair` scores
    right and wrong pairs as matching does."""
    net, recipe = both(video_ratio=0.0, text_ratio=1.0, weights=only("vtc", "vtm"))

    @jax.jit
    def run(params, batch):
        drawn = simvtp.draw(net, recipe, KEY, batch)
        return drawn, simvtp.forward(net, recipe, params, batch, drawn)

    (drawn, out), seen = run(made().params, BATCH), encode(BATCH)
    for name in ("video", "text"):
        np.testing.assert_allclose(
            getattr(out, name), seen[name]["embedding"], rtol=1e-4, atol=1e-5, err_msg=name
        )
    pair = jax.jit(made().method.encode["pair"])
    wrong = jax.tree.map(lambda x: x[drawn.negative], seen["video"])
    for video, logits in ((seen["video"], out.match[:ROWS]), (wrong, out.match[ROWS:])):
        score = pair(made().params, {}, video, seen["text"])["score"]
        np.testing.assert_allclose(score, logits[:, 1] - logits[:, 0], rtol=1e-4, atol=1e-5)
    assert (drawn.negative != np.arange(ROWS)).all()


def test_reconstructions_use_no_statistics_of_hidden_cubes_unless_asked():
    reconstruct = jax.jit(made().method.encode["reconstruct"])
    a = reconstruct(made().params, {}, BATCH, KEY)
    hidden = a["hidden"][..., None]
    changed = jnp.where(hidden, 255 - BATCH["video"], BATCH["video"])
    b = reconstruct(made().params, {}, {**BATCH, "video": changed}, KEY)
    for name, same in (("visible", True), ("normalised", True), ("true", False)):
        x, y = (jnp.where(hidden, z["restored"][name], 0) for z in (a, b))
        assert bool((x == y).all()) == same
    shown = jnp.where(hidden, 0, a["restored"]["visible"] - BATCH["video"] / 255.0)
    np.testing.assert_allclose(shown, 0, atol=1e-6)
    assert float(hidden.mean()) == CASE.cfg["video_ratio"]
    asked = a["text_hidden"]
    assert asked.any() and not asked[~BATCH["maskable"]].any()
    assert (a["masked_text"] == jnp.where(asked, CASE.cfg["mask_id"], a["text"])).all()
    assert (a["predicted_text"] == a["text"])[~asked].all()


def test_what_is_restored_alone_does_not_depend_on_the_other_modality():
    reconstruct = jax.jit(CASE.build(target="pixels").encode["reconstruct"])
    one = reconstruct(made().params, {}, BATCH, KEY)
    hidden, asked = one["hidden"][..., None], np.asarray(one["text_hidden"])
    others = jnp.where(BATCH["maskable"], (BATCH["text"] + 7) % 20 + 5, BATCH["text"])
    words = reconstruct(made().params, {}, dict(BATCH, text=others), KEY)
    film = reconstruct(made().params, {}, dict(BATCH, video=255 - BATCH["video"]), KEY)
    for name, same in (("restored", False), ("restored_alone", True)):
        x, y = (jnp.where(hidden, z[name]["none"], 0) for z in (one, words))
        assert bool(jnp.array_equal(x, y)) == same
    assert (one["predicted_text_alone"] == film["predicted_text_alone"])[asked].all()
    assert (
        one["restored"]["none"] == jnp.where(hidden, one["restored"]["none"], one["video"])
    ).all()


def test_reconstructions_predict_every_hidden_cube_whatever_training_predicts():
    some = CASE.build(decoder_ratio=0.25).encode["reconstruct"]  # more places than are hidden
    shown = jax.eval_shape(some, made().params, {}, BATCH)  # without a key too
    assert shown["restored"]["visible"].shape == BATCH["video"].shape


def views():
    """Two views of each clip."""
    return dict(BATCH, video=np.stack([BATCH["video"], CASE.batch(seed=1)["video"]], axis=1))


def test_views_of_a_clip_are_rows_that_are_never_negatives_of_each_other():
    """With nothing hidden, contrast of two views is the mean of each view's own, at the paper's
    temperature. Both have the same words: in one group, no loss could be below log 2."""

    def contrast(video, text):
        video, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (video, text))
        each = np.exp(text @ video.T / 0.05)
        right = [np.diag(each) / each.sum(axis=axis) for axis in (0, 1)]
        return -np.log(right).mean()

    method = CASE.build(**STILL, **NOTHING_HIDDEN, weights=only("vtc"), groups=1)
    value, out = jax.jit(method.loss)(made().params, {}, views(), KEY, STEP)
    each = [encode({**BATCH, "video": views()["video"][:, i]}) for i in range(2)]
    told = [contrast(*(np.float64(x[k]["embedding"]) for k in ("video", "text"))) for x in each]
    np.testing.assert_allclose(value, np.mean(told), rtol=1e-4)
    assert out.metrics.keys() == {"loss_vtc"}


def test_views_and_clips_of_which_nothing_is_hidden_have_every_loss_that_is_asked_for():
    _, found = trace(made().method, views())
    assert {f"loss_{name}" for name in simvtp.WEIGHTS} < found.keys()
    _, found = trace(CASE.build(**NOTHING_HIDDEN, weights=only("vtc", "vtm")), BATCH)
    assert found.keys() == {"loss_vtc", "loss_vtm", "match_accuracy"}


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
        CASE.build(**wrong)
