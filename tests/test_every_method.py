"""Every tiny config takes the same steps on any mesh, optimizer included: for `make test-all`, as
each compiles for a minute. tests/methods/test_laws.py has the fast laws, on smaller nets."""

import functools

import jax
import numpy as np
import pytest

from tests.configs import ROOT, tiny_configs
from vtp_jax import tree
from vtp_jax.run import sharding
from vtp_jax.run.step import make_step
from vtp_jax.setup import build, config

pytestmark = pytest.mark.slow(reason="a minute of compiling for each config and mesh")
MESHES = [
    dict(data=8),
    dict(data=2, fsdp=4),
    dict(data=2, fsdp=2, tensor=2),
    dict(data=2, sequence=2, tensor=2),
]


def run(cfg, mesh, steps=3):
    """Losses of a few steps on a mesh, and the state after them."""
    data = build.data(cfg.data, batch=cfg.batch, seed=0)
    method = build.method(cfg, data.facts)
    start, optimizer = build.start(method, cfg.optim, data.spec, 0)
    placed = sharding.state_shardings(jax.eval_shape(start), mesh, cfg.sharding)
    losses = []
    with sharding.activate(mesh):
        state = jax.jit(start, out_shardings=placed)()
        step = jax.jit(make_step(method, optimizer, 0))
        for batch, _ in zip(data.batches(0), range(steps), strict=False):
            state, numbers = step(state, sharding.put(batch, mesh))
            losses.append({k: float(v.value()) for k, v in numbers.items()})
    return losses, state


@functools.cache  # for all meshes
def on_one_device(path):
    cfg = small(path)
    return run(cfg, sharding.make_mesh(data=1, devices=jax.devices()[:1]))


def small(path):
    """In fp32, with an eps that makes Adam's updates continuous in the gradient: otherwise, where
    the gradient is 0 up to rounding, as for a key's bias, rounding alone causes whole steps."""
    cfg = config.load(path)
    cfg.method["dtype"] = "float32"
    cfg.optim["eps"] = 1e-3
    return cfg


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("path", tiny_configs())
def test_one_device_and_eight_give_the_same_losses(path, axes):
    one, alone = on_one_device(path)
    assert one[0]["loss"] != one[-1]["loss"]
    many, state = run(small(path), sharding.make_mesh(**axes))
    for a, b in zip(one, many, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, atol=1e-5, err_msg=name)
    moments, wanted = (tree.flatten(s.opt) for s in (state, alone))  # Adam's: the gradients
    for name, leaf in wanted.items():
        kind = name.split("/")[0]
        scale = max(float(np.abs(x).max()) for k, x in wanted.items() if k.startswith(kind))
        np.testing.assert_allclose(
            moments[name], leaf, rtol=1e-3, atol=1e-4 * np.abs(leaf).max() + 1e-7 * scale,
            err_msg=name,
        )  # fmt: skip
    for name, leaf in tree.flatten(alone.extra).items():
        np.testing.assert_allclose(
            tree.flatten(state.extra)[name], leaf, rtol=0.02, atol=2e-4, err_msg=name
        )
    if axes.get("fsdp", 1) > 1:  # parameters really are spread
        for name, leaf in tree.flatten(state.params).items():
            if name.endswith("encoder/blocks/mlp/fc1/kernel"):
                assert leaf.addressable_shards[0].data.size < leaf.size, name
