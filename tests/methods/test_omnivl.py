"""OmniVL's laws, on images and clips. Agreement with BLIP's code is tested in
test_omnivl_golden.py, that of clips with TimeSformer's in tests/nn/test_divided.py."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from tests.methods import cases
from tests.methods.laws import LENGTH, ROWS, WORDS, close, draws
from vtp_jax import tree
from vtp_jax.methods import omnivl
from vtp_jax.nn import bind, blip
from vtp_jax.types import UserError

CASE, STEP = cases.CASES["omnivl"], jnp.int32(1)
TIME = r"visual/(time_position|video_patch_embed/.*|encoder/blocks/(time_\w+|norm_time)/.*)"


def example(seed=0, label=(-1,) * ROWS, **changes):
    """Clips without classes: each row's name is its own."""
    return {**CASE.batch(seed), "label": np.array(label, np.int32), **changes}


@pytest.fixture(scope="module")
def made():
    return cases.made("omnivl")


@pytest.fixture(scope="module")
def filled(made):
    """The extra after two batches, which fill the queues."""
    return made.step(example(seed=2), extra=made.step(example(seed=1)).extra).extra


def test_clips_use_no_parameter_of_images_and_all_that_only_they_use(made):
    """That images use none of clips is tested with BLIP's numbers."""
    grads = made.step(example()).grads
    of_time = tree.split(grads, lambda name: re.fullmatch(TIME, name) is not None)[0]
    assert all(np.any(x) for x in jax.tree.leaves(of_time)) and len(tree.flatten(of_time)) > 8
    assert not any(np.any(x) for x in grads["visual"]["patch_embed"].values())


def test_a_clip_has_a_token_for_each_cube_and_the_order_of_its_frames_matters(made):
    batch = example()
    seen, turned = (
        made.encode({**batch, "video": video})["video"]
        for video in (batch["video"], batch["video"][:, ::-1])
    )
    assert seen["tokens"].shape == (ROWS, 1 + 2 * 4, 16)
    assert np.abs(turned["embedding"] - seen["embedding"]).max() > 1e-3


def test_without_time_the_frames_of_a_still_clip_are_its_image(made):
    """With the time branch at zero, the frames of a still clip have the tokens of its image."""
    visual = made.params["visual"]
    blocks = {**visual["encoder"]["blocks"]}
    blocks["time_fc"] = jax.tree.map(jnp.zeros_like, blocks["time_fc"])
    inflated = jnp.repeat(visual["patch_embed"]["kernel"], 2, axis=0) / 2
    still = dict(
        encoder=dict(blocks=blocks),
        time_position=jnp.zeros_like(visual["time_position"]),
        video_patch_embed=dict(kernel=inflated, bias=visual["patch_embed"]["bias"]),
    )
    params = {**made.params, "visual": {**visual, **still}}
    image = dict(video=example()["video"][:, :1])
    clip = example(video=np.repeat(image["video"], 4, axis=1))
    one = jax.jit(made.method.encode["video"])(params, {}, image)["tokens"]
    four = made.encoders(params, made.extra, clip)["video"]["tokens"]
    np.testing.assert_allclose(four[:, 0], one[:, 0], atol=1e-5)
    np.testing.assert_allclose(four[:, 1:5], one[:, 1:], atol=1e-5)


def test_an_invalid_row_enters_the_queues_as_not_real(made):
    valid = np.arange(ROWS) != 2
    after = made.step(example(valid=valid), extra=made.extra).extra["queue"]
    np.testing.assert_array_equal(after["real"], [True] * ROWS + valid.tolist())


def test_rows_of_one_class_are_positives_and_never_wrong_pairs(made, filled):
    """Distinct labels change names only; shared ones change contrast and matching."""

    def metrics(*label):
        found = made.step(example(label=label), extra=filled).out.metrics
        return {name: float(mean.value()) for name, mean in found.items()}, found["loss_match"]

    ids = jax.tree.map(jnp.asarray, {k: example()[k] for k in ("id", "label")})
    assert (omnivl.identities({"id": ids["id"]}) == omnivl.identities(ids)).all()
    (plain, _), (own, _) = metrics(*[-1] * ROWS), metrics(*range(5, 5 + ROWS))
    assert plain == pytest.approx(own, rel=1e-6)
    shared, _ = metrics(5, 5, 7, 8, 9, 10, 11, 12)
    assert shared["loss_contrast"] != pytest.approx(own["loss_contrast"], rel=1e-6)
    # A group of one class has no wrong pairs; its rows count in contrast nevertheless.
    assert metrics(*[5] * ROWS)[1].count == 0
    assert metrics(*[5] * 4, *[6, 7, 8, 9])[1].count == 3 * 4
    assert metrics(*[5] * ROWS)[0]["loss_contrast"] > 0


def test_a_row_whose_name_is_in_the_queue_finds_its_pair_there(made, filled):
    names = filled["queue"]["name"]
    assert set(names.tolist()) == {-1 - i for i in range(ROWS, 3 * ROWS)}

    def contrast(ids, queue):
        extra = {**filled, "queue": {**filled["queue"], **queue}}
        batch = example(id=np.int32(ids))
        return made.step(batch, extra=extra).out.metrics["loss_contrast"].value()

    again = contrast(range(ROWS, 2 * ROWS), {})
    assert again != contrast(range(ROWS), {})
    # The order of a queue does not matter.
    mixed = {k: v[::-1] for k, v in filled["queue"].items() if k != "next"}
    np.testing.assert_allclose(contrast(range(ROWS, 2 * ROWS), mixed), again, rtol=1e-5)


def test_each_pass_drops_and_the_twin_drops_nothing(made):
    """By the number of draws that each term of the loss depends on."""
    loss = jax.make_jaxpr(CASE.build(dropout=0.3).loss, return_shape=True)
    program, (_, out) = loss(made.params, made.extra, made.spec, made.key, STEP)
    names = ["loss", *tree.flatten((out.metrics, out.extra))]

    def draws_of(asked):
        used = [re.search(asked, name) is not None for name in names]
        assert any(used), asked
        return draws(partial_eval.dce_jaxpr(program.jaxpr, used)[0])

    contrast, match, words = (draws_of(f"loss_{name}") for name in omnivl.WEIGHTS)
    assert contrast > 0 and words > 0
    assert match > contrast + 2  # contrast chooses the wrong pairs, with two draws
    assert draws_of("queue") == 0


def test_the_twins_share_of_the_targets_is_that_of_the_step(made, filled):
    first, later = (made.step(example(), extra=filled, step=step).out.metrics for step in (0, 1))
    assert abs(first["loss_contrast"].value() - later["loss_contrast"].value()) > 1e-3
    assert first["loss_words"] == later["loss_words"]


def test_the_twin_follows_its_rule_and_the_temperature_stays_in_its_bounds(made):
    found, old = jax.device_get((made.step(example()), tree.flatten(made.extra["twin"])))
    new = tree.flatten(found.params)
    close(found.extra["twin"], {name: 0.8 * x + 0.2 * new[name] for name, x in old.items()})
    assert not any("cross" in n or "head" in n for n in old)
    for given, held in ((1.0, 0.5), (0.3, 0.3), (1e-4, 1e-3)):  # BLIP's bounds
        moved, _ = made.method.after_update(
            dict(temperature=jnp.float32(given)), dict(twin={}), STEP
        )
        assert moved["temperature"] == jnp.float32(held)


def test_the_caption_decoder_attends_to_no_later_word_and_the_matcher_does(made):
    net, _ = omnivl.build(**CASE.arguments())
    batch = example()
    seen, ids = made.encode(batch)["video"]["memory"], jnp.asarray(batch["text"])

    @jax.jit
    def run(params, ids):
        full = jnp.ones(ids.shape, bool)
        write = bind.bind(net, blip.writing(params)).write(ids, full, seen)
        return write, bind.bind(net, params).fuse(ids, full, seen)

    (write, fuse), (write2, fuse2) = (run(made.params, x) for x in (ids, ids.at[:, 4].set(19)))
    np.testing.assert_allclose(write[:, :4], write2[:, :4], atol=1e-5)
    assert jnp.abs(write[:, 4:] - write2[:, 4:]).max() > 1e-3
    assert jnp.abs(fuse[:, 0] - fuse2[:, 0]).max() > 1e-4


def test_pairs_are_scored_row_by_row_and_captions_are_generated(made):
    batch, order = example(), np.array([2, 0, 3, 1, 7, 5, 4, 6])
    said = made.encode(batch)
    mixed = jax.tree.map(lambda x: x[order], said)
    pair = jax.jit(lambda *said: made.method.encode["pair"](made.params, {}, *said)["score"])
    score = pair(said["video"], said["text"])
    np.testing.assert_allclose(pair(mixed["video"], mixed["text"]), score[order], atol=1e-5)
    assert np.abs(pair(said["video"], mixed["text"]) - score).max() > 1e-4
    write = jax.jit(made.method.encode["generate"])
    ids = write(made.params, {}, dict(video=batch["video"]))["ids"]  # no text is given
    assert ids.shape == (ROWS, 5) and (ids[:, 0] == WORDS["cls_id"]).all()
    assert (ids < WORDS["vocab_size"]).all()
    among = np.where(
        np.arange(ROWS).reshape(-1, 1, 1, 1, 1) == 1, batch["video"], example(seed=7)["video"]
    )
    again = write(made.params, {}, dict(video=among))["ids"]
    np.testing.assert_array_equal(again[1], ids[1])
    _, recipe = omnivl.build(text_length=LENGTH, length=30)
    assert recipe.length == LENGTH  # the position table has no more rows


def test_parameters_of_the_base_model():
    """BLIP's base (its published 224 M without the momentum half), attention over time (ViT-B x 12
    x 4 d^2 and its last layer), and the embedding of cubes."""
    method = omnivl.make(dtype="float32")
    spec = dict(
        video=jax.ShapeDtypeStruct((2, 8, 224, 224, 3), np.uint8),
        text=jax.ShapeDtypeStruct((2, 30), np.int32),
    )
    flat = tree.flatten(jax.eval_shape(lambda key: method.init(key, spec), jax.random.key(0)))
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
        (dict(picture=20), "method.picture=20 does not divide into patches of 8 pixels"),
        (dict(alpha=dict(kind="lineal")), "method.alpha: kind='lineal'"),
    ],
)
def test_mistakes_are_reported_in_one_line(wrong, message):
    with pytest.raises(UserError) as error:
        CASE.build(**wrong)
    assert message in str(error.value) and "\n" not in str(error.value)
