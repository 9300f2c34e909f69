"""VideoMAE and VideoMAE V2 under their official names: pretrained, and fine-tuned to classify."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from vtp_jax import masking
from vtp_jax.convert import nets, rules
from vtp_jax.convert.formats import Format, Proof, Step, Tensors
from vtp_jax.convert.nets import Arrays, Heads, Net
from vtp_jax.convert.reference import videomae as reference
from vtp_jax.convert.rules import BlockNames, Rule
from vtp_jax.methods import videomae as method
from vtp_jax.nn import embed
from vtp_jax.objectives import classification, reconstruction
from vtp_jax.tasks import classify as task
from vtp_jax.types import Params

BEIT = BlockNames(
    "norm1", "attn.qkv.weight", ("attn.q_bias", "attn.v_bias"), "attn.proj",
    "norm2", "mlp.fc1", "mlp.fc2",
)  # fmt: skip


def pretrain_rules(encoder_heads: int, decoder_heads: int) -> list[Rule]:
    """The official VideoMAE pretraining model: 218 tensors at depth 12 + 4."""
    return [
        *rules.cube_embed("patch_embed", "encoder.patch_embed.proj"),
        *rules.stack("encoder", "encoder.blocks", encoder_heads, BEIT),
        *rules.norm("encoder_norm", "encoder.norm"),
        *decoder_rules("decoder.blocks", decoder_heads, BEIT),
    ]


def decoder_rules(tensor: str, heads: int, names: BlockNames) -> list[Rule]:
    return [
        Rule("encoder_to_decoder/kernel", "encoder_to_decoder.weight", rules.LINEAR),
        Rule("mask_token", "mask_token", rules.ROW),
        *rules.stack("decoder", tensor, heads, names),
        *rules.norm("decoder_norm", "decoder.norm"),
        *rules.linear("decoder_head", "decoder.head"),
    ]


def finetune_rules(heads: int) -> list[Rule]:
    """The official VideoMAE classifier: 162 tensors at depth 12. Its norm follows the mean."""
    return [
        *rules.cube_embed("base/patch_embed", "patch_embed.proj"),
        *rules.stack("base/encoder", "blocks", heads, BEIT),
        *rules.norm("fc_norm", "fc_norm"),
        *rules.linear("head", "head"),
    ]


def draws_of(inputs: Arrays) -> method.Draws:
    """The masks of a step: hidden cubes, and V2's places that the decoder does not predict."""
    mask = masking.of_dropped(jnp.asarray(inputs["mask"], bool), nets.same_count(inputs, "mask"))
    if "decode_mask" not in inputs:
        return method.Draws(mask, mask.drop, jnp.ones(mask.drop.shape, bool))
    skipped = nets.same_count(inputs, "decode_mask")
    ask = masking.of_dropped(jnp.asarray(inputs["decode_mask"], bool), skipped).keep
    return method.Draws(mask, ask, masking.take(mask.dropped, ask))


def pretrain(params: Params, inputs: Arrays, heads: Heads) -> Net:
    nets.check_pixels(inputs)
    net, recipe = method.build(
        size=nets.size_of(params["encoder"]["blocks"], heads["heads"]),
        decoder=nets.size_of(params["decoder"]["blocks"], heads["decoder-heads"]),
        cube=nets.cube_of(params["patch_embed"]),
        **nets.PIXELS,
    )
    batch = nets.batch_of(inputs, unit=True)
    places = (len(batch["video"]), int(np.prod(embed.grid_of(batch["video"].shape, net.cube))))
    nets.check_shapes(inputs, mask=places, decode_mask=places)
    draws = draws_of(inputs)

    def step(params: Any) -> Any:
        pixels, target = method.forward(net, recipe, params, batch, draws)
        loss = reconstruction.squared_error(pixels, target, draws.scored).value()
        return loss, dict(pixel_pred=pixels, target=target)

    return Net(
        lambda key: method.init(net, recipe, key, nets.spec_of(batch)),
        lambda params: dict(pixels=method.forward(net, recipe, params, batch, draws)[0]),
        step,
    )


def finetune(params: Params, inputs: Arrays, heads: Heads) -> Net:
    nets.check_pixels(inputs)
    base = method.make(
        size=nets.size_of(params["base"]["encoder"]["blocks"], heads["heads"]),
        decoder="tiny",  # a classifier has none
        cube=nets.cube_of(params["base"]["patch_embed"]),
        **nets.PIXELS,
    )
    classes, batch = len(params["head"]["bias"]), nets.batch_of(inputs, unit=True)
    nets.check_shapes(inputs, target=(len(batch["video"]), classes))
    made = task.make(base=base, classes=classes)

    def run(params: Any) -> dict[str, Any]:
        return dict(logits=made.encode["classes"](params, {"base": {}}, batch)["classes"])

    def step(params: Any) -> Any:
        found, target = run(params), jnp.asarray(inputs["target"], jnp.float64)
        loss = classification.soft_cross_entropy(found["logits"], target, batch["valid"])
        return loss.value(), found

    return Net(lambda key: made.init(key, nets.spec_of(batch)), run, step)


def pretrain_reference(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
    return reference.pretrain(tensors, inputs["video"], inputs["mask"], **nets.named(heads))


ABOUT = (
    "video (B, 3, T, H, W) normalised with ImageNet's statistics; mask (B, N), True = hidden"
    "{more} -> pixel_pred, target (B, predicted, p), loss"
)
DECODE = "; decode_mask (B, N), True = not predicted by the decoder"
SOURCE, SOURCE_V2 = "MCG-NJU/VideoMAE @14ef8d8", "OpenGVLab/VideoMAEv2 @29eab1e"
STACKS = {
    "heads": "encoder.blocks.0.norm1.weight",
    "decoder-heads": "decoder.blocks.0.norm1.weight",
}
FORMATS = {
    "videomae": Format(
        "VideoMAE and VideoMAE V2 as pretrained",
        STACKS,
        pretrain_rules,
        pretrain,
        proof=Proof(nets.draw_video("encoder.patch_embed.proj.weight"), pretrain_reference),
        step=Step(SOURCE, ("video", "mask"), ABOUT.format(more="")),
    ),
    "videomae_finetune": Format(
        "VideoMAE and VideoMAE V2 as fine-tuned to classify",
        {"heads": "blocks.0.norm1.weight"},
        finetune_rules,
        finetune,
        proof=Proof(
            nets.draw_video("patch_embed.proj.weight"),
            lambda t, inputs, heads: reference.classify(t, inputs["video"], **heads),
        ),
        step=Step(
            SOURCE,
            ("video", "target"),
            "video (B, 3, T, H, W) normalised with ImageNet's statistics; target (B, C), soft "
            "labels -> logits (B, C), loss",
        ),
    ),
}
# Files have the names of "videomae"; a step also masks the decoder.
V2 = FORMATS["videomae"]._replace(
    about="VideoMAE V2 as pretrained, its decoder masked",
    proof=None,
    step=Step(SOURCE_V2, ("video", "mask", "decode_mask"), ABOUT.format(more=DECODE)),
)
FORMATS["videomae_v2"] = V2
