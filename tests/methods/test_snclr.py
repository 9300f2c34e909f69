"""Laws of SNCLR's loss and of what it carries from step to step. test_snclr_golden.py compares
numbers with the official code."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import hlo
from tests.arrays import fill
from tests.configs import ROOT
from vtp_jax import tree
from vtp_jax.methods import snclr
from vtp_jax.objectives import contrastive
from vtp_jax.run import sharding
from vtp_jax.run.checkpoint import Checkpoints
from vtp_jax.run.step import make_step
from vtp_jax.setup import build, config
from vtp_jax.types import UserError

KEY, STEP = jax.random.key(0), jnp.zeros((), jnp.int32)
B, PLACES, K = 6, 16, 3
STILL = dict(jittered=0.0, grey=0.0, blur=0.0, solarise=0.0, flip=0.0)
SMALL = dict(
    size=(32, 1, 2, 32), cube=(2, 8, 8), hidden=24, features=12, neighbours=K, queue=PLACES,
    momentum=0.75, dtype="float32", first=STILL, second=STILL,
)  # fmt: skip
TINY = "configs/snclr/pretrain_imagenet.py:tiny"


def example(seed=0, views=(2,)):
    shape = (B, *views, 2, 16, 16, 3)
    video = np.random.default_rng(seed).integers(0, 256, shape)
    return dict(video=jnp.asarray(video, jnp.uint8), valid=jnp.ones(B, bool))


def make(**changes):
    return snclr.make(**{**SMALL, **changes})


METHOD, SPEC = make(), jax.eval_shape(example)
START = jax.jit(lambda params: METHOD.start(KEY, SPEC, params))


@functools.cache
def drawn():
    return jax.tree.map(jnp.asarray, fill(lambda key: METHOD.init(key, SPEC), KEY))


@functools.cache
def started():
    """The extra of `drawn`'s step 0."""
    return START(drawn())


def gradients(method):
    """((loss, out), gradients of (parameters, their average))."""

    def loss(params, twin, extra, batch, rng):
        return method.loss(params, {**extra, "twin": twin}, batch, rng, STEP)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


STEP_OF = gradients(METHOD)


def run(batch, extra=None, seed=1, step=STEP_OF):
    extra = extra or started()
    (value, out), (grads, _) = step(drawn(), extra["twin"], extra, batch, jax.random.key(seed))
    return float(value), out, grads


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_parameters_of_the_published_model():
    spec = dict(video=jax.ShapeDtypeStruct((2, 1, 224, 224, 3), np.uint8))
    flat = tree.flatten(jax.eval_shape(lambda key: snclr.make().init(key, spec), KEY))
    heads = {"projector": 19_415_040, "predictor": 2_105_344}
    for name, size in heads.items():
        assert tree.size({k: v for k, v in flat.items() if k.startswith(name)}) == size
    # timm's ViT-S/16 without a classifier has 21,665,664; 197 x 384 of them are fixed positions.
    assert tree.size(flat) == 21_665_664 - 197 * 384 + sum(heads.values())


def test_it_starts_as_moco_v3():
    """By Xavier's rule: q, k and v separately, the embedding of cubes, which stays as it is drawn,
    and the other matrices of the encoder. The heads start as PyTorch's."""
    flat = tree.flatten(jax.jit(lambda key: METHOD.init(key, SPEC))(KEY))
    cube, d = 2 * 8 * 8 * 3, 32
    bounds = {"patch_embed/kernel": 6 / (cube + d), "encoder/blocks/attn/qkv": 6 / (d + d)}
    bounds |= {"encoder/blocks/attn/proj/kernel": 6 / (d + d)}
    bounds |= {f"encoder/blocks/mlp/fc{i}/kernel": 6 / (d + d) for i in (1, 2)}
    bounds |= {k: 1 / x.shape[0] for k, x in flat.items() if re.match(r"pr.*or/fc.*kernel", k)}
    for name, squared in bounds.items():
        x, bound = np.asarray(flat.pop(name)), squared**0.5
        assert 0.97 * bound < np.abs(x).max() <= 1.0001 * bound, name
        np.testing.assert_allclose(x.std(), bound / 3**0.5, rtol=0.06, err_msg=name)  # uniform
    token = np.asarray(flat.pop("class_token"))
    assert 0.5e-6 < token.std() < 2e-6 and np.abs(token).max() < 5e-6
    for name, x in flat.items():  # the rest
        assert (x == name.endswith("scale")).all(), name


def test_without_neighbours_it_is_moco_v3():
    method, rng = make(neighbours=0), jax.random.key(1)
    batch, (net, recipe) = example(), snclr.build(**{**SMALL, "neighbours": 0})

    @jax.jit
    def look(video, where):
        views, query, key = snclr.draw_views(recipe, rng, video), [], []
        online, average = (net.bind({"params": p}) for p in (drawn(), started()["twin"]))
        for view in views:
            query.append(online(view, where))
            key.append(average.project(view, where))
        return query, key

    value, out = jax.jit(method.loss)(drawn(), started(), batch, rng, STEP)
    query, key = look(batch["video"], batch["valid"])
    pairs = (query[0], key[1]), (query[1], key[0])
    expected = [
        contrastive.info_nce(q, k, batch["valid"], temperature=0.2).value() for q, k in pairs
    ]
    np.testing.assert_allclose(value, 2 * 0.2 * sum(expected), rtol=1e-5)
    assert out.metrics["loss_contrast"].value() == value
    close(out.extra["queue"]["key"][:B], contrastive.normalise(key[1]))


def test_the_second_views_keys_enter_the_queue_after_the_loss_has_read_it():
    _, out, _ = run(example())
    past, new = started()["queue"], out.extra["queue"]
    assert new["next"] == B and new["real"].all()
    equal(new["key"][B:], past["key"][B:])
    assert not np.allclose(new["key"][:B], past["key"][:B])
    np.testing.assert_allclose(np.linalg.norm(new["key"], axis=1), 1, rtol=1e-5)
    # The loss reads the places before they are written: while not real, they add no neighbours.
    empty = {**past, "real": past["real"].at[:B].set(False)}
    moved = {**empty, "key": past["key"].at[:B].set(new["key"][:B])}
    close(
        run(example(), {**started(), "queue": moved})[0],
        run(example(), {**started(), "queue": empty})[0],
    )
    assert run(example())[0] != run(example(), {**started(), "queue": empty})[0]


def test_the_average_starts_as_a_copy_follows_its_rule_and_has_no_gradient():
    other = jax.tree.map(lambda p: p + 1, drawn())
    extra = START(other)  # as after a warm start
    assert extra["twin"].keys() == drawn().keys() - {"predictor"}
    equal(extra["twin"], {k: other[k] for k in extra["twin"]})
    params, moved = METHOD.after_update(drawn(), extra, STEP)
    equal(params, drawn())
    equal(moved["queue"], extra["queue"])
    close(moved["twin"], {k: jax.tree.map(lambda p: p + 0.75, drawn()[k]) for k in extra["twin"]})

    _, (_, zeros) = STEP_OF(drawn(), started()["twin"], started(), example(), KEY)
    assert all(not g.any() for g in jax.tree.leaves(zeros))


def test_momentum_is_that_of_the_step_that_uses_it():
    method = make(momentum=dict(kind="linear", start=0.0, end=1.0, steps=2))
    extra = {**started(), "twin": jax.tree.map(jnp.zeros_like, started()["twin"])}
    _, moved = method.after_update(drawn(), extra, jnp.int32(0))
    close(moved["twin"], {k: jax.tree.map(lambda p: p / 2, drawn()[k]) for k in extra["twin"]})


def test_an_invalid_row_enters_the_queue_as_not_real():
    valid = jnp.array([True, True, False, True, False, True])
    equal(run({**example(), "valid": valid})[1].extra["queue"]["real"][:B], valid)


def test_a_single_row_adds_no_real_key():
    """Batch norm makes zeros of it, which have no direction: keys in the queue have length one."""
    for alone in (True, False):
        valid = jnp.arange(B) < (1 if alone else 2)
        value, out, grads = run({**example(), "valid": valid})
        queue = out.extra["queue"]
        assert queue["real"][:B].sum() == (0 if alone else 2) and queue["next"] == B
        lengths = np.linalg.norm(queue["key"], axis=1)[np.asarray(queue["real"])]
        np.testing.assert_allclose(lengths, 1, rtol=1e-5)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, grads)))


def test_views_are_drawn_with_the_key_also_of_a_single_clip():
    recipe, clip = (
        snclr.build(**{**SMALL, "first": {}, "second": {}})[1],
        example(views=())["video"],
    )

    @jax.jit
    def draw(key):
        pair = jnp.stack([clip, clip], axis=1)
        return [snclr.draw_views(recipe, key, video) for video in (clip, pair)]

    (one, two), pair = draw(KEY)
    equal([one, two], list(pair))
    assert one.shape == clip.shape and one.dtype == jnp.float32 and 0 <= one.min() < one.max() <= 1
    other = draw(jax.random.key(1))[0][0]
    assert all((one[i] != x[i]).any() for x in (two, other) for i in range(B))


def test_weights_have_a_gradient_unless_detached():
    value, _, attached = run(example())
    same, _, grads = run(example(), step=gradients(make(detach_weights=True)))
    np.testing.assert_allclose(same, value, rtol=1e-6)
    a, b = (g["projector"]["fc3"]["kernel"] for g in (attached, grads))
    assert np.abs(a - b).max() > 1e-6


def test_groups_have_separate_queues_and_weights_may_be_inside_the_logarithm():
    method = make(groups=2, weighted="inside")
    extra = jax.jit(lambda params: method.start(KEY, SPEC, params))(drawn())
    past = extra["queue"]
    assert past["key"].shape == (2 * PLACES, 12)
    value, out = jax.jit(method.loss)(drawn(), extra, example(), KEY, STEP)
    assert value < 0.7 * run(example())[0]  # one logarithm for each row, not two
    written = np.flatnonzero((out.extra["queue"]["key"] != past["key"]).any(axis=1))
    assert written.tolist() == [0, 1, 2, PLACES, PLACES + 1, PLACES + 2]


def test_the_embedding_is_the_class_token_of_each_row_alone():
    encode = jax.jit(METHOD.encode["video"])
    batch = example(views=())
    found = encode(drawn(), started(), batch)
    assert found["embedding"].dtype == jnp.float32 and found["tokens"].shape == (B, 1 + 4, 32)
    equal(found["embedding"], found["tokens"][:, 0])
    other = {**batch, "video": batch["video"].at[1:].set(0)}
    close(encode(drawn(), started(), other)["embedding"][0], found["embedding"][0])


def test_a_net_in_fp64_has_an_embedding_in_fp64():
    with jax.enable_x64(True):
        method = make(dtype="float64")
        batch = example(views=())
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), drawn())
        found = jax.eval_shape(method.encode["video"], params, {}, batch)
    assert found["embedding"].dtype == found["tokens"].dtype == jnp.float64


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(neighbours=17), "neighbours=17 is more than the queue's 16 places"),
        (dict(weighted="both"), "weighted='both'; known: outside, inside"),
        (dict(second=dict(blurr=1.0)), "method.second: unknown key 'blurr'"),
    ],
)
def test_mistakes_are_reported_in_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_three_views_are_an_error():
    with pytest.raises(UserError, match="takes two views of a clip, not 3"):
        METHOD.loss(drawn(), started(), example(views=(3,)), KEY, STEP)


# The whole step, on eight devices.


@pytest.fixture(scope="module")
def trained():
    """A small run: its shapes where they are to be, its first batches, and its compiled step."""
    cfg = config.load(str(ROOT / TINY))
    cfg.method.update(queue=8192, dtype="float32", size=(32, 1, 2, 32), hidden=32)
    data = build.data(cfg.data, batch=cfg.batch, seed=0)
    method = build.method(cfg, data.facts)
    start, optimizer = build.start(method, cfg.optim, data.spec, 0)
    mesh, shapes = sharding.make_mesh(data=8), jax.eval_shape(start)
    placed = sharding.state_shardings(shapes, mesh, cfg.sharding)
    batches = [sharding.put(x, mesh) for x, _ in zip(data.batches(0), range(4), strict=False)]
    with sharding.activate(mesh):
        state = jax.jit(start, out_shardings=placed)()
        step = jax.jit(make_step(method, optimizer, 0), out_shardings=(placed, None))
        compiled = step.lower(state, batches[0]).compile()
    return sharding.with_shardings(shapes, placed), state, batches, compiled


def test_no_device_ever_holds_the_queue_whole(trained):
    shapes, _, _, compiled = trained
    assert shapes.extra["queue"]["key"].sharding.spec[0] == ("data", "fsdp")
    assert hlo.most_moved(compiled.as_text()) < 8192 * 32 / 8


def test_a_restored_state_continues_as_the_saved_one(trained, tmp_path):
    shapes, state, batches, compiled = trained
    with Checkpoints(str(tmp_path), config={}, every=1) as saved:
        for i, batch in enumerate(batches):
            if i == 2:
                saved.save(2, state)
            state, _ = compiled(state, batch)
    with Checkpoints(str(tmp_path), config={}, every=1) as saved:
        again = saved.restore_latest(shapes)
    for batch in batches[2:]:
        again, _ = compiled(again, batch)
    equal(again, state)
    assert int(again.extra["queue"]["next"]) == 4 * len(batches[0]["valid"])
