"""Laws of recognition on any method. Agreement with the
official fine-tuned nets is tested in tests/methods/test_videomae_golden.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import fill
from vtp_jax import tree
from vtp_jax.methods import simvtp, videomae
from vtp_jax.objectives.classification import accuracy, cross_entropy, soft_cross_entropy
from vtp_jax.run import optim
from vtp_jax.run.step import make_step
from vtp_jax.tasks import classify
from vtp_jax.types import State, UserError

KEY = jax.random.key(0)
STEP = jnp.zeros((), jnp.int32)
EXTRA = {"base": {}}
NET = dict(size=(32, 2, 2, 64), decoder=(16, 1, 1, 32), cube=(2, 8, 8), dtype="float32")
UNUSED = ["decoder.*", "encoder_to_decoder.*", "mask_token", "encoder_norm.*"]
CLASSES = 7


def example(b=4, seed=0, views=()):
    rng = np.random.default_rng(seed)
    return dict(
        video=jnp.asarray(rng.integers(0, 256, (b, *views, 4, 16, 16, 3)), jnp.uint8),
        label=jnp.asarray(rng.integers(0, CLASSES, b), jnp.int32),
        valid=jnp.ones(b, bool),
    )


# Whatever a base reads in its own loss, video and label are enough here.
BASES = dict(
    videomae=videomae.make(**NET),
    simvtp=simvtp.make(**NET, vocab_size=50, dropout=0.0),
)


def given(base="videomae", net=None, **changes):
    own = dict(classes=CLASSES, drop=UNUSED if base == "videomae" else ())
    return dict(base=net or BASES[base], **own | changes)


def build(base="videomae", net=None, **changes):
    task = classify.make(**given(base, net, **changes))
    batch = example()
    # Heads start near zero, where laws would hold trivially: all parameters are drawn.
    spec = jax.eval_shape(lambda: batch)
    params = fill(lambda key: task.init(key, spec), KEY)
    return task, jax.tree.map(jnp.asarray, params), batch


plain = functools.cache(build)


def run(task, params, batch, seed=1):
    value, out = jax.jit(task.loss)(params, EXTRA, batch, jax.random.key(seed), STEP)
    return float(value), {k: float(v.value()) for k, v in out.metrics.items()}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("pool", classify.POOLS)
def test_the_loss_is_cross_entropy_over_any_method_that_encodes_videos(base, pool):
    task, params, batch = build(base, pool=pool, drop=())
    assert set(params) == {"base", "head"} | ({"fc_norm"} if pool == "mean_norm" else set())
    found = jax.jit(task.encode["classes"])(params, EXTRA, batch)
    assert found["classes"].dtype == jnp.float32 and found["classes"].shape == (4, CLASSES)
    np.testing.assert_allclose(found["score"], jax.nn.softmax(found["classes"]), rtol=1e-6)
    value, metrics = run(task, params, batch)
    want = cross_entropy(found["classes"], batch["label"], batch["valid"]).value()
    assert value == pytest.approx(float(want), rel=1e-5) == metrics["loss_class"]
    for k in (1, 5):
        got = accuracy(found["classes"], batch["label"], batch["valid"], k).value()
        assert metrics[f"top{k}"] == pytest.approx(float(got))
    assert set(task.encode) == {*BASES[base].encode, "classes"}
    own = jax.jit(task.encode["video"])(params, EXTRA, batch)["raw"]
    theirs = jax.jit(BASES[base].encode["video"])(params["base"], {}, batch)["raw"]
    np.testing.assert_allclose(own, theirs, rtol=1e-6, atol=1e-6)


def test_a_new_head_predicts_all_classes_equally():
    task = classify.make(base=BASES["videomae"], classes=CLASSES)
    batch = example()
    params = jax.jit(lambda key: task.init(key, jax.eval_shape(lambda: batch)))(KEY)
    assert float(jnp.abs(params["head"]["kernel"]).max()) < 1e-4
    assert run(task, params, batch)[0] == pytest.approx(np.log(CLASSES), abs=0.01)


def test_dropped_parameters_are_gone_and_needed_ones_are_reported():
    task, params, batch = plain()
    assert {n.split("/")[0] for n in tree.flatten(params["base"])} == {"patch_embed", "encoder"}
    assert set(task.encode) == {"video", "classes"}
    whole, everything, _ = build(drop=())
    more = dict(everything["base"], **params["base"])
    same = jax.jit(whole.encode["classes"])(dict(params, base=more), EXTRA, batch)["classes"]
    np.testing.assert_allclose(
        jax.jit(task.encode["classes"])(params, EXTRA, batch)["classes"], same
    )
    for wrong, message in (
        (["patch_embed/bias"], "encode 'video' needs what was dropped: .*bias"),
        (["patch_embde.*"], "config.task.drop: the rule 'patch_embde.\\*' matches nothing"),
    ):
        with pytest.raises(UserError, match=message):
            build(drop=wrong)
    with pytest.raises(UserError, match="pool=embedding: encode 'video' gives no embedding"):
        build(pool="embedding")


def test_parameters_without_a_gradient_only_decay():
    """A step on video and label alone, of a net with a text part: the reason for `drop`."""
    task, params, batch = build("simvtp")
    adam = optim.make(params, rules=[(".*", {})], lr=lambda _: jnp.float32(0.1), weight_decay=0.5)
    state = State(STEP, params, adam.init(params), EXTRA)
    new, numbers = jax.jit(make_step(task, adam, 0))(state, batch)
    assert numbers["skipped"].total == 0
    before, after = (tree.flatten(x["base"]) for x in (params, new.params))
    shrunk = {k for k, x in after.items() if np.allclose(x, 0.95 * before[k], rtol=1e-5, atol=0)}
    assert {k.split("/")[0] for k in after.keys() - shrunk} == {"patch_embed", "encoder"}
    assert {"text_embed/word", "text_cls/kernel", "encoder_norm/scale"} <= shrunk


def test_parameters_of_the_published_classifier():
    base = videomae.make(size="B")
    task = classify.make(base=base, classes=400, drop=UNUSED)
    spec = dict(
        video=jax.ShapeDtypeStruct((2, 16, 224, 224, 3), jnp.uint8),
        label=jax.ShapeDtypeStruct((2,), jnp.int32),
    )
    shapes = jax.eval_shape(lambda key: task.init(key, spec), KEY)
    # The encoder without its norm (86,225,664), fc_norm (1,536) and 768 x 400 + 400.
    assert tree.size(shapes) == 86_225_664 + 1_536 + 307_600


CHANGES = dict(smoothing=0.1, flip=0.5, erase=0.5, mixup=0.8, cutmix=1.0, dropout=0.3)


@functools.cache
def augmenting():
    """((loss, out), gradients) of a batch, with everything that is random."""
    net = videomae.make(**NET, drop_path=0.2)
    task, params, _ = build(net=net, **CHANGES)
    grad = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    return lambda batch: grad(params, EXTRA, batch, KEY, STEP)


@pytest.mark.parametrize("views", [(), (2,)])
@pytest.mark.parametrize("bad", ["not valid", "without a class"])
def test_the_content_of_an_invalid_row_changes_nothing(bad, views):
    good, other = example(views=views), example(seed=7, views=views)
    there = jnp.array([True, True, False, True])
    label = jnp.where(there, good["label"], -1 if bad == "without a class" else 3)
    good |= dict(label=label, valid=there if bad == "not valid" else good["valid"])
    row = there.reshape(-1, *[1] * (good["video"].ndim - 1))
    mixed = good | dict(video=jnp.where(row, good["video"], other["video"]))
    if bad == "not valid":
        mixed["label"] = jnp.where(there, good["label"], 5)
    ((a, out), grads), ((b, out2), grads2) = map(augmenting(), (good, mixed))
    assert a == b and out.metrics["loss_class"].count == 3 * (views or (1,))[0]
    for x, y in zip(*map(jax.tree.leaves, (grads, grads2)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert jax.tree.leaves(out.metrics) == jax.tree.leaves(out2.metrics)


def test_views_are_rows():
    task, params, _ = plain()
    views = example(views=(3,))
    rows = dict(
        video=views["video"].reshape(12, *views["video"].shape[2:]),
        label=jnp.repeat(views["label"], 3),
        valid=jnp.ones(12, bool),
    )
    a, b = run(task, params, views), run(task, params, rows)
    assert a[0] == pytest.approx(b[0], rel=1e-5)


def over_keys(f):
    """f(key) for five keys, of which the last is the first."""
    keys = jax.random.split(KEY, 4)
    return np.asarray(jax.jit(jax.vmap(f))(keys[jnp.array([0, 1, 2, 3, 0])]))


@pytest.mark.parametrize("name", ["smoothing", "flip", "erase", "mixup", "cutmix"])
def test_every_augmentation_acts_and_is_determined_by_the_key(name):
    recipe, still = (classify.build(**given(**task))[1] for task in ({name: CHANGES[name]}, {}))
    batch = example()

    def total(key, recipe=recipe):
        video, target = classify.augmented(recipe, key, batch)
        place = jnp.arange(video[0].size).reshape(video[0].shape)  # a flip moves no sum
        return (video * place).mean() + jnp.square(target).sum()

    found = over_keys(total)
    assert (
        found[0] == found[-1]
        and (found != jax.jit(functools.partial(total, recipe=still))(KEY)).any()
    )
    assert np.unique(found).size > 1 or name == "smoothing"


@pytest.mark.parametrize("net", [dict(drop_path=0.5), {}])
def test_dropout_and_drop_path_act_in_training_alone(net):
    task, params, batch = build(net=videomae.make(**NET, **net), dropout=0.0 if net else 0.5)
    found = over_keys(lambda key: task.loss(params, EXTRA, batch, key, STEP)[0])
    assert found[0] == found[-1] and np.unique(found).size == 4
    encode = jax.jit(task.encode["classes"])
    still, other = (encode(params, EXTRA, batch, *key)["classes"] for key in ((), (KEY,)))
    assert (still == encode(params, EXTRA, batch)["classes"]).all() and (still != other).any()


def test_the_loss_is_that_of_the_mixed_targets():
    task, params, batch = build(mixup=0.8, smoothing=0.1)
    _, recipe = classify.build(**given(mixup=0.8, smoothing=0.1))
    augment_key, _ = jax.random.split(jax.random.key(1))
    video, target = jax.jit(lambda key: classify.augmented(recipe, key, batch))(augment_key)
    logits = jax.jit(task.encode["classes"])(params, EXTRA, batch | dict(video=video))["classes"]
    want = soft_cross_entropy(logits, target, batch["valid"]).value()
    assert run(task, params, batch)[0] == pytest.approx(float(want), rel=1e-5)
    np.testing.assert_allclose(target.sum(axis=1), 1, rtol=1e-5)


def test_a_head_may_predict_a_subset_of_its_classes():
    """As in V2, from K710 to K400: the picked rows of the head train, the others do not move."""
    pick = (5, 0, 2)
    task, params, batch = build(pick=pick)
    whole, _, _ = plain()
    some = jax.jit(task.encode["classes"])(params, EXTRA, batch)["classes"]
    every = jax.jit(whole.encode["classes"])(params, EXTRA, batch)["classes"]
    assert (some == every[:, jnp.array(pick)]).all()
    batch = batch | dict(label=batch["label"] % 3)
    grads = jax.jit(jax.grad(lambda p: task.loss(p, EXTRA, batch, KEY, STEP)[0]))(params)
    used = np.flatnonzero(np.any(np.asarray(grads["head"]["kernel"]) != 0, axis=0))
    assert used.tolist() == sorted(pick)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(pool="max"), "config.task.pool='max'; known: mean_norm, embedding"),
        (dict(labels=9), "config.task has 7 classes; the data's labels go up to 8"),
        (dict(pick=(0, 7)), "config.task.pick: 7 is none of the head's 7 classes"),
        (dict(pick=(0, 1), labels=3), "config.task has 2 classes"),
    ],
)
def test_wrong_recipes_are_reported(wrong, message):
    with pytest.raises(UserError, match=message):
        build(**wrong)


def test_a_method_that_encodes_no_video_is_rejected():
    base = BASES["videomae"]._replace(encode={})
    with pytest.raises(UserError, match=r"needs a method that has encode\['video'\]"):
        build(net=base)
