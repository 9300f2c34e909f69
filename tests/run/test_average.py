"""Averaged weights: their rule and their shards, and that resuming and meshes preserve them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.configs import ROOT
from vtp_jax import tree
from vtp_jax.data import outline
from vtp_jax.run import sharding
from vtp_jax.run.average import average
from vtp_jax.run.step import make_step
from vtp_jax.setup import build, cli, config
from vtp_jax.types import Evaluator, Mean, Method, Out, UserError

SPEC = dict(valid=jax.ShapeDtypeStruct((8,), bool))
OPTIM = dict(lr=0.1, weight_decay=0.0, rules=((".*", dict(wd=0.0)),))
BATCH = dict(valid=jnp.ones(8, bool))


def base(dtype=jnp.float32):
    """Weights that are pulled to 3; the method counts its own steps in `extra`."""

    def loss(params, extra, batch, rng, step):
        assert set(extra) == {"count"}
        value = jnp.sum((params["net"]["w"].astype(jnp.float32) - 3) ** 2)
        return value, Out({"loss_w": Mean(value, jnp.ones(()))}, dict(count=extra["count"] + 1))

    def encode(params, extra, batch, rng=None):
        return dict(w=params["net"]["w"], count=extra["count"])

    return Method(
        init=lambda rng, spec: dict(net=dict(w=jnp.zeros((16, 2), dtype))),
        loss=loss,
        encode=dict(look=encode),
        start=lambda rng, spec, params: dict(count=jnp.zeros((), jnp.int32)),
        after_update=lambda params, extra, step: (params, dict(count=extra["count"] + 10)),
    )


def run(method, state, step, steps):
    seen = []
    for _ in range(steps):
        state, _ = step(state, BATCH)
        seen.append(np.asarray(state.params["net"]["w"], np.float64))
    return state, seen


@pytest.mark.parametrize("mesh", [dict(), dict(fsdp=8)])
def test_the_average_follows_its_rule_and_is_sharded_as_the_parameters(mesh):
    method = average(base(), 0.75)
    start, optimizer = build.start(method, OPTIM, SPEC, 0)
    devices = sharding.make_mesh(**mesh)
    placed = sharding.state_shardings(jax.eval_shape(start), devices, [(".*", "fsdp")])
    assert placed.extra["ema"] == placed.params
    with sharding.activate(devices):
        step = jax.jit(make_step(method, optimizer, 0))
        state, seen = run(method, jax.jit(start, out_shardings=placed)(), step, 3)
        halfway, _ = run(method, jax.jit(start)(), step, 1)
        resumed, _ = run(method, jax.device_get(halfway), step, 2)
    mean = np.zeros_like(seen[0])
    for w in seen:
        mean = 0.75 * mean + 0.25 * w
    np.testing.assert_allclose(state.extra["ema"]["net"]["w"], mean, rtol=1e-6)
    np.testing.assert_allclose(resumed.extra["ema"]["net"]["w"], mean, rtol=1e-6)
    assert state.extra["count"] == 33  # the method's own extra is unaffected

    now, then = (method.encode[n](state.params, state.extra, BATCH) for n in ("look", "ema/look"))
    np.testing.assert_allclose(now["w"], seen[-1], rtol=1e-6)
    np.testing.assert_allclose(then["w"], mean, rtol=1e-6)


def test_a_slow_average_of_bf16_parameters_changes():
    method = average(base(jnp.bfloat16), dict(kind="constant", value=0.9998))
    extra = method.start(jax.random.key(0), SPEC, method.init(jax.random.key(0), SPEC))
    params = dict(net=dict(w=jnp.ones((16, 2), jnp.bfloat16)))
    for _ in range(2):
        _, extra = method.after_update(params, extra, jnp.zeros((), jnp.int32))
    assert extra["ema"]["net"]["w"].dtype == jnp.float32
    np.testing.assert_allclose(extra["ema"]["net"]["w"], 1 - 0.9998**2, rtol=1e-3)
    assert method.encode["ema/look"](params, extra, BATCH)["w"].dtype == jnp.bfloat16


def test_wrong_averages_are_rejected():
    with pytest.raises(UserError, match="average=1.5"):
        average(base(), 1.5)
    twice = average(average(base(), 0.5), 0.5)
    with pytest.raises(UserError, match="already has an 'ema' of its own"):
        twice.start(jax.random.key(0), SPEC, twice.init(jax.random.key(0), SPEC))


def test_a_config_enables_the_average_and_evaluators_select_it(monkeypatch):
    """`config.average` wraps the method or its task; `weights="ema"` shows an evaluator the
    averages alone, under the usual names."""
    cfg = config.load(str(ROOT / "configs/videomae/finetune_k400.py:tiny"))
    facts = dict(mean=(0.5,) * 3, std=(0.2,) * 3, labels=12)
    plain = build.method(cfg, facts)
    made = build.method(cfg._replace(average=0.9), facts)
    assert set(made.encode) == {*plain.encode, *(f"ema/{name}" for name in plain.encode)}
    spec, _ = outline.describe(cfg.data, 8)
    shapes = jax.eval_shape(build.start(made, cfg.optim, spec, 0)[0])
    assert tree.flatten(shapes.extra["ema"]).keys() == tree.flatten(shapes.params).keys()

    seen, mesh, nothing = {}, sharding.make_mesh(), Evaluator(lambda state: [], "")
    monkeypatch.setattr(cli, "find", lambda *_: lambda **k: seen.update(k) or nothing)
    build.evaluators(dict(a=dict(type="classify", weights="ema")), made, {}, mesh)
    assert seen["encode"].keys() == plain.encode.keys()
    assert seen["encode"]["classes"] is made.encode["ema/classes"] and "weights" not in seen
    with pytest.raises(UserError, match="config.evals.a.weights='ema': the method has none"):
        build.evaluators(dict(a=dict(type="classify", weights="ema")), plain, {}, mesh)
