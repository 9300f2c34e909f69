"""Forecasts of a step, against what the devices of the suite hold and send."""

import math

import jax
import pytest

from tests import plans
from tests.configs import ROOT
from vtp_jax.measure import forecast, pods
from vtp_jax.setup import config


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def split():
    """The plan of a config with parameters over four devices, and its step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        cfg, pod = plans.smallest("--config.mesh.fsdp=4"), pods.find_pod("cpu:8")
        step = forecast.lower(cfg, pod)
        return step, forecast.compile_plan(step, cfg, pod)


def test_memory_is_what_the_devices_hold(split):
    step, made = split
    for name in ("params", "opt"):
        leaves = jax.tree.leaves(getattr(step.state, name))
        shards = [math.prod(x.sharding.shard_shape(x.shape)) for x in leaves]
        assert made.memory[name] == sum(4 * n for n in shards)
        assert made.memory[name] < 0.4 * sum(4 * x.size for x in leaves), "not split over fsdp=4"
    assert made.memory["batch"] >= 16 // 8 * 8 * 32 * 32 * 3
    held = sum(made.memory.values())
    assert held == pytest.approx(made.need, rel=0.02)
    assert made.fits and made.have is None


def test_split_parameters_are_gathered_and_gradients_summed(split):
    _, made = split
    assert made.traffic is not None and made.traffic["all-gather"] > 0.5 * made.memory["params"]
    assert made.flops > 0 and made.again == 0


def test_recomputation_by_remat_does_not_count_as_work(split):
    cfg = plans.smallest("--config.mesh.fsdp=4")
    cfg.method["remat"] = "nothing_saveable"
    once, again = forecast.work(cfg)
    assert once == split[1].flops and 0.1 < again / once < 0.4


def test_the_size_is_read_from_either_out_of_memory_error_of_the_compiler():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.5G of 15.75G hbm."
    assert forecast._overflow(text, 1000) == int(23.5 * 2**30)
    text = "the total memory required for HLO temporaries (78.91G) exceeds available HBM (15.75G)"
    assert forecast._overflow(text, 1000) == int(78.91 * 2**30) + 1000


def test_a_sweep_tries_every_remat_policy_on_meshes_of_the_pod():
    cfg = config.load(plans.TINY)
    tried = list(forecast.candidates(cfg, 16))
    meshes = {tuple(t["mesh"].values()) for t, _ in tried}
    assert {(16, 1, 1, 1), (1, 16, 1, 1)} <= meshes and any(t == 2 for *_, t in meshes)
    for t, configs in tried:
        assert math.prod(t["mesh"].values()) == 16
        assert t["batch"] % (t["mesh"]["data"] * t["mesh"]["fsdp"]) == 0
        assert [c.method["remat"] for c in configs] == list(forecast.REMAT)
