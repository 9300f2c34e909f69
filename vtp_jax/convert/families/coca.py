"""CoCa under the names of OpenCLIP's parts: a ViT with attentional poolers, and a text tower with
the decoder under `text_decoder.`, whose layers share one norm of the tokens they attend to."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from vtp_jax import tree
from vtp_jax.convert import nets, rules
from vtp_jax.convert.families.clip import CLIP
from vtp_jax.convert.formats import Format, Step
from vtp_jax.convert.nets import Arrays, Heads, Net
from vtp_jax.convert.rules import Rule, linear, norm
from vtp_jax.methods import coca as method
from vtp_jax.objectives import contrastive
from vtp_jax.types import Params


def cross_rules(param: str, tensor: str, heads: int) -> list[Rule]:
    return [
        Rule(f"{param}/q", f"{tensor}.q.weight", rules.head_kernel(heads)),
        Rule(f"{param}/q_bias", f"{tensor}.q.bias", rules.per_head(heads)),
        Rule(f"{param}/kv", f"{tensor}.kv.weight", rules.fused_qkv(heads, 2)),
        Rule(f"{param}/kv_bias", f"{tensor}.kv.bias", rules.fused_bias(heads, 2)),
        *linear(f"{param}/proj", f"{tensor}.out_proj"),
    ]


def pooler_rules(param: str, tensor: str, heads: int) -> list[Rule]:
    return [
        Rule(f"{param}/query", f"{tensor}.query", rules.SAME),
        *norm(f"{param}/norm_query", f"{tensor}.ln_q"),
        *norm(f"{param}/norm", f"{tensor}.ln_k"),
        *cross_rules(f"{param}/cross", f"{tensor}.attn", heads),
    ]


def pretrain_rules(heads: int, text_heads: int) -> list[Rule]:
    """The rules of the whole net: 127 tensors at depth 2 + 2 + 2."""
    upper = "text/upper/blocks"
    own, other = "text_decoder.resblocks.{i}", "text_decoder.cross_attn.{i}"
    return [
        Rule("visual/patch_embed/kernel", "visual.conv1.weight", rules.CONV2),
        Rule("visual/position", "visual.positional_embedding", rules.SAME),
        *rules.stack("visual/encoder", "visual.transformer.resblocks", heads, CLIP),
        *norm("visual/norm", "visual.ln_post"),
        *pooler_rules("caption_pool", "visual.attn_pool", text_heads),
        *pooler_rules("contrast_pool", "visual.attn_pool_contrastive", text_heads),
        Rule("video_proj/kernel", "visual.proj", rules.SAME),
        Rule("text/word", "text.token_embedding.weight", rules.SAME),
        Rule("text/position", "text.positional_embedding", rules.SAME),
        Rule("text/class_token", "text.cls_emb", rules.SAME),
        *rules.stack("text/lower", "text.transformer.resblocks", text_heads, CLIP),
        *norm("text/class_norm", "text.ln_final"),
        Rule("text/proj/kernel", "text.text_projection", rules.SAME),
        *norm("text/memory_norm", "text_decoder.cross_attn.0.ln_1_kv"),
        *norm(f"{upper}/norm1", f"{own}.ln_1"),
        Rule(f"{upper}/attn/qkv", f"{own}.attn.in_proj_weight", rules.fused_qkv(text_heads)),
        Rule(f"{upper}/attn/qkv_bias", f"{own}.attn.in_proj_bias", rules.fused_bias(text_heads)),
        *linear(f"{upper}/attn/proj", f"{own}.attn.out_proj"),
        *norm(f"{upper}/norm_cross", f"{other}.ln_1"),
        *cross_rules(f"{upper}/cross", f"{other}.attn", text_heads),
        *norm(f"{upper}/norm2", f"{other}.ln_2"),
        *linear(f"{upper}/mlp/fc1", f"{other}.mlp.c_fc"),
        *linear(f"{upper}/mlp/fc2", f"{other}.mlp.c_proj"),
        *norm("text/norm", "text_decoder.ln_final"),
        Rule("text/head/kernel", "text_decoder.text_projection", rules.SAME),
        Rule("logit_scale", "logit_scale", rules.SAME),
    ]


def complete(params: Params) -> Params:
    """The parameters with zeros for the bias of the patch embedding, which OpenCLIP lacks."""
    bias = jnp.zeros(params["visual"]["patch_embed"]["kernel"].shape[-1])
    return tree.merge(params, dict(visual=dict(patch_embed=dict(bias=bias))))


def sizes_of(params: Params, heads: Heads) -> dict[str, Any]:
    """The arguments of `coca.build` that can be inferred from parameters."""
    visual, text = params["visual"], params["text"]
    patch = nets.cube_of(visual["patch_embed"])[1]
    lower, upper = (text[part]["blocks"] for part in ("lower", "upper"))
    return dict(
        size=nets.size_of(visual["encoder"]["blocks"], heads["heads"]),
        text_size=nets.size_of(lower, heads["text-heads"]),
        layers=nets.size_of(upper, heads["text-heads"]).depth,
        side=nets.side_of(visual["position"], has_class=False) * patch,
        patch=patch,
        queries=len(params["caption_pool"]["query"]),
        length=len(text["position"]),
        vocab_size=len(text["word"]),
    )


def pretrain(params: Params, inputs: Arrays, heads: Heads) -> Net:
    nets.check_pixels(inputs, "image")
    found = sizes_of(params, heads)
    weights = dict(contrast=0.5, caption=2.0)
    net, recipe = method.build(**found, weights=weights, **nets.NORMALISED)
    texts = (len(inputs["image"]), inputs["ids"].shape[-1])
    nets.check_shapes(inputs, ids=texts, attention_mask=texts)
    nets.check_ids(inputs, found["vocab_size"], ids=0)
    batch = nets.batch_of(inputs, unit=False)

    def step(params: Any) -> Any:
        params = complete(params)
        out = method.forward(net, params, batch)
        found = method.compare(recipe, out, batch)
        losses = {
            f"loss_{n}": weight * found[f"loss_{n}"].value() for n, weight in recipe.weights.items()
        }
        memory = method.encode_video(net, recipe, params, {}, batch)["memory"]
        features = {n: contrastive.normalise(getattr(out, n)) for n in ("video", "text")}
        return sum(losses.values()), dict(
            image=features["video"], text=features["text"], logits=out.logits, memory=memory,
            **losses,
        )  # fmt: skip

    return Net(
        lambda key: method.init(net, recipe, key, nets.spec_of(batch)),
        lambda params: step(params)[1],
        step,
    )


FORMATS = {
    "coca": Format(
        "CoCa in the names of OpenCLIP's parts",
        {
            "heads": "visual.transformer.resblocks.0.ln_1.weight",
            "text-heads": "text.transformer.resblocks.0.ln_1.weight",
        },
        pretrain_rules,
        pretrain,
        step=Step(
            "mlfoundations/open_clip @89fb801",
            ("image", "ids", "attention_mask"),
            "image (B, 3, H, W), normalised; ids (B, L) from the start to the end token, then "
            "padding; attention_mask (B, L) -> image and text (B, d), of length one; memory "
            "(B, queries, d), the pooled tokens; logits (B, L - 1, V) of the next word; "
            "loss_contrast, the mean of both directions; loss_caption, twice the mean over words; "
            "loss",
        ),
    )
}
