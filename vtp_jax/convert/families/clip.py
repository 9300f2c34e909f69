"""CLIP with a ViT: OpenAI's, and OpenCLIP's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from vtp_jax.convert import nets, rules
from vtp_jax.convert.families import timm
from vtp_jax.convert.formats import Format, Proof, Tensors
from vtp_jax.convert.nets import Arrays, Heads, Net
from vtp_jax.convert.reference import clip as reference
from vtp_jax.convert.reference.parts import Act
from vtp_jax.convert.rules import BlockNames, Rule
from vtp_jax.nn import text
from vtp_jax.nn.transformer import CLIP as STYLE
from vtp_jax.nn.transformer import Style
from vtp_jax.types import Params

CLIP = BlockNames(
    "ln_1", "attn.in_proj_weight", ("attn.in_proj_bias",), "attn.out_proj",
    "ln_2", "mlp.c_fc", "mlp.c_proj",
)  # fmt: skip


def clip_rules(heads: int, text_heads: int, text: str = "") -> list[Rule]:
    """OpenAI's CLIP and OpenCLIP's with ViT towers, 302 tensors at depth 12 + 12: `nn.vit.ViT`
    under visual, `nn.text.CausalText` under text. text: the prefix of the text tower's tensors,
    which is "text." for OpenCLIP's CustomTextCLIP."""
    visual = [
        Rule("class_token", "class_embedding", rules.SAME),
        Rule("position", "positional_embedding", rules.SAME),
        Rule("patch_embed/kernel", "conv1.weight", rules.CONV2),
        *rules.norm("norm_pre", "ln_pre"),
        *rules.stack("encoder", "transformer.resblocks", heads, CLIP),
        *rules.norm("norm", "ln_post"),
        Rule("proj/kernel", "proj", rules.SAME),
    ]
    words = [
        Rule("word", "token_embedding.weight", rules.SAME),
        Rule("position", "positional_embedding", rules.SAME),
        *rules.stack("encoder", "transformer.resblocks", text_heads, CLIP),
        *rules.norm("norm", "ln_final"),
        Rule("proj/kernel", "text_projection", rules.SAME),
    ]
    return [
        *rules.under(visual, "visual/", "visual."),
        *rules.under(words, "text/", text),
        Rule("logit_scale", "logit_scale", rules.SAME),
    ]


def towers(style: Style) -> Callable[[Params, Arrays, Heads], Net]:
    def make(params: Params, inputs: Arrays, heads: Heads) -> Net:
        visual, words = params["visual"], params["text"]
        image = timm.tower(visual, heads["heads"], style)
        cubes = timm.cubes_of(visual, inputs)
        tower = text.CausalText(
            nets.size_of(words["encoder"]["blocks"], heads["text-heads"]),
            words["proj"]["kernel"].shape[-1],
            *(len(words[n]) for n in ("word", "position")),
            style=style,
            dtype=jnp.float64,
        )
        ids = jnp.asarray(inputs["ids"], jnp.int32)
        return Net(
            lambda key: dict(
                visual=image.init(key, cubes)["params"], text=tower.init(key, ids)["params"]
            ),
            lambda params: dict(
                image=image.apply({"params": params["visual"]}, cubes),
                text=tower.apply({"params": params["text"]}, ids),
            ),
        )

    return make


def reference_of(act: Act) -> Callable[..., dict[str, Any]]:
    def run(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
        image = reference.image(tensors, inputs["image"], heads["heads"], act)
        text = reference.text(tensors, inputs["ids"], heads["text-heads"], act)
        return dict(image=image["embedding"], text=text["embedding"])

    return run


def tidy(tensors: Tensors) -> Tensors:
    """OpenCLIP's newer files put the text tower under "text."."""
    return {name.removeprefix("text."): x for name, x in tensors.items()}


UNUSED = ("input_resolution", "context_length", "vocab_size")  # of OpenAI's archives
STACKS = {
    "heads": "visual.transformer.resblocks.0.ln_1.weight",
    "text-heads": "transformer.resblocks.0.ln_1.weight",
}
DRAW = nets.together(
    nets.draw_image("visual.conv1.weight", "visual.positional_embedding"),
    nets.draw_words("token_embedding.weight", "positional_embedding"),
)
FORMATS = {
    "clip": Format(
        "OpenAI's CLIP with a ViT, and OpenCLIP's with the quick GELU",
        STACKS,
        clip_rules,
        towers(STYLE),
        UNUSED,
        tidy=tidy,
        proof=Proof(DRAW, reference_of("quick_gelu")),
    ),
    "open_clip": Format(
        "OpenCLIP with a ViT and the exact GELU",
        STACKS,
        clip_rules,
        towers(STYLE._replace(act="gelu")),
        UNUSED,
        tidy=tidy,
        proof=Proof(DRAW, reference_of("gelu")),
    ),
}
