"""Rates and decay of the fine-tuning recipe, tensor by tensor in the official names: what the
authors' code intends, and what it does."""

import jax
import numpy as np
import pytest

from vtp_jax import tree
from vtp_jax.convert import rules
from vtp_jax.convert.families import simvtp as published
from vtp_jax.methods import simvtp
from vtp_jax.run import optim
from vtp_jax.setup import shipped
from vtp_jax.tasks import retrieve

finetune_msrvtt = shipped.module("simvtp/finetune_msrvtt")

DEPTH, HEADS = 12, 1


def official(setting: str, rates: str) -> dict[str, float]:
    """Official name -> factor on the rate or on the decay, one for each tensor."""
    task = finetune_msrvtt.get_config(rates).task
    base = simvtp.make(size=(8, DEPTH, HEADS, 8), cube=(2, 8, 8), vocab_size=10)
    made = retrieve.make(base=base, drop=task.drop.to_dict())
    spec = dict(
        video=jax.ShapeDtypeStruct((1, 2, 8, 8, 3), np.uint8),
        text=jax.ShapeDtypeStruct((1, 4), np.int32),
        text_mask=jax.ShapeDtypeStruct((1, 4), np.bool_),
    )
    shapes = jax.eval_shape(lambda key: made.init(key, spec), jax.random.key(0))
    chosen = tree.flatten(optim.settings(finetune_msrvtt.rates(DEPTH, rates == "official"), shapes))

    def fill(name, shape):
        value = np.asarray(getattr(chosen[name], setting), np.float64)
        return np.broadcast_to(
            value.reshape(value.shape + (1,) * (shape.ndim - value.ndim)), shape.shape
        )

    theirs = rules.to_tensors(published.finetune_rules(HEADS), tree.map_named(fill, shapes))
    assert all((x == x.flat[0]).all() for x in theirs.values())
    return {name: float(x.flat[0]) for name, x in theirs.items()}


def intended(name: str) -> float:
    part, index = name.split(".")[1:3]
    layer = {"patch_embed": 0, "text_embeddings": 0, "fc_norm": DEPTH + 1}
    return 0.75 ** (DEPTH + 1 - (int(index) + 1 if part == "blocks" else layer[part]))


def test_rates_fall_with_depth_as_intended():
    found = official("lr", "")
    assert len(found) == 330 - 5 - 2
    assert found == pytest.approx({name: intended(name) for name in found})
    assert found["video_encoder.patch_embed.proj.weight"] == pytest.approx(0.0238, abs=5e-5)
    assert found["text_encoder.blocks.11.mlp.fc2.bias"] == 0.75
    assert found["video_encoder.fc_norm.weight"] == 1.0


def test_as_released_all_rates_are_equal():
    assert set(official("lr", "official").values()) == {1.0}


@pytest.mark.parametrize("rates", ["", "official"])
def test_parameters_of_one_dimension_are_not_decayed(rates):
    shapes = {"weight": 2, "bias": 1, "q_bias": 1, "v_bias": 1}
    for name, decay in official("wd", rates).items():
        is_norm = "norm" in name.lower()
        dims = 1 if is_norm else shapes[name.split(".")[-1]]
        assert decay == (0.0 if dims == 1 else 1.0), name
