"""Questions as a task: its laws, on SimVTP, on OmniVL and on two towers that do not fuse."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import fill
from tests.methods.laws import shapes
from tests.tasks import test_retrieve
from vtp_jax import tree
from vtp_jax.methods import omnivl, simvtp
from vtp_jax.tasks import answer
from vtp_jax.types import Method, UserError

KEY = jax.random.key(0)
STEP = jnp.zeros((), jnp.int32)
ANSWERS = 6
UNUSED = dict(
    simvtp=(r"decoder.*|encoder_to_decoder/.*|mask_token|text_cls/.*|vtm_head/.*",),
    omnivl=(r"decoder/.*|word_head/.*|match_head/.*|\w+_proj/.*|temperature",),
    plain=("unused",),
)
FUSE = dict(simvtp="pair", omnivl="pair", plain="embedding")


OMNIVL = dict(
    size=(16, 1, 2, 24), text_size=(16, 1, 2, 24), features=8, picture=16, frames=4, cube=(2, 8, 8),
    queue=12, dropout=0.0, dtype="float32", vocab_size=20, text_length=8, cls_id=2, sep_id=3,
    momentum=0.9, alpha=dict(kind="linear", start=0.0, end=0.8, steps=2), length=6,
)  # fmt: skip


def base(name, **changes) -> Method:
    if name == "plain":
        return test_retrieve.plain()
    known = dict(simvtp=(simvtp, test_retrieve.SMALL), omnivl=(omnivl, OMNIVL))
    make, small = known[name]
    return make.make(**{**small, **changes})


def example(seed=0, label=(0, 5, 3, 1)):
    """Four clips of four frames, each with a question of another length."""
    batch = test_retrieve.example(4, seed, length=6)
    ids = jnp.arange(4, dtype=jnp.int32) + 10 * seed
    return {**batch, "id": ids, "label": jnp.asarray(label, jnp.int32)}


class Made(NamedTuple):
    method: Method
    params: dict[str, Any]
    extra: Any
    grad: Any
    answer: Any


@cache
def build(name, **changes) -> Made:
    task = dict(answers=ANSWERS, fuse=FUSE[name], drop=UNUSED[name], dropout=0.0) | changes
    method = answer.make(base=base(name), **task)
    spec = shapes(example())
    params = jax.tree.map(jnp.asarray, fill(lambda key: method.init(key, spec), KEY))
    grad = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    return Made(
        method, params, method.start(KEY, spec, params), grad, jax.jit(method.encode["answer"])
    )


def run(made, batch, seed=0):
    (value, out), grads = made.grad(made.params, made.extra, batch, jax.random.key(seed), STEP)
    return float(value), out, grads


bases = pytest.mark.parametrize("name", ["simvtp", "omnivl", "plain"])


@bases
def test_the_loss_is_the_cross_entropy_over_answers_in_the_list(name):
    made, batch = build(name), example(label=(0, 5, -1, ANSWERS))
    value, out, grads = run(made, batch)
    score = made.answer(made.params, made.extra, batch)["score"]
    assert score.shape == (4, ANSWERS)
    np.testing.assert_allclose(score.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(value, -np.log(score[[0, 1], [0, 5]]).mean(), rtol=1e-5)
    assert out.metrics["top1"].count == 2
    assert all(jnp.any(g) for g in jax.tree.leaves(grads["head"]))
    assert not set(tree.flatten(made.params["base"])) & {"temperature", "mask_token", "unused"}


@bases
def test_an_answer_depends_on_the_video_and_on_the_question_of_its_row_alone(name):
    made, batch, other = build(name), example(), example(seed=3)
    other["text"] = other["text"].at[:, 0].set(3)  # which is all that `plain` reads of a text
    said = made.answer(made.params, made.extra, batch)["classes"]
    for key in ("video", "text"):
        changed = {**batch, key: batch[key].at[0].set(other[key][0])}
        again = made.answer(made.params, made.extra, changed)["classes"]
        assert jnp.abs(again[0] - said[0]).max() > 1e-6
        np.testing.assert_allclose(again[1:], said[1:], rtol=1e-4, atol=1e-6)


@bases
def test_the_content_of_an_invalid_row_changes_nothing(name):
    made, good, other = build(name), example(), example(seed=7, label=(1, 1, 1, 1))
    valid = jnp.array([True, True, False, True])
    row = {k: valid.reshape(-1, *[1] * (v.ndim - 1)) for k, v in good.items()}
    mixed = {k: jnp.where(row[k], good[k], other[k]) for k in good}
    a, b = (run(made, {**batch, "valid": valid}) for batch in (good, mixed))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    for x, y in zip(jax.tree.leaves(a[2]), jax.tree.leaves(b[2]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_training_is_random_and_answering_is_not():
    made, batch = build("plain", dropout=0.5), example()
    assert run(made, batch, 1)[0] != run(made, batch, 2)[0]
    one, two = (made.answer(made.params, made.extra, batch)["score"] for _ in range(2))
    assert (one == two).all()


def test_a_whole_net_keeps_its_verbs_and_a_cut_net_those_it_can_still_run():
    assert set(build("plain").method.encode) == {"video", "text", "answer"}
    whole = answer.make(base=base("omnivl"), answers=ANSWERS)
    assert set(whole.encode) == {"video", "text", "pair", "generate", "answer"}


@pytest.mark.parametrize(
    "name, task, message",
    [
        ("plain", dict(fuse="sum"), "fuse='sum'; known: pair, embedding"),
        ("plain", dict(fuse="pair"), "encode 'pair' gives no embedding"),
        ("plain", dict(labels=9), "answers=6; the data's labels go up to 8"),
        ("plain", dict(drop=("word",)), "needs what was dropped: 'word'"),
        ("omnivl", dict(fuse="embedding"), "encode 'video' gives no embedding"),
    ],
)
def test_mistakes_are_reported_in_one_line(name, task, message):
    with pytest.raises(UserError) as error:
        build(name, **task)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_method_without_texts_is_rejected():
    bare = base("plain")
    bare = bare._replace(encode=dict(video=bare.encode["video"]))
    with pytest.raises(UserError, match="needs a method that has encode\\['text'\\]"):
        answer.make(base=bare, answers=2, fuse="embedding")
