"""The authors' TVTSv2 with its sorter. H/14's code differs in two places from B/16's and B/32's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from vtp_jax import masking
from vtp_jax.convert import nets, rules
from vtp_jax.convert.families.clip import CLIP
from vtp_jax.convert.families.timm import TIMM
from vtp_jax.convert.formats import Format, Proof, Step, Tensors
from vtp_jax.convert.nets import Arrays, Heads, Net
from vtp_jax.convert.reference import tvtsv2 as reference
from vtp_jax.convert.reference.parts import Act
from vtp_jax.convert.rules import Rule
from vtp_jax.methods import tvtsv2 as method
from vtp_jax.nn.bind import bind
from vtp_jax.types import Params, UserError

TVTS = CLIP._replace(qkv="attn.qkv.weight", bias=("attn.qkv.bias",), proj="attn.proj")


def pretrain_rules(heads: int, sorter_heads: int, text_heads: int) -> list[Rule]:
    """The released TVTSv2 with its sorter: all of `methods.tvtsv2`."""
    blocks, time = "video_model.transformer.resblocks", "encoder/blocks/time_attn"
    new = blocks + ".{i}.timeattn"
    visual = [
        Rule("class_token", "video_model.class_embedding", rules.SAME),
        Rule("position", "video_model.positional_embedding", rules.SAME),
        Rule("time_position", "video_model.temporal_embedding", rules.SAME),
        Rule("patch_embed/kernel", "video_model.conv1.weight", rules.CONV2),
        *rules.norm("norm_pre", "video_model.ln_pre"),
        *rules.stack("encoder", blocks, heads, TVTS),
        Rule(f"{time}/qkv", f"{new}.qkv.weight", rules.fused_qkv(heads)),
        Rule(f"{time}/qkv_bias", f"{new}.qkv.bias", rules.fused_bias(heads)),
        *rules.linear(f"{time}/proj", f"{new}.proj"),
        *rules.norm("encoder/blocks/norm_time", blocks + ".{i}.ln_3"),
        *rules.norm("norm", "video_model.ln_post"),
        Rule("proj/kernel", "video_model.proj", rules.SAME),
    ]
    words = [
        Rule("word", "text_token_embedding.weight", rules.SAME),
        Rule("position", "text_positional_embedding", rules.SAME),
        *rules.stack("encoder", "text_model.resblocks", text_heads, CLIP),
        *rules.norm("norm", "text_ln_final"),
        Rule("proj/kernel", "text_projection", rules.SAME),
    ]
    sorter = [
        Rule("type", "pred_model.type_embed", rules.TABLE),
        *rules.stack("encoder", "pred_model.blocks", sorter_heads, TIMM),
        *rules.norm("norm", "pred_model.norm"),
        *rules.linear("head", "pred_model.head"),
    ]
    return [
        *rules.under(visual, "visual/"),
        *rules.under(words, "text/"),
        *rules.under(sorter, "sorter/"),
    ]


def pretrain(act: str, sorted_by: str) -> Callable[[Params, Arrays, Heads], Net]:
    def make(params: Params, inputs: Arrays, heads: Heads) -> Net:
        visual, words, sorter = params["visual"], params["text"], params["sorter"]
        patch, places = nets.cube_of(visual["patch_embed"])[1], len(visual["position"]) - 1
        side = nets.side_of(visual["position"]) * patch
        net, recipe = method.build(
            size=nets.size_of(visual["encoder"]["blocks"], heads["heads"]),
            text_size=nets.size_of(words["encoder"]["blocks"], heads["text-heads"]),
            features=visual["proj"]["kernel"].shape[-1],
            side=side, patch=patch, frames=len(visual["time_position"]), sorted_by=sorted_by,
            act=act, turns=len(sorter["head"]["bias"]), vocab_size=len(words["word"]),
            text_length=len(words["position"]), **nets.NORMALISED,
        )  # fmt: skip
        if heads["decoder-heads"] != (usual := max(net.features // 64, 1)):
            raise UserError(f"TVTSv2's sorter has heads of width 64: use --decoder-heads {usual}")
        nets.check_pixels(inputs)
        nets.check_ids(inputs, net.vocab_size, ids=0)
        batch = nets.batch_of(inputs, unit=False)
        b, frames = batch["video"].shape[:2]
        nets.check_shapes(inputs, keep=(b, places))
        hidden = jnp.tile(~jnp.asarray(inputs["keep"], bool), (1, frames))
        mask = masking.of_dropped(hidden, frames * (places - nets.same_count(inputs, "keep")))

        def run(params: Any) -> dict[str, Any]:
            """Runs the sorter even for single texts, which training does not."""
            out = method.forward(net, params, batch, mask)
            turns = bind(net, params).sort(out.video, out.texts)
            return dict(video=out.video, texts=out.texts, turns=turns)

        def step(params: Any) -> Any:
            out = method.forward(net, params, batch, mask)
            found = method.compare(recipe, out, batch["valid"])
            vtc, sort = (recipe.weights[n] * found[f"loss_{n}"].value() for n in ("vtc", "sort"))
            turns = {} if out.turns is None else dict(turns=out.turns)
            features = dict(video=out.video[:, 0], text=method.mean_of(out.texts))
            return vtc + sort, dict(features, **turns, loss_vtc=vtc, loss_sort=sort)

        return Net(lambda key: method.init(net, recipe, key, nets.spec_of(batch)), run, step)

    return make


def draw(tensors: Tensors, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two frames of the position table's size (one if the time table has one row), half of their
    places, and one text per turn."""
    _, c, h, w = tensors["video_model.conv1.weight"].shape
    side = nets.side_of(tensors["video_model.positional_embedding"])
    frames = min(2, len(tensors["video_model.temporal_embedding"]))
    video = rng.standard_normal((nets.ROWS, c, frames, side * h, side * w)).astype(np.float32)
    keep = np.argsort(rng.random((nets.ROWS, side * side)), axis=1) < max(1, side * side // 2)
    length = min(nets.WORDS, len(tensors["text_positional_embedding"]))
    texts = (nets.ROWS, len(tensors["pred_model.head.bias"]), length)
    words = len(tensors["text_token_embedding.weight"])
    return dict(video=video, keep=keep, ids=rng.integers(min(1, words - 1), words, texts))


def reference_of(act: Act, normed: bool) -> Callable[..., dict[str, Any]]:
    def run(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
        args = (inputs[n] for n in ("video", "keep", "ids"))
        return reference.pretrain(tensors, *args, **nets.named(heads), act=act, normed=normed)

    return run


STACKS = {
    "heads": "video_model.transformer.resblocks.0.ln_1.weight",
    "decoder-heads": "pred_model.norm.weight",  # the sorter's
    "text-heads": "text_model.resblocks.0.ln_1.weight",
}
STEP = Step(
    "TencentARC/TVTS @290a63e",
    ("video", "keep", "ids"),
    "video (B, 3, T, H, W), normalised; keep (B, S), True = the visible places of every frame; ids "
    "(B, K, L), the texts in order, or (B, L) without sorting -> video and text (B, e), turns (B, "
    "K, turns), loss_vtc, loss_sort (times 2, as in the sum), loss",
)
FORMATS = {
    "tvtsv2": Format(
        "the authors' TVTSv2 B/16 and B/32, with the sorter",
        STACKS,
        pretrain_rules,
        pretrain("quick_gelu", "tokens"),
        proof=Proof(draw, reference_of("quick_gelu", True)),
        step=STEP,
    ),
    "tvtsv2_h14": Format(
        "the authors' TVTSv2 H/14, with the sorter",
        STACKS,
        pretrain_rules,
        pretrain("gelu", "patches"),
        proof=Proof(draw, reference_of("gelu", False)),
        step=STEP,
    ),
}
