"""Retrieval as a task: its laws, on a method of a few lines and on SimVTP. Agreement with the
released model is tested in test_retrieve_golden.py."""

import json
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.laws import shapes
from vtp_jax import tree
from vtp_jax.methods import simvtp
from vtp_jax.nn import embed
from vtp_jax.objectives import contrastive
from vtp_jax.tasks import retrieve
from vtp_jax.types import Method, UserError

KEY = jax.random.key(0)
STEP = jnp.zeros((), jnp.int32)
WORDS, D = 20, 6


# A method without linen whose `extra` scales its outputs.


def plain() -> Method:
    def init(rng, spec):
        a, b = jax.random.split(rng)
        pixel = jax.random.normal(a, (spec["video"].shape[-1], D))
        return dict(pixel=pixel, word=jax.random.normal(b, (WORDS, D)), unused=jnp.ones(3))

    def describe(raw, mask, extra):
        raw = raw * extra["scale"]
        return dict(raw=raw, mask=mask, tokens=raw, embedding=raw[:, 0], memory=raw)

    def video(params, extra, batch, rng=None):
        x = embed.to_unit(batch["video"])[:, :, :, 0].mean(axis=2)  # a token a frame, its left edge
        return describe(x @ params["pixel"], jnp.ones(x.shape[:2], bool), extra)

    def text(params, extra, batch, rng=None):
        return describe(params["word"][batch["text"]], batch["text_mask"], extra)

    def pair(params, extra, a, b, rng=None):
        return dict(score=(a["memory"][:, 0] * b["memory"][:, 0]).sum(-1) * extra["scale"])

    def loss(params, extra, batch, rng, step):
        raise AssertionError("a task has a loss of its own")

    return Method(
        init, loss, dict(video=video, text=text, pair=pair),
        start=lambda rng, spec, params: dict(scale=jnp.float32(2.0)),
    )  # fmt: skip


SMALL = dict(
    size=(64, 1, 1, 96), decoder=(64, 1, 1, 96), cube=(2, 8, 8), vocab_size=WORDS, pad_id=0,
    mask_id=4, dtype="float32", dropout=0.0,
)  # fmt: skip
REST = r"encoder_.*|decoder.*|mask_token|text_cls/.*|vtm_head/.*"
DROP = dict(video=[REST, "text_embed/.*"], text=[REST, "patch_embed/.*"])
BASES = dict(plain=plain, simvtp=lambda **changes: simvtp.make(**{**SMALL, **changes}))


def example(b=8, seed=0, length=7):
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < np.array([7, 5, 3, 4])[np.arange(b) % 4][:, None]
    return dict(
        video=jnp.asarray(rng.integers(0, 256, (b, 4, 16, 16, 3)), jnp.uint8),
        text=jnp.asarray(np.where(mask, rng.integers(5, WORDS, (b, length)), 0), jnp.int32),
        text_mask=jnp.asarray(mask),
        valid=jnp.ones(b, bool),
    )


class Made(NamedTuple):
    """A task with parameters and extra, and its functions compiled once for all tests."""

    method: Method
    params: dict[str, Any]
    extra: Any
    grad: Any  # (params, extra, batch, rng, step) -> ((loss, out), gradient)
    encode: dict[str, Any]


@cache
def compiled(base: str, changes: str, task: str) -> Made:
    method = retrieve.make(base=BASES[base](**json.loads(changes)), **json.loads(task))
    params = dict(jax.jit(lambda key: method.init(key, shapes(example())))(KEY))
    # Norms are drawn: those of a start would hide a swap.
    for i, name in enumerate(n for n in params if n.endswith("_norm")):
        draw = jax.random.normal(jax.random.key(i), (2, params[name]["scale"].shape[0]))
        params[name] = dict(scale=1 + 0.1 * draw[0], bias=0.1 * draw[1])
    extra = method.start(KEY, shapes(example()), params)
    grad = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    return Made(method, params, extra, grad, {k: jax.jit(f) for k, f in method.encode.items()})


def build(base="plain", changes=None, **task) -> Made:
    return compiled(base, json.dumps(changes or {}), json.dumps(task))


def names(params) -> set[str]:
    return set(tree.flatten(params))


def run(made, batch, seed=0):
    (value, out), grads = made.grad(made.params, made.extra, batch, jax.random.key(seed), STEP)
    return float(value), out, grads


def embeddings(made, batch, params=None):
    params = made.params if params is None else params
    return {k: made.encode[k](params, made.extra, batch)["embedding"] for k in retrieve.KINDS}


TASKS = {
    "two towers": dict(base="simvtp", drop=DROP),
    "one tower": dict(base="simvtp", towers="one"),
    "two plain": dict(),
    "one plain": dict(towers="one", pool="embedding"),
    "the reference": dict(
        base="simvtp", drop=DROP, pool_padding=True, sum_directions=True, groups=2
    ),
}
tasks = pytest.mark.parametrize("made", TASKS.values(), ids=TASKS)


def test_two_towers_start_equal_without_what_they_do_not_use():
    made = build("simvtp", drop=DROP)
    params = made.params
    assert set(params) == {"video", "text", "video_norm", "text_norm"}
    assert set(params["video"]) == {"encoder", "patch_embed"}
    assert set(params["text"]) == {"encoder", "text_embed"}
    both = zip(*(jax.tree.leaves(params[t]["encoder"]) for t in retrieve.KINDS), strict=True)
    assert all((a == b).all() for a, b in both)
    fresh = build().method.init(KEY, shapes(example()))
    for norm in ("video_norm", "text_norm"):
        assert (fresh[norm]["scale"] == 1).all() and (fresh[norm]["bias"] == 0).all()


def test_parameters_of_the_published_model():
    base = simvtp.make(size="B", vocab_size=30522)
    spec = shapes(example()) | dict(video=jax.ShapeDtypeStruct((2, 16, 224, 224, 3), np.uint8))
    spec = {**spec, "text": jax.ShapeDtypeStruct((2, 32), np.int32)}
    spec = {**spec, "text_mask": jax.ShapeDtypeStruct((2, 32), np.bool_)}
    method = retrieve.make(base=base, drop=DROP)
    found = jax.eval_shape(lambda key: method.init(key, spec), KEY)
    assert tree.size(found) == 195_111_168


def test_towers_are_trained_apart():
    made, batch = build("simvtp", drop=DROP), example()
    before = embeddings(made, batch)
    _, _, grads = run(made, batch)
    for tower in ("video", "text"):
        step = jax.tree.map(lambda p, g: p - g, made.params[tower], grads[tower])
        after = embeddings(made, batch, {**made.params, tower: step})
        for kind in retrieve.KINDS:
            assert (after[kind] == before[kind]).all() == (kind != tower)
    # Every weight of a tower is used, but for rows of tables that no caption reads.
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))


def test_one_tower_encodes_both_modalities():
    made = build("simvtp", towers="one")
    assert set(made.params) == {"base", "video_norm", "text_norm"}
    before = embeddings(made, example())
    encoder = jax.tree.map(lambda p: p * 1.5, made.params["base"]["encoder"])
    after = embeddings(
        made, example(), {**made.params, "base": {**made.params["base"], "encoder": encoder}}
    )
    assert all(not jnp.allclose(after[k], before[k]) for k in retrieve.KINDS)


@tasks
def test_the_loss_is_contrast_of_the_embeddings(made):
    task, made, batch = made, build(**made), example()
    value, out, _ = run(made, batch)
    found = embeddings(made, batch)
    options = dict(temperature=0.05, groups=task.get("groups", 1))
    nce = [
        contrastive.info_nce(*pair, batch["valid"], **options).value()
        for pair in ((found["text"], found["video"]), (found["video"], found["text"]))
    ]
    share = 1.0 if task.get("sum_directions") else 0.5
    np.testing.assert_allclose(value, share * sum(nce), rtol=1e-5)
    np.testing.assert_allclose(out.metrics["loss_vtc"].value(), value)


def test_pooling_is_the_mean_of_the_tokens_before_the_norm_or_the_bases_own():
    batch = example()
    base, one = plain(), build(towers="one", pool="embedding")
    assert set(one.params) == {"base"}
    own = base.encode["text"](one.params["base"], one.extra["base"], batch)
    assert (embeddings(one, batch)["text"] == own["embedding"]).all()

    made = build()
    raw = base.encode["text"](made.params["text"], made.extra["text"], batch)["raw"]
    mask = batch["text_mask"][..., None]
    x = np.float64(raw * mask).sum(1) / np.float64(mask).sum(1)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    wanted = x * made.params["text_norm"]["scale"] + made.params["text_norm"]["bias"]
    np.testing.assert_allclose(embeddings(made, batch)["text"], wanted, rtol=1e-4, atol=1e-5)


@tasks
def test_the_content_of_an_invalid_row_changes_nothing(made):
    made, good, other = build(**made), example(), example(seed=7)
    valid = jnp.array([True, True, False, True, True, False, True, True])
    row = {k: valid.reshape(-1, *[1] * (v.ndim - 1)) for k, v in good.items()}
    mixed = {k: jnp.where(row[k], good[k], other[k]) for k in good}
    value, out, grads = run(made, {**good, "valid": valid})
    value2, out2, grads2 = run(made, {**mixed, "valid": valid})
    np.testing.assert_allclose(value2, value, rtol=1e-6)
    assert not np.isclose(run(made, {**mixed, "valid": valid | True})[0], value)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads2), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pool_padding", [False, True])
def test_padding_changes_nothing_except_with_pool_padding(pool_padding):
    made = build("simvtp", drop=DROP, pool_padding=pool_padding)
    short = example()
    wider = dict(short)
    for key, fill in (("text", 9), ("text_mask", False)):  # whatever the padding contains
        wider[key] = jnp.pad(short[key], ((0, 0), (0, 4)), constant_values=fill)
    a, b = (embeddings(made, batch) for batch in (short, wider))
    np.testing.assert_array_equal(a["video"], b["video"])
    assert np.allclose(a["text"], b["text"], rtol=1e-4, atol=1e-5) != pool_padding


@tasks
def test_an_embedding_depends_on_its_own_row_alone(made):
    made, batch = build(**made), example()
    alone = embeddings(made, {k: v[1:2] for k, v in batch.items()})
    for kind, found in embeddings(made, batch).items():
        np.testing.assert_allclose(found[1:2], alone[kind], rtol=1e-4, atol=1e-5)


def test_training_is_random_and_encoding_is_not():
    made, batch = build("simvtp", dict(drop_path=0.5, dropout=0.3), drop=DROP), example()
    assert run(made, batch, seed=1)[0] != run(made, batch, seed=2)[0]
    assert run(made, batch, seed=1)[0] == run(made, batch, seed=1)[0]
    a, b = embeddings(made, batch), embeddings(made, batch)
    assert all((a[kind] == b[kind]).all() for kind in retrieve.KINDS)


def test_clips_are_flipped_and_erased_in_training_alone():
    batch, plainly = example(), build()
    for changes in (dict(flip=1.0), dict(erase=1.0)):
        made = build(**changes)
        assert run(made, batch)[0] != run(plainly, batch)[0]
        assert (embeddings(made, batch)["video"] == embeddings(plainly, batch)["video"]).all()
    batch["video"] = batch["video"][:, :, :, ::-1]
    np.testing.assert_allclose(run(build(flip=1.0), example())[0], run(plainly, batch)[0])


def test_each_of_several_views_is_its_own_group():
    made, one, other = build("simvtp", drop=DROP), example(), example(seed=3)["video"]
    both = {**one, "video": jnp.stack([one["video"], other], axis=1)}
    apart = [run(made, {**one, "video": video})[0] for video in (one["video"], other)]
    assert not np.isclose(*apart)
    np.testing.assert_allclose(run(made, both)[0], np.mean(apart), rtol=1e-5)


def test_the_parts_of_a_video_are_augmented_alike():
    _, recipe = retrieve.build(base=plain(), flip=0.5, erase=0.5)
    video = example()["video"]
    parts = {"video": video.reshape(8, 2, 2, *video.shape[2:])}
    found, whole = (retrieve.augmented(recipe, KEY, x)["video"] for x in (parts, {"video": video}))
    assert found.shape == parts["video"].shape and (found.reshape(whole.shape) == whole).all()
    assert (whole != embed.to_unit(video)).any()


def test_a_whole_net_keeps_its_other_verbs():
    made, batch = build(towers="one"), example()
    assert set(made.encode) == {"video", "text", "pair"}
    pair = [made.encode[kind](made.params, made.extra, batch) for kind in retrieve.KINDS]
    wanted = plain().encode["pair"](made.params["base"], made.extra["base"], *pair)
    found = made.encode["pair"](made.params, made.extra, *pair)
    np.testing.assert_allclose(found["score"], wanted["score"], rtol=1e-6)
    lacking = build(towers="one", drop=dict(base=["unused"]))
    assert set(lacking.encode) == set(build().encode) == {"video", "text"}
    assert names(made.params) - names(lacking.params) == {"base/unused"}


def test_the_bases_extra_is_read_and_returned():
    made = build()
    assert made.extra == dict(video=dict(scale=2.0), text=dict(scale=2.0))
    assert run(made, example())[1].extra == made.extra


@pytest.mark.parametrize(
    "task, message",
    [
        (dict(towers="three"), "towers='three'; known: one, two"),
        (dict(pool="max"), "pool='max'; known: mean_norm, embedding"),
        (dict(pool="embedding", pool_padding=True), "pool_padding is for pool=mean_norm"),
        (dict(drop=dict(base=["unused"])), "drop: no part 'base'; two towers: video, text"),
        (dict(drop=dict(text=["unusd"])), "drop.text: the rule 'unusd' matches nothing"),
        (dict(drop=dict(text=["w.*"])), "encode 'text' needs what was dropped: 'word'"),
        (dict(base="simvtp", drop=dict(video=["patch_embed/bias"])), "encode 'video' needs"),
        (
            dict(base="simvtp", drop=dict(video=["encoder_norm/.*"]), pool="embedding"),
            "encode 'video' gives no embedding",
        ),
    ],
)
def test_mistakes_are_reported_in_one_line(task, message):
    with pytest.raises(UserError) as error:
        build(**task)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_method_that_cannot_encode_text_is_rejected():
    base = plain()
    base = base._replace(encode=dict(video=base.encode["video"]))
    with pytest.raises(UserError, match="needs a method that has encode 'text'"):
        retrieve.make(base=base)


def test_a_narrower_text_net_is_rejected():
    base = plain()

    def text(*args):
        return {k: x[..., :4] for k, x in base.encode["text"](*args).items() if k == "raw"}

    made = retrieve.make(base=base._replace(encode={**base.encode, "text": text}))
    with pytest.raises(UserError, match="mean_norm: raw of 'video' 6 and 'text' 4 wide do not"):
        made.init(KEY, shapes(example()))


def test_a_batch_that_does_not_divide_into_groups_is_rejected():
    with pytest.raises(UserError, match="8 rows does not divide into groups=3"):
        run(build(groups=3), example())
