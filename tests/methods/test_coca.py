"""What CoCa's paper promises of its loss, encoders and captions, on the net of the laws' case.
test_coca_golden.py compares numbers with OpenCLIP's."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import fill
from tests.methods.cases import CASES
from tests.methods.laws import ROWS, WORDS, shapes
from vtp_jax import tree
from vtp_jax.methods import coca
from vtp_jax.nn import pool
from vtp_jax.nn.bind import bind
from vtp_jax.nn.text import causal
from vtp_jax.objectives import terms
from vtp_jax.types import UserError

KEY, STEP = jax.random.key(0), jnp.zeros((), jnp.int32)
CASE = CASES["coca"]
BATCH = CASE.batch()
SEP, LENGTH = WORDS["sep_id"], CASE.cfg["length"]


def make(**changes):
    """With the paper's weights, which the laws' case changes."""
    return CASE.build(**{"weights": None, **changes})


def build(**changes):
    return coca.build(**CASE.arguments(**{"weights": None, **changes}))


METHOD = make()
SEE = {frames: jax.jit(make(frames=frames).encode["video"]) for frames in ("joint", "mean")}


@functools.cache
def drawn():
    """Parameters for all of the methods below: no change of the recipe changes a shape."""
    params = fill(lambda key: METHOD.init(key, shapes(BATCH)), KEY)
    # With a head as flat as drawn, the best caption has no word.
    text = {**params["text"], "head": {"kernel": 4 * params["text"]["head"]["kernel"]}}
    return {**params, "text": text, "logit_scale": np.float32(np.log(1 / 0.07))}


@jax.jit
def step(params, batch):
    """(outputs, metrics, loss), without gradients."""
    net, recipe = build()
    out = coca.forward(net, params, batch)
    found = coca.compare(recipe, out, batch)
    means = {name: mean.value() for name, mean in found.items()}
    summed = coca.compare(build(sum_words=True)[1], out, batch)["loss_caption"]
    return out, {**means, "summed": summed.value()}, terms.total(found, recipe.weights)


def look(params, batch):
    return step(params, batch)[0]


def parameters(size):
    spec = dict(
        video=jax.ShapeDtypeStruct((2, 1, 288, 288, 3), np.uint8),
        text=jax.ShapeDtypeStruct((2, 64), np.int32),
    )
    return jax.eval_shape(lambda key: coca.make(size=size).init(key, spec), KEY)


@pytest.mark.parametrize("size, text, image", [("B", 297, 86), ("L", 484, 303), ("g", 1180, 1011)])
def test_parameters_of_the_published_models(size, text, image):
    """Table 1, in millions; some more here for a norm or a projection (below 1 %)."""
    params = parameters(size)
    assert tree.size(params["text"]) / 1e6 == pytest.approx(text, rel=0.01)
    assert tree.size(params["visual"]) / 1e6 == pytest.approx(image, rel=0.01)


def test_the_scale_starts_at_the_papers_temperature():
    start = jax.jit(lambda key: METHOD.init(key, shapes(BATCH))["logit_scale"])(KEY)
    assert float(start) == pytest.approx(np.log(1 / 0.07))


def test_the_loss_is_contrast_both_ways_and_twice_the_captions():
    out, found, value = step(drawn(), BATCH)
    np.testing.assert_allclose(value, found["loss_contrast"] + 2 * found["loss_caption"], rtol=1e-6)
    video, text = (np.asarray(x, np.float64) for x in (out.video, out.text))
    video, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (video, text))
    logits = video @ text.T / 0.07
    both = [np.diag(x) - np.log(np.exp(x).sum(axis=1)) for x in (logits, logits.T)]
    np.testing.assert_allclose(found["loss_contrast"], -np.sum(both) / ROWS, rtol=1e-4)
    log_p = np.asarray(jax.nn.log_softmax(out.logits), np.float64)
    where = zip(*np.nonzero(BATCH["text_mask"]), strict=True)
    told = [log_p[i, j - 1, BATCH["text"][i, j]] for i, j in where if j]
    np.testing.assert_allclose(found["loss_caption"], -np.mean(told), rtol=1e-5)
    np.testing.assert_allclose(found["summed"], -np.sum(told) / ROWS, rtol=1e-5)


def test_a_single_valid_row_has_captions_and_no_contrast():
    _, found, _ = step(drawn(), {**BATCH, "valid": np.arange(ROWS) == 1})
    assert found["loss_contrast"] == 0 and found["loss_caption"] > 0


def test_a_word_changes_the_logits_after_it_and_the_texts_embedding():
    row = np.argmax(BATCH["text_mask"].sum(axis=1))
    rest = np.arange(ROWS) != row
    assert BATCH["text_mask"][row, :5].all()
    a = look(drawn(), BATCH)
    for place in (1, 4):
        other = BATCH["text"].copy()
        other[row, place] = 29 if other[row, place] != 29 else 28
        b = look(drawn(), {**BATCH, "text": other})
        same = (a.logits == b.logits).all(axis=-1)
        assert same[row, :place].all() and not same[row, place:].any() and same[rest].all()
        assert not (a.text[row] == b.text[row]).any() and (a.text == b.text)[rest].all()
        assert (a.video == b.video).all()


def test_pixels_change_the_caption_logits_and_no_text_embedding():
    a, b = (look(drawn(), x) for x in (BATCH, {**BATCH, "video": CASE.batch(seed=3)["video"]}))
    assert (a.text == b.text).all()
    assert not (a.logits == b.logits).any() and not (a.video == b.video).any()


@pytest.mark.slow(reason="compiles at two lengths")
def test_longer_padding_changes_no_loss_and_no_embedding():
    longer = {k: jnp.pad(v, ((0, 0), (0, 1))) if k[:4] == "text" else v for k, v in BATCH.items()}
    (a, found, _), (b, others, _) = (step(drawn(), x) for x in (BATCH, longer))
    np.testing.assert_allclose(a.text, b.text, rtol=1e-5, atol=1e-6)
    for name, mean in found.items():
        np.testing.assert_allclose(mean, others[name], rtol=1e-5, err_msg=name)


@pytest.mark.slow(reason="compiles two gradients")
def test_a_loss_without_weight_is_not_computed_and_has_no_gradient():
    one = [make(weights={off: 0.0}) for off in ("caption", "contrast")]

    @jax.jit
    def run(params, batch):
        def loss(params, method):
            value, out = method.loss(params, {}, batch, KEY, STEP)
            return value, out.metrics

        return [jax.grad(loss, has_aux=True)(params, method) for method in one]

    (contrast, found), (caption, others) = run(drawn(), BATCH)
    assert set(found) == {"loss_contrast", "scale"}
    assert set(others) == {"loss_caption", "word_accuracy"}
    names = tree.flatten(drawn()).keys()
    untold = {k for k in names if re.match(r"text/(upper|norm|memory_norm|head)/", k)}
    unasked = r"contrast_pool/|video_proj/|text/(class_|proj)|logit_scale"
    unasked = {k for k in names if re.match(unasked, k)}
    for grads, silent in ((contrast, untold), (caption, unasked)):
        still = {k for k, g in tree.flatten(grads).items() if not jnp.any(g != 0)}
        assert still == silent and silent


def test_contrast_pools_the_caption_tokens_unless_poolers_are_parallel():
    pooler = drawn()["caption_pool"]
    silent = {**pooler["cross"], "proj": jax.tree.map(jnp.zeros_like, pooler["cross"]["proj"])}
    params = {**drawn(), "caption_pool": {**pooler, "cross": silent}}
    found = SEE["joint"](params, {}, BATCH)
    cascade, tokens = found["embedding"], found["tokens"]
    net, _ = build(poolers="parallel")
    _, parallel = jax.jit(lambda params, x: bind(net, params).pool(x, 2))(params, tokens)
    assert jnp.abs(cascade - cascade[0]).max() < 1e-6 < jnp.abs(parallel[1:] - parallel[0]).min()


@pytest.mark.parametrize("frames", SEE)
def test_a_still_is_an_image_and_frames_have_no_order(frames):
    """Of one frame, poolers see the same jointly and separately."""
    video = BATCH["video"]
    image, still = video[:, :1], np.repeat(video[:, :1], 2, axis=1)
    some = np.isin(np.arange(ROWS), (1, 2))
    mixed = np.where(some[:, None, None, None, None], still, video)
    a = SEE["joint"](drawn(), {}, {**BATCH, "video": image})
    b, c, d, e = (
        SEE[frames](drawn(), {}, {**BATCH, "video": x})
        for x in (still, video, video[:, ::-1], mixed)
    )
    assert a["tokens"].shape[1] == 4 and b["tokens"].shape[1] == 8
    for name in ("embedding", "memory"):
        assert a[name].shape == b[name].shape  # as many tokens to attend to, whatever is shown
        pairs = ((a[name], b[name]), (c[name], d[name]))
        rows = ((e[name][some], b[name][some]), (e[name][~some], c[name][~some]))
        for x, y in (*pairs, *rows):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_clip_embeddings_are_means_over_frames_only_where_asked():
    one = [{**BATCH, "video": BATCH["video"][:, i : i + 1]} for i in range(2)]
    mean = sum(SEE["joint"](drawn(), {}, x)["embedding"] for x in one) / 2
    for frames, same in (("mean", True), ("joint", False)):
        whole = SEE[frames](drawn(), {}, BATCH)["embedding"]
        assert np.allclose(whole, mean, rtol=1e-4, atol=1e-5) == same


@jax.jit
def without_cache(params, memory, ids, n):
    """log p "b v" of the word after the first n, by a pass over all of them."""
    net, _ = build()
    text = bind(net, params).text
    words, _ = text.read(ids, jnp.ones(ids.shape, bool))
    logits = text.predict(words, memory, causal(ids.shape[1]))
    return jax.nn.log_softmax(logits[:, n - 1])


def test_beam_scores_are_those_of_their_words_without_a_cache():
    """Greedy captions: test_coca_golden.py."""
    write = jax.jit(make(beams=4, penalty=0.0).encode["generate"])
    said, memory = write(drawn(), {}, BATCH), SEE["joint"](drawn(), {}, BATCH)["memory"]
    ids = np.asarray(said["ids"])
    assert len({tuple(row) for row in ids.tolist()}) > 1  # the pixels decide
    ends = (ids == SEP).any(axis=1)
    count = np.where(ends, np.argmax(ids == SEP, axis=1), LENGTH - 1)
    total = np.zeros(ROWS)
    for n in range(1, LENGTH):
        log_p = np.asarray(without_cache(drawn(), memory, ids, n))[np.arange(ROWS), ids[:, n]]
        total += np.where(n <= count, log_p, 0)
    np.testing.assert_allclose(said["score"], total, rtol=1e-4)
    turned = write(drawn(), {}, {k: v[::-1] for k, v in BATCH.items()})
    assert turned["ids"][::-1].tolist() == ids.tolist()


def test_pooled_tokens_do_not_depend_on_the_order_of_what_they_attend_to():
    net, x = pool.AttentionPool(3, 16, 2), jax.random.normal(KEY, (2, 6, 24))
    params, run = fill(net.init, KEY, x), jax.jit(net.apply)
    out, mask = run(params, x), jnp.arange(6) < jnp.array([[4], [6]])
    assert out.shape == (2, 3, 16)
    np.testing.assert_allclose(run(params, x[:, ::-1]), out, atol=1e-5)
    masked, other = (run(params, y, mask) for y in (x, x.at[0, 4:].set(9.0)))
    np.testing.assert_allclose(masked, other, atol=1e-6)
    np.testing.assert_allclose(masked[1], out[1], atol=1e-6)
    assert not np.allclose(masked[0], out[0], atol=1e-3)


def test_the_scale_stays_below_100():
    params, _ = METHOD.after_update({**drawn(), "logit_scale": jnp.float32(9.0)}, {}, STEP)
    assert float(jnp.exp(params["logit_scale"])) == pytest.approx(100)
    assert METHOD.after_update(drawn(), {}, STEP)[0]["logit_scale"] == drawn()["logit_scale"]


@pytest.mark.parametrize(
    "wrong, told",
    [
        (dict(poolers="none"), "method.poolers='none'"),
        (dict(frames="all"), "method.frames='all'"),
        (dict(weights=dict(match=1.0)), "no loss 'match'"),
        (dict(side=30), "does not divide into patches of 8"),
        (dict(beams=0), "method.beams=0"),
        (dict(text_size="XL"), "method.text_size: no size 'XL'"),
    ],
)
def test_wrong_recipes_are_reported(wrong, told):
    with pytest.raises(UserError, match=told):
        make(**wrong)


def test_texts_that_are_too_long_are_rejected():
    longer = {k: jnp.pad(v, ((0, 0), (0, 3))) if k[:4] == "text" else v for k, v in BATCH.items()}
    with pytest.raises(UserError, match="texts of 11 tokens; the table has 10 positions"):
        jax.eval_shape(METHOD.loss, drawn(), {}, longer, KEY, STEP)
