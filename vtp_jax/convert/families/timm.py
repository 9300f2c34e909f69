"""Nets for images in timm's names: ViT, and MAE with its decoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from vtp_jax import masking
from vtp_jax.convert import nets, rules
from vtp_jax.convert.formats import Format, Proof, Tensors
from vtp_jax.convert.nets import Arrays, Heads, Net
from vtp_jax.convert.reference import timm as reference
from vtp_jax.convert.rules import BlockNames, Rule
from vtp_jax.nn import embed, vit
from vtp_jax.nn.mae import Decoder
from vtp_jax.nn.transformer import VIT, Style
from vtp_jax.types import Params

TIMM = BlockNames(
    "norm1", "attn.qkv.weight", ("attn.qkv.bias",), "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"
)


def vit_rules(heads: int, last: str = "norm", head: str | None = "head") -> list[Rule]:
    """timm's VisionTransformer with a class token, and MAE's released encoders (without a head).

    last: the last norm: "norm", or "fc_norm" if it follows a mean; head: the classifier, None if
    the file has none. 152 tensors at depth 12 with a head.
    """
    return [
        Rule("class_token", "cls_token", rules.ROW),
        Rule("position", "pos_embed", rules.TABLE),
        Rule("patch_embed/kernel", "patch_embed.proj.weight", rules.CONV2),
        Rule("patch_embed/bias", "patch_embed.proj.bias", rules.SAME),
        *rules.stack("encoder", "blocks", heads, TIMM),
        *rules.norm("norm", last),
        *(rules.linear("head", head) if head else []),
    ]


def mae_rules(heads: int, decoder_heads: int) -> list[Rule]:
    """The official MAE pretraining model, `nn.vit.ViT` and `nn.mae.Decoder`: 254 tensors at depth
    12 + 8. Its released encoders are `vit_rules(heads, head=None)`."""
    decoder = [
        *rules.linear("embed", "decoder_embed"),
        Rule("mask_token", "mask_token", rules.ROW),
        Rule("position", "decoder_pos_embed", rules.TABLE),
        *rules.stack("stack", "decoder_blocks", decoder_heads, TIMM),
        *rules.norm("norm", "decoder_norm"),
        *rules.linear("head", "decoder_pred"),
    ]
    encoder = vit_rules(heads, head=None)
    return [*rules.under(encoder, "encoder/"), *rules.under(decoder, "decoder/")]


def tower(params: Params, heads: int, style: Style, pooling: str = "class") -> vit.ViT:
    """`nn.vit.ViT` at the sizes of the parameters."""
    return vit.ViT(
        nets.size_of(params["encoder"]["blocks"], heads),
        len(params["position"]) - 1,
        cube=nets.cube_of(params["patch_embed"]),
        style=style,
        first_norm="norm_pre" in params,
        pooling=pooling,
        features=params["proj"]["kernel"].shape[-1] if "proj" in params else None,
        dtype=jnp.float64,
    )


def cubes_of(params: Params, inputs: Arrays) -> Any:
    """The image, cut into the patches of a tower."""
    return embed.cut(nets.image_rows(inputs["image"]), nets.cube_of(params["patch_embed"]))


def classifier(pooling: str) -> Callable[[Params, Arrays, Heads], Net]:
    def make(params: Params, inputs: Arrays, heads: Heads) -> Net:
        def body(params: Params) -> Params:
            return {n: p for n, p in params.items() if n != "head"}

        net = tower(body(params), heads["heads"], VIT, pooling)
        cubes = cubes_of(params, inputs)

        def run(params: Any) -> dict[str, Any]:
            bound = net.bind({"params": body(params)})
            raw = bound.encode(cubes)
            found = dict(raw=raw, pooled=bound.pool(raw))
            if head := params.get("head"):
                found["logits"] = found["pooled"] @ head["kernel"] + head["bias"]
            return found

        return Net(lambda key: net.init(key, cubes)["params"], run)

    return make


def mae(params: Params, inputs: Arrays, heads: Heads) -> Net:
    net = tower(params["encoder"], heads["heads"], VIT)
    cubes = cubes_of(params["encoder"], inputs)
    keep = jnp.asarray(inputs["keep"], jnp.int32)
    b, n, p = cubes.shape
    hidden = jnp.ones((b, n), bool).at[jnp.arange(b)[:, None], keep].set(False)
    mask = masking.of_dropped(hidden, n - keep.shape[1])
    size = nets.size_of(params["decoder"]["stack"]["blocks"], heads["decoder-heads"])
    decoder = Decoder(size, n, p, dtype=jnp.float64)

    def encode(params: Params) -> Any:
        bound = net.bind({"params": params})
        return bound.norm(bound.encode(masking.take(cubes, keep), keep))

    def init(key: Any) -> Params:
        first = net.init(key, cubes)["params"]
        return dict(encoder=first, decoder=decoder.init(key, encode(first), mask)["params"])

    def run(params: Any) -> dict[str, Any]:
        tokens = encode(params["encoder"])
        return dict(
            tokens=tokens, pixels=decoder.apply({"params": params["decoder"]}, tokens, mask)
        )

    return Net(init, run)


def vit_reference(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
    return reference.vit(tensors, inputs["image"], **heads)


def mae_reference(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
    """The reference predicts every patch; `nn.mae.Decoder` only the hidden ones, in order."""
    found = reference.mae(tensors, inputs["image"], inputs["keep"], **nets.named(heads))
    n = found["pixels"].shape[1]
    drop = np.stack([np.setdiff1d(np.arange(n), kept) for kept in inputs["keep"]])
    return {**found, "pixels": np.take_along_axis(found["pixels"], drop[..., None], 1)}


HEADS = {"heads": "blocks.0.norm1.weight"}
DRAW = nets.draw_image("patch_embed.proj.weight", "pos_embed")
FORMATS = {
    "vit": Format(
        "timm's ViT, DeiT without distillation, MAE's released encoders",
        HEADS,
        vit_rules,
        classifier("class"),
        optional=("head/",),
        proof=Proof(DRAW, vit_reference),
    ),
    "vit_mean": Format(
        "timm's ViT whose tokens are averaged before `fc_norm`, as fine-tuned MAE",
        HEADS,
        partial(vit_rules, last="fc_norm"),
        classifier("mean"),
        optional=("head/",),
        proof=Proof(DRAW, vit_reference),
    ),
    "mae": Format(
        "MAE as pretrained, with its decoder",
        HEADS | {"decoder-heads": "decoder_blocks.0.norm1.weight"},
        mae_rules,
        mae,
        proof=Proof(DRAW, mae_reference),
    ),
}
