"""Means over a stream are the mean of the whole, at fixed keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.evals import mean
from vtp_jax.run import sharding
from vtp_jax.types import Mean, State, Stream, UserError


def loss(params, extra, batch, rng):
    values = batch["weight"] * params["scale"]
    return {
        "loss": Mean.of(values, batch["valid"]),
        "noise": Mean.of(jax.random.normal(rng, values.shape), batch["valid"]),
        "absent": Mean.of(values, jnp.zeros_like(batch["valid"])),
    }


def make(rows, **cfg):
    weight = np.arange(10, dtype=np.float32)

    def batches():
        for start in range(0, 10, rows):
            part = weight[start : start + rows]
            pad = (0, rows - len(part))
            yield {
                "weight": np.pad(part, pad, constant_values=np.nan),
                "valid": np.pad(np.ones(len(part), bool), pad),
            }

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    streams = {"val": Stream(batches, 10, {})}
    return mean.make(encode={"loss": loss}, streams=streams, mesh=mesh, **cfg)


STATE = State(jnp.int32(5), {"scale": jnp.float32(2)}, None, {})


@pytest.mark.parametrize("rows", [1, 3, 4, 10, 16])
def test_batches_of_any_size_give_the_mean_of_the_whole(rows):
    assert dict(make(rows).run(STATE))["loss"] == 9.0


def test_the_key_is_fixed_and_differs_by_batch_and_seed():
    noise = [dict(e.run(STATE))["noise"] for e in (make(5), make(5), make(5, seed=1))]
    assert noise[0] == noise[1] != noise[2]
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(2)]
    expected = np.mean([jax.random.normal(k, (5,)) for k in keys])
    assert noise[0] == pytest.approx(expected, rel=1e-6)


def test_metrics_without_a_count_are_not_reported():
    assert "absent" not in dict(make(5).run(STATE))


def test_mistakes_are_reported_in_one_line():
    with pytest.raises(UserError, match="no stream 'test'; the data has val"):
        make(5, stream="test")
    with pytest.raises(UserError, match="no encode 'ema/loss'; it has loss"):
        make(5, loss="ema/loss")
