"""The authors' SNCLR: encoder and projector, their momentum average, and the predictor."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vtp_jax.convert import nets, rules
from vtp_jax.convert.families import timm
from vtp_jax.convert.formats import Format, Step
from vtp_jax.convert.nets import Arrays, Heads, Net
from vtp_jax.convert.rules import Rule
from vtp_jax.methods import snclr as method
from vtp_jax.objectives.contrastive import normalise
from vtp_jax.types import Params

STILL = dict(jittered=0.0, grey=0.0, blur=0.0, solarise=0.0, flip=0.0)  # the inputs are views


def head_rules(param: str, tensor: str, layers: int) -> list[Rule]:
    """The rules of a head; its layers, norms and activations are numbered together: linear layers
    are 0, 3, 6."""
    found = []
    for i in range(layers):
        found.append(Rule(f"{param}/fc{i + 1}/kernel", f"{tensor}.{3 * i}.weight", rules.LINEAR))
        if i + 1 < layers:
            found += rules.norm(f"{param}/norm{i + 1}", f"{tensor}.{3 * i + 1}")
    return found


def encoder_rules(heads: int, part: str) -> list[Rule]:
    """The rules of the "base" or the "momentum" encoder, with its projector. Positions are
    fixed."""
    vit = [r for r in timm.vit_rules(heads, head=None) if r.param != "position"]
    return rules.under([*vit, *head_rules("projector", "head", 3)], tensor=f"{part}_encoder.")


def pretrain_rules(heads: int) -> list[Rule]:
    online = [*encoder_rules(heads, "base"), *head_rules("predictor", "predictor", 2)]
    average = encoder_rules(heads, "momentum")
    return [*rules.under(online, "params/"), *rules.under(average, "twin/")]


def pretrain(params: Params, inputs: Arrays, heads: Heads) -> Net:
    """params: {"params": the trained ones, "twin": their average before the step}."""
    for name in ("first", "second"):
        nets.check_pixels(inputs, name)
    online = params["params"]
    bank = jnp.asarray(inputs["bank"], jnp.float64)
    places, features = bank.shape
    b, *_ = inputs["first"].shape
    nets.check_shapes(
        inputs,
        second=np.shape(inputs["first"]),
        bank=(places, online["projector"]["fc3"]["kernel"].shape[-1]),
    )
    net, recipe = method.build(
        size=nets.size_of(online["encoder"]["blocks"], heads["heads"]),
        cube=nets.cube_of(online["patch_embed"]),
        hidden=online["projector"]["fc1"]["kernel"].shape[-1],
        features=features, queue=places, neighbours=int(inputs["topk"]),
        temperature=float(inputs["temperature"]), threshold=float(inputs["threshold"]),
        first=STILL, second=STILL, **nets.NORMALISED,
    )  # fmt: skip
    # A schedule would round to fp32.
    recipe = recipe._replace(momentum=lambda step: float(inputs["momentum"]))
    views = [nets.image_rows(inputs[name]) for name in ("first", "second")]
    batch = dict(video=jnp.stack(views, axis=1), valid=jnp.ones(b, bool))
    past = dict(key=normalise(bank), real=jnp.ones(places, bool), next=jnp.int32(inputs["pointer"]))

    def step(params: Any) -> Any:
        """The official code updates the average at the start of a step, this one at the end."""
        online, twin = params["params"], jax.lax.stop_gradient(params["twin"])
        extra, still = dict(twin=twin, queue=past), jax.lax.stop_gradient(online)
        _, extra = method.after_update(net, recipe, still, extra, jnp.int32(-1))
        key = jax.random.key(0)
        loss, out = method.loss(net, recipe, online, extra, batch, key, jnp.int32(0))
        queue = out.extra["queue"]
        found = dict(bank=queue["key"], pointer=queue["next"], after=dict(twin=extra["twin"]))
        return loss, found

    def init(key: Any) -> Params:
        fresh = method.init(net, recipe, key, nets.spec_of(batch))
        return dict(params=fresh, twin={k: v for k, v in fresh.items() if k != "predictor"})

    return Net(init, lambda params: step(params)[1], step)


UNUSED = (  # fixed positions, and the buffers of batch norm, which training does not use
    r"(base|momentum)_encoder\.pos_embed",
    r".*\.(running_mean|running_var|num_batches_tracked)",
)
FORMATS = {
    "snclr": Format(
        "the authors' SNCLR",
        {"heads": "base_encoder.blocks.0.norm1.weight"},
        pretrain_rules,
        pretrain,
        UNUSED,
        step=Step(
            "ChongjianGE/SNCLR @b95c7e5",
            ("first", "second", "bank", "pointer", "topk", "threshold", "temperature", "momentum"),
            "first and second (B, 3, H, W), the two views, normalised; bank (K, d), past keys; "
            "pointer (), the next place to write; topk, threshold, temperature and momentum "
            "() -> loss; bank and pointer after the step; after/momentum_encoder.*, the averages "
            "that gave the keys",
            frozen=r"momentum_encoder\..*|base_encoder\.patch_embed\..*",
        ),
    )
}
