"""Laws of SNCLR's loss and of what it carries from step to step. test_snclr_golden.py compares
numbers with the official code."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import hlo
from tests.arrays import fill
from tests.methods import cases
from tests.methods.laws import ROWS, close
from vtp_jax import tree
from vtp_jax.methods import snclr
from vtp_jax.nn import bind
from vtp_jax.objectives import contrastive
from vtp_jax.run import sharding
from vtp_jax.setup import config
from vtp_jax.types import State, UserError

CASE, KEY, STEP = cases.CASES["snclr"], jax.random.key(0), jnp.int32(1)
PLACES = CASE.cfg["queue"]


@pytest.fixture(scope="module")
def made():
    return cases.made("snclr")


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_parameters_of_the_published_model():
    spec = dict(video=jax.ShapeDtypeStruct((2, 1, 224, 224, 3), np.uint8))
    flat = tree.flatten(jax.eval_shape(lambda key: snclr.make().init(key, spec), KEY))
    heads = {"projector": 19_415_040, "predictor": 2_105_344}
    for name, size in heads.items():
        assert tree.size({k: v for k, v in flat.items() if k.startswith(name)}) == size
    # timm's ViT-S/16 without a classifier has 21,665,664; 197 x 384 of them are fixed positions.
    assert tree.size(flat) == 21_665_664 - 197 * 384 + sum(heads.values())


def test_it_starts_as_moco_v3(made):
    """By Xavier's rule: q, k and v separately, the embedding of cubes, which stays as it is drawn,
    and the other matrices of the encoder. The heads start as PyTorch's."""
    method, d = CASE.build(size=(32, 1, 2, 32), hidden=24, features=12), 32
    flat = tree.flatten(jax.jit(lambda key: method.init(key, made.spec))(KEY))
    cube = 8 * 8 * 3
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


def test_the_second_views_keys_enter_the_queue_after_the_loss_has_read_it(made):
    batch, past, at = CASE.batch(), made.extra["queue"], slice(ROWS, 2 * ROWS)

    def step(**queue):
        return made.step(batch, extra={**made.extra, "queue": {**past, **queue}})

    found = step()
    new = found.extra["queue"]
    assert past["next"] == ROWS and new["next"] == 0 and new["real"].all()
    equal(new["key"][:ROWS], past["key"][:ROWS])
    assert not np.allclose(new["key"][at], past["key"][at])
    np.testing.assert_allclose(np.linalg.norm(new["key"], axis=1), 1, rtol=1e-5)
    # The loss reads the places before they are written: while not real, they add no neighbours.
    real = past["real"].at[at].set(False)
    empty = step(real=real).value
    np.testing.assert_allclose(step(real=real, key=new["key"]).value, empty, rtol=1e-5)
    assert found.value != empty


def test_the_average_starts_as_a_copy_and_follows_its_rule(made):
    other = jax.tree.map(lambda p: p + 1, made.params)  # as after a warm start
    twin = jax.jit(lambda p: made.method.start(KEY, made.spec, p)["twin"])(other)
    assert twin.keys() == other.keys() - {"predictor"}
    equal(twin, {k: other[k] for k in twin})
    for step, share in ((0, 0.25), (1, 0.5)):  # the momentum is that of the step that uses it
        found, old = jax.device_get((made.step(CASE.batch(), step=step), made.extra["twin"]))
        new = tree.flatten(found.params)
        wanted = {k: share * x + (1 - share) * new[k] for k, x in tree.flatten(old).items()}
        close(found.extra["twin"], wanted)


def test_an_invalid_row_enters_the_queue_as_not_real(made):
    valid = np.arange(ROWS) % 3 > 0
    after = made.step({**CASE.batch(), "valid": valid}).extra["queue"]
    equal(after["real"][ROWS:], valid)


def test_a_single_row_adds_no_real_key(made):
    """Batch norm makes zeros of it, which have no direction: keys in the queue have length one."""
    for valid in (1, 2):
        found = made.step({**CASE.batch(), "valid": np.arange(ROWS) < valid})
        queue = found.extra["queue"]
        assert queue["real"][ROWS:].sum() == (0 if valid == 1 else 2) and queue["next"] == 0
        lengths = np.linalg.norm(queue["key"], axis=1)[np.asarray(queue["real"])]
        np.testing.assert_allclose(lengths, 1, rtol=1e-5)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((found.value, found.grads)))


def test_views_are_drawn_with_the_key_also_of_a_single_clip():
    blurred = {**cases.FLIPPED, "blur": 1.0}
    _, recipe = snclr.build(**CASE.arguments(first=blurred, second=blurred))
    clip = jnp.asarray(CASE.batch()["video"][:, 0])

    @jax.jit
    def draw(key):
        return [snclr.draw_views(recipe, key, x) for x in (clip, jnp.stack([clip, clip], axis=1))]

    (one, two), pair = draw(KEY)
    equal([one, two], list(pair))
    assert one.shape == clip.shape and one.dtype == jnp.float32 and 0 <= one.min() < one.max() <= 1
    other = draw(jax.random.key(1))[0][0]
    assert all((one[i] != x[i]).any() for x in (two, other) for i in range(ROWS))


class Linear(snclr.SNCLR):
    """A net without an encoder: what the loss does with any net, in a fraction of the time."""

    def setup(self):
        self.projector = snclr.Head((self.features,), jnp.float32)
        self.predictor = snclr.Head((self.features,), jnp.float32)

    def project(self, video, where):
        return self.projector(video.reshape(len(video), -1), where)


class Ran(NamedTuple):
    """The loss of a linear net, and what it was given."""

    net: Linear
    recipe: snclr.Recipe
    params: Any
    extra: Any
    value: Any
    queue: Any  # after it
    grads: Any


BATCH = jax.tree.map(jnp.asarray, CASE.batch())


@functools.cache
def linear(**changes):
    still = dict.fromkeys(("first", "second"), {**cases.FLIPPED, "flip": 0.0})
    net, recipe = snclr.build(**CASE.arguments(**still, **changes))
    net = Linear(**{name: getattr(net, name) for name in snclr.SNCLR.__annotations__})
    params = fill(net.init, KEY, BATCH["video"][:, 0] / 255, BATCH["valid"])["params"]
    params = jax.tree.map(jnp.asarray, params)
    extra = snclr.start(net, recipe, KEY, {}, params)

    def loss(params, extra):
        return snclr.loss(net, recipe, params, extra, BATCH, KEY, STEP)

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, extra)
    return Ran(net, recipe, params, extra, value, out.extra["queue"], grads)


def test_without_neighbours_it_is_moco_v3():
    net, recipe, params, extra, value, queue, _ = linear(neighbours=0)
    where = BATCH["valid"]

    @jax.jit
    def moco(params, twin):
        views = snclr.draw_views(recipe, KEY, BATCH["video"])
        online, average = (bind.bind(net, p) for p in (params, twin))
        query = [online(view, where) for view in views]
        key = [average.project(view, where) for view in views]
        pairs = (query[0], key[1]), (query[1], key[0])
        losses = [contrastive.info_nce(*pair, where, temperature=0.2).value() for pair in pairs]
        return 2 * 0.2 * sum(losses), contrastive.normalise(key[1])

    wanted, key = moco(params, extra["twin"])
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    close(queue["key"][:ROWS], key)


def test_weights_have_a_gradient_unless_detached():
    attached, detached = linear(), linear(detach_weights=True)
    np.testing.assert_allclose(attached.value, detached.value, rtol=1e-6)
    a, b = (ran.grads["projector"]["fc1"]["kernel"] for ran in (attached, detached))
    assert np.abs(a - b).max() > 1e-6


def test_groups_have_separate_queues_and_weights_may_be_inside_the_logarithm():
    ran = linear(groups=2, weighted="inside")
    past = ran.extra["queue"]["key"]
    assert past.shape == (2 * PLACES, 8)
    assert ran.value < 0.7 * linear().value  # one logarithm for each row, not two
    written = np.flatnonzero((ran.queue["key"] != past).any(axis=1))
    assert written.tolist() == [0, 1, 2, 3, PLACES, PLACES + 1, PLACES + 2, PLACES + 3]


def test_the_embedding_is_the_class_token(made):
    found = made.encode(CASE.batch())["video"]
    assert found["tokens"].shape == (ROWS, 1 + 4, 16)
    equal(found["embedding"], found["tokens"][:, 0])


def test_a_net_in_fp64_has_an_embedding_in_fp64(made):
    with jax.enable_x64(True):
        method, batch = CASE.build(dtype="float64"), CASE.batch()
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), made.params)
        single = {**batch, "video": batch["video"][:, 0]}
        found = jax.eval_shape(method.encode["video"], params, {}, single)
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
        CASE.build(**changes)


def test_three_views_are_an_error(made):
    batch = CASE.batch()
    batch["video"] = batch["video"][:, [0, 1, 1]]
    with pytest.raises(UserError, match="takes two views of a clip, not 3"):
        made.method.loss(made.params, made.extra, batch, KEY, STEP)


def test_no_device_ever_holds_the_queue_whole(made):
    """Of the loss on eight devices: gradients do not reach the queue."""
    places, rules = 8192, config.load(CASE.config).sharding
    method = CASE.build(queue=places)
    extra = jax.eval_shape(lambda p: method.start(KEY, made.spec, p), made.params)
    state = State(*jax.eval_shape(lambda: (STEP, made.params, {})), extra)
    mesh = sharding.make_mesh(data=8)
    state = sharding.with_shardings(state, sharding.state_shardings(state, mesh, rules))
    assert state.extra["queue"]["key"].sharding.spec[0] == ("data", "fsdp")
    with sharding.activate(mesh):
        batch = sharding.put(CASE.batch(), mesh)
        compiled = jax.jit(method.loss).lower(state.params, state.extra, batch, KEY, STEP).compile()
    assert hlo.most_moved(compiled.as_text()) < places * 8 / 8
