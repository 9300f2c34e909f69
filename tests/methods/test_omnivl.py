"""OmniVL's laws, on images and clips. Agreement with BLIP's code is tested in
test_omnivl_golden.py, that of clips with TimeSformer's in tests/nn/test_divided.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import fill
from vtp_jax import tree
from vtp_jax.methods import omnivl
from vtp_jax.nn import bind, blip
from vtp_jax.types import UserError

KEY = jax.random.key(0)
STEP = jnp.ones((), jnp.int32)
TIME = r"visual/(time_position|video_patch_embed/.*|encoder/blocks/(time_\w+|norm_time)/.*)"
SMALL = dict(
    size=(16, 1, 2, 24), text_size=(16, 1, 2, 24), features=8, picture=16, frames=4, cube=(2, 8, 8),
    queue=12, dropout=0.0, dtype="float32", vocab_size=20, text_length=8, cls_id=2, sep_id=3,
    momentum=0.9, alpha=dict(kind="linear", start=0.0, end=0.8, steps=2), length=6,
)  # fmt: skip
LOSSES = [f"loss_{name}" for name in omnivl.WEIGHTS]


def example(b=4, frames=4, seed=0, label=(-1, -1, -1, -1)):
    rng, length = np.random.default_rng(seed), 6
    mask = np.arange(length) < np.array([6, 5, 3, 4])[np.arange(b) % 4][:, None]
    text = np.where(mask, rng.integers(5, 20, (b, length)), 0)
    text[:, 0] = 2
    return dict(
        video=jnp.asarray(rng.integers(0, 256, (b, frames, 16, 16, 3)), jnp.uint8),
        text=jnp.asarray(text, jnp.int32),
        text_mask=jnp.asarray(mask),
        valid=jnp.ones(b, bool),
        id=jnp.arange(b, dtype=jnp.int32) + 10 * seed,
        label=jnp.asarray(label, jnp.int32),
    )


class Made:
    """A method with its state at step 0 and its functions compiled once for all tests."""

    def __init__(self, **changes):
        self.method = omnivl.make(**{**SMALL, **changes})
        spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in example().items()}
        # The time branch starts at zero, and laws must hold for a trained net: all is drawn.
        drawn = fill(lambda key: self.method.init(key, spec), KEY)
        self.params = {**drawn, "temperature": np.float32(0.07)}
        self.extra = jax.jit(lambda p: self.method.start(KEY, spec, p))(self.params)
        self.compiled = jax.jit(self.method.loss)
        self.encode = {name: jax.jit(verb) for name, verb in self.method.encode.items()}

    def loss(self, batch, extra=None):
        return self.compiled(self.params, extra or self.extra, batch, KEY, STEP)


@pytest.fixture(scope="module")
def made():
    return Made()


@pytest.fixture(scope="module")
def filled(made):
    """The extra after two batches, so that the queues hold something."""
    extra = made.loss(example(seed=1))[1].extra
    return made.loss(example(seed=2), extra)[1].extra


@pytest.mark.slow(reason="compiles two gradients")
def test_an_image_uses_no_parameter_of_clips(made):
    grad = jax.jit(jax.grad(made.method.loss, has_aux=True))
    image, clip = (grad(made.params, made.extra, example(frames=n), KEY, STEP)[0] for n in (1, 4))
    flat = tree.flatten(image), tree.flatten(clip)
    names = tree.flatten(tree.match([(TIME, True), (".*", False)], image))
    for name, of_time in names.items():
        if of_time:
            assert not jnp.any(flat[0][name]) and jnp.any(flat[1][name]), name
    only_images = "visual/patch_embed/kernel"
    assert jnp.any(flat[0][only_images]) and not jnp.any(flat[1][only_images])


def test_a_clip_has_a_token_for_each_cube_and_the_order_of_its_frames_matters(made):
    batch = example()
    seen = made.encode["video"](made.params, {}, batch)
    assert seen["tokens"].shape == (4, 1 + 2 * 4, 16)
    turned = {**batch, "video": batch["video"][:, ::-1]}
    again = made.encode["video"](made.params, {}, turned)
    assert jnp.abs(again["embedding"] - seen["embedding"]).max() > 1e-3


def test_without_time_the_frames_of_a_still_clip_are_its_image(made):
    """With the time branch at zero, the frames of a still clip have the tokens of its image."""
    visual = dict(made.params["visual"])
    blocks = {**visual["encoder"]["blocks"]}
    blocks["time_fc"] = jax.tree.map(jnp.zeros_like, blocks["time_fc"])
    inflated = jnp.repeat(visual["patch_embed"]["kernel"], 2, axis=0) / 2
    visual.update(
        encoder=dict(blocks=blocks),
        time_position=jnp.zeros_like(visual["time_position"]),
        video_patch_embed=dict(kernel=inflated, bias=visual["patch_embed"]["bias"]),
    )
    params = {**made.params, "visual": visual}
    image = example(frames=1)
    clip = {**image, "video": jnp.repeat(image["video"], 4, axis=1)}
    one, four = (made.encode["video"](params, {}, batch)["tokens"] for batch in (image, clip))
    np.testing.assert_allclose(four[:, 0], one[:, 0], atol=1e-5)
    np.testing.assert_allclose(four[:, 1:5], one[:, 1:], atol=1e-5)


def test_an_invalid_row_enters_the_queues_as_not_real(made, filled):
    batch = {**example(), "valid": jnp.array([True, True, False, True])}
    assert made.loss(batch, filled)[1].extra["queue"]["real"].sum() == 8 + 3


def test_rows_of_one_class_are_positives_and_never_wrong_pairs(made, filled):
    """Distinct labels change names only; shared ones change contrast and matching."""
    without = {k: v for k, v in example().items() if k != "label"}
    assert (omnivl.names(without) == omnivl.names(example())).all()
    plain, own, shared = (
        made.loss(example(label=label), filled) for label in ([-1] * 4, [5, 6, 7, 8], [5, 5, 7, 8])
    )
    found = [
        {k: float(m.value()) for k, m in one[1].metrics.items()} for one in (plain, own, shared)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0]["loss_contrast"] != pytest.approx(found[2]["loss_contrast"], rel=1e-6)
    alone = made.loss(example(label=[5, 5, 5, 5]), filled)[1].metrics
    assert alone["loss_match"].count == 0 and alone["loss_contrast"].count == 4


def test_a_row_whose_name_is_in_the_queue_finds_its_pair_there(made, filled):
    names = filled["queue"]["name"]
    assert names[:8].tolist() == [-11, -12, -13, -14, -21, -22, -23, -24]
    again = {**example(), "id": jnp.arange(4, dtype=jnp.int32) + 10}
    fresh = made.loss(example(), filled)[1].metrics["loss_contrast"]
    assert made.loss(again, filled)[1].metrics["loss_contrast"] != fresh
    # The order of a queue does not matter.
    mixed = {k: v if k == "next" else v[::-1] for k, v in filled["queue"].items()}
    turned = made.loss(again, {**filled, "queue": mixed})[1].metrics["loss_contrast"].value()
    np.testing.assert_allclose(
        turned, made.loss(again, filled)[1].metrics["loss_contrast"].value(), rtol=1e-5
    )


@pytest.fixture(scope="module")
def dropping():
    """A loss with dropout, in groups of two rows: each is the other's only possible wrong pair."""
    return jax.jit(omnivl.make(**{**SMALL, "dropout": 0.3, "groups": 2}).loss)


def test_each_pass_drops_with_the_steps_key_and_the_twin_drops_nothing(made, filled, dropping):
    one, again, other = (
        dropping(made.params, filled, example(), jax.random.key(seed), STEP)[1]
        for seed in (0, 0, 1)
    )
    for name in LOSSES:
        a, b, c = (out.metrics[name].value() for out in (one, again, other))
        assert a == b and abs(a - c) > 1e-3, name
    whole = made.loss(example(), filled)[1].extra["queue"]
    for out in (one, other):
        for kind in ("video", "text"):
            np.testing.assert_allclose(out.extra["queue"][kind], whole[kind], rtol=1e-5, atol=1e-6)


def test_the_twins_share_of_the_targets_is_that_of_the_step(made, filled):
    args = made.params, filled, example(), KEY
    first, later = (made.compiled(*args, jnp.int32(step))[1].metrics for step in (0, 1))
    assert abs(first["loss_contrast"].value() - later["loss_contrast"].value()) > 1e-3
    assert first["loss_words"] == later["loss_words"]


def test_the_twin_follows_its_rule(made):
    params, update = jax.tree.map(lambda x: x + 1.0, made.params), jax.jit(made.method.after_update)
    moved, extra = update(params, made.extra, STEP)
    for given, held in ((1.0, 0.5), (0.3, 0.3), (1e-4, 1e-3)):  # BLIP's bounds
        at = {**params, "temperature": jnp.float32(given)}
        assert update(at, made.extra, STEP)[0]["temperature"] == jnp.float32(held)
    assert moved["temperature"] == 0.5
    for name, leaf in tree.flatten(extra["twin"]).items():
        old = tree.flatten(made.params)[name]
        np.testing.assert_allclose(leaf, 0.9 * old + 0.1 * (old + 1), rtol=1e-5, atol=1e-6)
    assert not any("cross" in n or "head" in n for n in tree.flatten(extra["twin"]))


def test_the_caption_decoder_attends_to_no_later_word_and_the_matcher_does(made):
    net, _ = omnivl.build(**SMALL)
    seen = made.encode["video"](made.params, {}, example())["memory"]
    ids = example()["text"]
    changed = ids.at[:, 4].set(19)

    @jax.jit
    def run(params, ids):
        full = jnp.ones(ids.shape, bool)
        write = bind.bind(net, blip.writing(params)).write(ids, full, seen)
        return write, bind.bind(net, params).fuse(ids, full, seen)

    (write, fuse), (write2, fuse2) = (run(made.params, x) for x in (ids, changed))
    np.testing.assert_allclose(write[:, :4], write2[:, :4], atol=1e-5)
    assert jnp.abs(write[:, 4:] - write2[:, 4:]).max() > 1e-3
    assert jnp.abs(fuse[:, 0] - fuse2[:, 0]).max() > 1e-4


def test_pairs_are_scored_row_by_row_and_captions_are_generated(made):
    batch, order = example(), jnp.array([2, 0, 3, 1])
    said = [made.encode[kind](made.params, {}, batch) for kind in ("video", "text")]
    score = made.encode["pair"](made.params, {}, *said)["score"]
    mixed = [jax.tree.map(lambda x: x[order], one) for one in said]
    np.testing.assert_allclose(
        made.encode["pair"](made.params, {}, *mixed)["score"], score[order], atol=1e-5
    )
    other = made.encode["pair"](made.params, {}, said[0], mixed[1])["score"]
    assert jnp.abs(other - score).max() > 1e-4
    write = made.encode["generate"]
    ids = write(made.params, {}, dict(video=batch["video"]))["ids"]  # no text is given
    assert ids.shape == (4, 6) and (ids[:, 0] == 2).all() and (ids < 20).all()
    among = example(seed=7)["video"].at[1].set(batch["video"][1])
    again = write(made.params, {}, dict(video=among))["ids"]
    np.testing.assert_array_equal(again[1], ids[1])
    _, recipe = omnivl.build(**{**SMALL, "length": 30})
    assert recipe.length == 8  # the position table has no more rows


def test_parameters_of_the_base_model():
    """BLIP's base (its published 224 M without the momentum half), attention over time (ViT-B x 12
    x 4 d^2 and its last layer), and the embedding of cubes."""
    method = omnivl.make(dtype="float32")
    spec = dict(
        video=jax.ShapeDtypeStruct((2, 8, 224, 224, 3), np.uint8),
        text=jax.ShapeDtypeStruct((2, 30), np.int32),
    )
    flat = tree.flatten(jax.eval_shape(lambda key: method.init(key, spec), KEY))
    time = sum(v.size for k, v in flat.items() if "time" in k or "video_patch" in k)
    d = 768
    assert time == 12 * (5 * d * d + 5 * d + 2 * d) + 4 * d + (2 * 16 * 16 * 3 * d + d)
    image = sum(v.size for v in flat.values()) - time
    encoder = 85_798_656  # ViT-B/16 without a head
    words, block = (30522 + 2 + 512 + 2) * d + 2 * d, 12 * d * d + 13 * d
    cross = 4 * d * d + 6 * d
    own = 4 * d * d + 6 * d  # the causal decoder's self-attention
    heads = 2 * (d * 256 + 256) + 2 * d + 2 + (d * d + 3 * d + 30524) + 1
    assert image == encoder + words + 12 * (block + cross + own) + heads


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(weights=dict(itm=1.0)), "no loss 'itm'; known: contrast, match, words"),
        (dict(frames=2), "method.frames=2: a clip needs at least 2 cubes of 2 frames"),
        (dict(alpha=dict(kind="lineal")), "method.alpha: kind='lineal'"),
    ],
)
def test_mistakes_are_reported_in_one_line(wrong, message):
    with pytest.raises(UserError) as error:
        omnivl.make(**{**SMALL, **wrong})
    assert message in str(error.value) and "\n" not in str(error.value)
