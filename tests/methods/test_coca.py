"""Laws of CoCa's loss, encoders and captions. test_coca_golden.py compares numbers with
OpenCLIP's."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax import tree
from vtp_jax.methods import coca
from vtp_jax.nn import pool
from vtp_jax.nn.bind import bind
from vtp_jax.nn.text import causal
from vtp_jax.types import UserError

KEY, STEP = jax.random.key(0), jnp.zeros((), jnp.int32)
CLS, SEP, PAD = 2, 3, 0
SMALL = dict(
    size=(32, 1, 2, 48), text_size=(32, 1, 2, 48), side=16, patch=8, queries=5, length=9,
    vocab_size=30, cls_id=CLS, sep_id=SEP, pad_id=PAD, dtype="float32",
)  # fmt: skip


def example(b=4, frames=2, length=8, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.array([length, length - 2, 5, 4])[np.arange(b) % 4, None]
    place = np.arange(length)
    text = np.where(place == lengths - 1, SEP, rng.integers(4, 30, (b, length)))
    text = np.where(place < lengths, np.where(place == 0, CLS, text), PAD)
    return dict(
        video=jnp.asarray(rng.integers(0, 256, (b, frames, 16, 16, 3)), jnp.uint8),
        text=jnp.asarray(text, jnp.int32),
        text_mask=jnp.asarray(place < lengths),
        valid=jnp.ones(b, bool),
    )


def spec_of(batch):
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}


def build(**changes):
    return coca.build(**{**SMALL, **changes})


def make(**changes):
    return coca.make(**{**SMALL, **changes})


@functools.cache
def drawn():
    """Parameters for all of the methods below: no change of the recipe changes a shape."""
    params = jax.jit(lambda key: METHOD.init(key, spec_of(example())))(KEY)
    # Class token, positions and word tables start small: at this size they must matter.
    names = ("word", "position", "class_token")
    text = {**params["text"], **{k: 20 * params["text"][k] for k in names}}
    return {**params, "text": text}


METHOD = make()
SEE = {frames: jax.jit(make(frames=frames).encode["video"]) for frames in ("joint", "mean")}
WRITE = jax.jit(METHOD.encode["generate"])


@jax.jit
def look(params, batch):
    return coca.forward(build()[0], params, batch)


@jax.jit
def grade(params, batch):
    """((loss, metrics), gradients)."""

    def loss(p):
        value, out = METHOD.loss(p, {}, batch, KEY, STEP)
        return value, {k: v.value() for k, v in out.metrics.items()}

    return jax.value_and_grad(loss, has_aux=True)(params)


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


def test_the_loss_is_contrast_both_ways_and_twice_the_captions():
    batch = example()
    (value, found), _ = grade(drawn(), batch)
    np.testing.assert_allclose(value, found["loss_contrast"] + 2 * found["loss_caption"], rtol=1e-6)
    out = look(drawn(), batch)
    video, text = (np.asarray(x, np.float64) for x in (out.video, out.text))
    video, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (video, text))
    logits = video @ text.T / 0.07
    both = [np.diag(x) - np.log(np.exp(x).sum(axis=1)) for x in (logits, logits.T)]
    np.testing.assert_allclose(found["loss_contrast"], -np.sum(both) / 4, rtol=1e-4)
    log_p = np.asarray(jax.nn.log_softmax(out.logits), np.float64)
    ids, mask = np.asarray(batch["text"]), np.asarray(batch["text_mask"])
    told = [log_p[i, j - 1, ids[i, j]] for i, j in zip(*np.nonzero(mask), strict=True) if j]
    np.testing.assert_allclose(found["loss_caption"], -np.mean(told), rtol=1e-5)

    summed = coca.compare(build(sum_words=True)[1], out, batch)["loss_caption"]
    np.testing.assert_allclose(summed.value(), -np.sum(told) / 4, rtol=1e-5)


def test_a_word_changes_the_logits_after_it_and_the_texts_embedding():
    batch = example()
    a = look(drawn(), batch)
    for place in (1, 4):
        other = batch["text"].at[0, place].set(29)
        b = look(drawn(), {**batch, "text": other})
        same = (a.logits == b.logits).all(axis=-1)
        assert same[0, :place].all() and not same[0, place:7].any() and same[1:].all()
        assert not (a.text[0] == b.text[0]).any() and (a.text[1:] == b.text[1:]).all()
        assert (a.video == b.video).all()


def test_pixels_change_the_caption_logits_and_no_text_embedding():
    a, b = look(drawn(), example()), look(drawn(), {**example(), "video": example(seed=3)["video"]})
    assert (a.text == b.text).all()
    assert not (a.logits == b.logits).any() and not (a.video == b.video).any()


@pytest.mark.slow(reason="compiles at two lengths")
def test_longer_padding_changes_no_loss_and_no_embedding():
    batch = example()
    longer = {k: jnp.pad(v, ((0, 0), (0, 1))) if k[:4] == "text" else v for k, v in batch.items()}
    a, b = (look(drawn(), x) for x in (batch, longer))
    np.testing.assert_allclose(a.text, b.text, rtol=1e-5, atol=1e-6)
    _, recipe = build()
    for name, mean in coca.compare(recipe, a, batch).items():
        other = coca.compare(recipe, b, longer)[name]
        np.testing.assert_allclose(mean.value(), other.value(), rtol=1e-5, err_msg=name)


def test_the_content_of_an_invalid_row_changes_nothing():
    valid = jnp.array([True, False, True, False])
    good, other = example(), example(seed=7)
    row = {k: valid.reshape(-1, *[1] * (v.ndim - 1)) for k, v in good.items()}
    mixed = {k: jnp.where(row[k], good[k], other[k]) for k in good}
    empty = {k: jnp.where(row[k], good[k], jnp.zeros_like(good[k])) for k in good}
    found = grade(drawn(), {**good, "valid": valid})
    for batch in (mixed, empty):
        again = grade(drawn(), {**batch, "valid": valid})
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, again
        )
    (_, alone), _ = grade(drawn(), {**good, "valid": jnp.arange(4) == 1})
    assert alone["loss_contrast"] == 0 and alone["loss_caption"] > 0


@pytest.mark.slow(reason="compiles two gradients")
def test_a_loss_without_weight_is_not_computed_and_has_no_gradient():
    one = [make(weights={off: 0.0}) for off in ("caption", "contrast")]

    @jax.jit
    def run(params, batch):
        def loss(params, method):
            value, out = method.loss(params, {}, batch, KEY, STEP)
            return value, out.metrics

        return [jax.grad(loss, has_aux=True)(params, method) for method in one]

    (contrast, found), (caption, others) = run(drawn(), example())
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
    cascade = SEE["joint"](params, {}, example())["embedding"]
    parallel = jax.jit(make(poolers="parallel").encode["video"])(params, {}, example())["embedding"]
    assert jnp.abs(cascade - cascade[0]).max() < 1e-6 < jnp.abs(parallel[1:] - parallel[0]).min()


@pytest.mark.parametrize("frames", SEE)
def test_a_still_is_an_image_and_frames_have_no_order(frames):
    image, clip = example(frames=1), example(frames=2)
    still = {**image, "video": jnp.repeat(image["video"], 2, axis=1)}
    back = {**clip, "video": clip["video"][:, ::-1]}
    mixed = {**clip, "video": clip["video"].at[1:3].set(still["video"][1:3])}
    a, b, c, d, e = (SEE[frames](drawn(), {}, x) for x in (image, still, clip, back, mixed))
    assert a["tokens"].shape[1] == 4 and b["tokens"].shape[1] == 8
    for name in ("embedding", "memory"):
        assert a[name].shape == b[name].shape  # 5 tokens to attend to, whatever is shown
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(c[name], d[name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(e[name][1:3], b[name][1:3], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(e[name][::3], c[name][::3], rtol=1e-4, atol=1e-5)


def test_clip_embeddings_are_means_over_frames_only_where_asked():
    clip = example(frames=2)
    one = [{**clip, "video": clip["video"][:, i : i + 1]} for i in range(2)]
    for frames, same in (("mean", True), ("joint", False)):
        mean = sum(SEE[frames](drawn(), {}, x)["embedding"] for x in one) / 2
        whole = SEE[frames](drawn(), {}, clip)["embedding"]
        assert np.allclose(whole, mean, rtol=1e-4, atol=1e-5) == same


@jax.jit
def without_cache(memory, ids, n):
    """log p "b v" of the word after the first n, by a pass over all of them."""
    net, _ = build()
    text = bind(net, drawn()).text
    words, _ = text.read(ids, jnp.ones(ids.shape, bool))
    logits = text.tell(words, memory, causal(ids.shape[1]))
    return jax.nn.log_softmax(logits[:, n - 1])


def test_greedy_captions_are_those_of_passes_without_a_cache():
    batch, length = example(frames=2), SMALL["length"]
    said = WRITE(drawn(), {}, batch)
    memory = SEE["joint"](drawn(), {}, batch)["memory"]
    ids = jnp.full((4, length), PAD, jnp.int32).at[:, 0].set(CLS)
    score, done = jnp.zeros(4), jnp.zeros(4, bool)
    for n in range(1, length):
        log_p = without_cache(memory, ids, n)
        token = jnp.where(done, PAD, jnp.argmax(log_p, axis=1))
        score += jnp.where(done, 0, log_p.max(axis=1))
        ids, done = ids.at[:, n].set(token), done | (token == SEP)
    assert said["ids"].tolist() == ids.tolist() and said["ids"].dtype == jnp.int32
    np.testing.assert_allclose(said["score"], score, rtol=1e-4)
    assert len({tuple(row) for row in ids.tolist()}) > 1  # the pixels decide


def test_beam_scores_are_those_of_their_words_and_at_least_the_greedy_ones():
    batch = example(frames=2)
    memory = SEE["joint"](drawn(), {}, batch)["memory"]
    greedy = WRITE(drawn(), {}, batch)
    write = jax.jit(make(beams=4, penalty=0.0).encode["generate"])
    said = write(drawn(), {}, batch)
    ids = said["ids"]
    ends = (ids == SEP).any(axis=1)
    count = jnp.where(ends, jnp.argmax(ids == SEP, axis=1), SMALL["length"] - 1)
    total = jnp.zeros(4)
    for n in range(1, SMALL["length"]):
        log_p = jnp.take_along_axis(without_cache(memory, ids, n), ids[:, n : n + 1], axis=1)[:, 0]
        total += jnp.where(n <= count, log_p, 0)
    np.testing.assert_allclose(said["score"], total, rtol=1e-4)
    assert (said["score"] >= greedy["score"] - 1e-4).all()
    turned = write(drawn(), {}, {k: v[::-1] for k, v in batch.items()})
    assert turned["ids"][::-1].tolist() == ids.tolist()


def test_pooled_tokens_do_not_depend_on_the_order_of_what_they_attend_to():
    net, x = pool.AttentionPool(3, 16, 2), jax.random.normal(KEY, (2, 6, 24))
    params, run = jax.jit(net.init)(KEY, x), jax.jit(net.apply)
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
    with pytest.raises(UserError, match="texts of 10 tokens; the table has 9 positions"):
        jax.eval_shape(METHOD.loss, drawn(), {}, example(length=10), KEY, STEP)
