"""Batch norm with running statistics, which a training step carries in `extra`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax import tree
from vtp_jax.nn import running
from vtp_jax.run import optim
from vtp_jax.run.step import check_step, make_step
from vtp_jax.types import Mean, Method, Out, State

KEY = jax.random.key(0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, where):
        return running.RunningNorm(name="norm")(nn.Dense(3, name="fc")(x), where)


NET = Net()


def batch(seed=0):
    x = np.random.default_rng(seed).standard_normal((6, 2, 4))
    valid = np.array([True, True, False, True, True, False])
    return dict(video=jnp.asarray(x, jnp.float32), valid=jnp.asarray(valid))


@pytest.fixture(scope="module")
def variables():
    return jax.jit(NET.init)(KEY, batch()["video"], batch()["valid"])


@functools.cache
def compiled():
    @jax.jit
    def learn(params, stats, batch):
        bound = running.learning(NET, params, stats)
        return bound(batch["video"], batch["valid"]), running.learnt(bound)

    @jax.jit
    def read(params, stats, batch):
        return running.bind(NET, params, stats)(batch["video"], batch["valid"])

    return learn, read


def test_training_normalises_by_the_batch_and_updates_the_statistics(variables):
    learn, read = compiled()
    params, stats = variables["params"], running.init(variables)
    mean, variance = np.zeros(3), np.ones(3)
    for seed in (0, 1):
        one = batch(seed)
        out, stats = learn(params, stats, one)
        x = np.float64(one["video"] @ params["fc"]["kernel"] + params["fc"]["bias"])
        rows = x[np.asarray(one["valid"])].reshape(-1, 3)
        expected = (x - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
        mean = 0.9 * mean + 0.1 * rows.mean(0)
        variance = 0.9 * variance + 0.1 * rows.var(0, ddof=1)
    np.testing.assert_allclose(stats["norm"]["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["norm"]["variance"], variance, rtol=1e-4)
    expected = (x - mean) / np.sqrt(variance + 1e-5)
    np.testing.assert_allclose(read(params, stats, one), expected, rtol=1e-4, atol=1e-5)


def test_invalid_rows_and_batches_without_valid_rows_update_nothing(variables):
    learn, _ = compiled()
    params, stats = variables["params"], running.init(variables)
    one = batch()
    other = {**one, "video": jnp.where(one["valid"][:, None, None], one["video"], 99.0)}
    jax.tree.map(
        np.testing.assert_array_equal,
        learn(params, stats, one)[1],
        learn(params, stats, other)[1],
    )
    _, same = learn(params, stats, {**one, "valid": one["valid"] & False})
    jax.tree.map(np.testing.assert_array_equal, same, stats)


def test_statistics_are_carried_in_extra_and_a_skipped_step_keeps_them():
    def loss(params, extra, batch, rng, step):
        bound = running.learning(NET, params, extra["stats"], rng)
        out = bound(batch["video"], batch["valid"])
        stats = {**extra, "stats": running.learnt(bound)}
        return jnp.square(out - 1).mean(), Out(dict(loss_x=Mean.of(out.mean()[None])), stats)

    def init(rng, spec):
        return NET.init(rng, jnp.zeros((1, 1, 4)), jnp.ones(1, bool))["params"]

    def start(rng, spec, params):
        shapes = jax.eval_shape(NET.init, rng, jnp.zeros((1, 1, 4)), jnp.ones(1, bool))
        return dict(stats=running.init(shapes))

    method = Method(init, loss, {}, start)
    params = method.init(KEY, {})
    adam = optim.make(
        params, rules=[(".*", {})], lr=lambda step: jnp.float32(0.1), weight_decay=0.0
    )
    state = State(jnp.int32(0), params, adam.init(params), method.start(KEY, {}, params))
    step = make_step(method, adam, 0)
    shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch().items()}
    check_step(step, jax.eval_shape(lambda: state), shapes)
    run = jax.jit(step)
    new, _ = run(state, batch())
    moved = tree.flatten(new.extra), tree.flatten(state.extra)
    assert all((moved[0][name] != moved[1][name]).all() for name in moved[1])
    broken = {**batch(), "video": batch()["video"].at[0].set(jnp.inf)}
    kept, numbers = run(new, broken)
    assert numbers["skipped"].total == 1
    jax.tree.map(np.testing.assert_array_equal, kept.extra, new.extra)
