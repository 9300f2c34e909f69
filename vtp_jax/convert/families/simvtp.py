"""The authors' SimVTP: pretrained, and fine-tuned for retrieval as two towers. The released code's
quirks are on (means over padding, sums of directions, one masked caption for all passes)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vtp_jax import masking
from vtp_jax.convert import nets, rules
from vtp_jax.convert.families import bert, videomae
from vtp_jax.convert.formats import Format, Proof, Step, Tensors
from vtp_jax.convert.nets import Arrays, Heads, Net
from vtp_jax.convert.reference import simvtp as reference
from vtp_jax.convert.rules import Rule
from vtp_jax.methods import simvtp as method
from vtp_jax.nn import embed
from vtp_jax.objectives import contrastive, terms
from vtp_jax.tasks import retrieve
from vtp_jax.types import Params, UserError

# Without remat, activations would not fit into memory at the released sizes.
NET: dict[str, Any] = dict(dropout=0.0, remat="nothing_saveable", **nets.PIXELS)
QUIRKS: dict[str, Any] = dict(pool_padding=True, sum_directions=True)


def pretrain_rules(encoder_heads: int, decoder_heads: int) -> list[Rule]:
    """The official SimVTP pretraining model: VideoMAE and nine more tensors, 227 in total."""
    return [
        *videomae.pretrain_rules(encoder_heads, decoder_heads),
        *bert.embedding_rules("text_embed", "text_embeddings"),
        *rules.linear("text_cls", "text_cls"),
        *rules.linear("vtm_head", "vtm_head"),
    ]


def finetune_rules(heads: int) -> list[Rule]:
    """The official SimVTP retrieval model, two towers: 323 of its file's 330 tensors."""
    video, text = "video_encoder", "text_encoder"
    return [
        *rules.cube_embed("video/patch_embed", f"{video}.patch_embed.proj"),
        *rules.stack("video/encoder", f"{video}.blocks", heads, videomae.BEIT),
        *rules.norm("video_norm", f"{video}.fc_norm"),
        *bert.embedding_rules("text/text_embed", f"{text}.text_embeddings"),
        *rules.stack("text/encoder", f"{text}.blocks", heads, videomae.BEIT),
        *rules.norm("text_norm", f"{text}.fc_norm"),
    ]


def embeddings_of(patch_embed: Params, text_embed: Params) -> dict[str, Any]:
    """The sizes that can be inferred from embeddings."""
    return dict(
        cube=nets.cube_of(patch_embed),
        vocab_size=len(text_embed["word"]),
        text_length=len(text_embed["position"]),
    )


def check(inputs: Arrays, cube: embed.Triple, words: int) -> None:
    """Raises UserError on videos, captions and draws that would give meaningless numbers."""
    nets.check_pixels(inputs)
    b, _, *sides = inputs["video"].shape
    length = inputs["ids"].shape[-1]
    n = math.prod(embed.grid_of((b, *sides, 3), cube))
    texts = dict.fromkeys(("ids", "labels", "attention_mask"), (b, length))
    nets.check_shapes(inputs, mask=(b, n), negatives=(b,), **texts)
    nets.check_ids(inputs, words, ids=0, labels=-100)
    if "negatives" in inputs:
        negatives = np.asarray(inputs["negatives"])
        if ((negatives < 0) | (negatives >= b) | (negatives == np.arange(b))).any():
            raise UserError(f"inputs['negatives'] must name another of the {b} rows for each row")


def pretrain(params: Params, inputs: Arrays, heads: Heads) -> Net:
    """Without `labels`, no word is predicted; without `negatives`, rows get their predecessors."""
    net, recipe = method.build(
        size=nets.size_of(params["encoder"]["blocks"], heads["heads"]),
        decoder=nets.size_of(params["decoder"]["blocks"], heads["decoder-heads"]),
        **embeddings_of(params["patch_embed"], params["text_embed"]),
        contrast_text="masked",
        match_text="masked",
        **NET,
        **QUIRKS,
    )
    check(inputs, net.cube, net.vocab_size)
    labels = np.asarray(inputs.get("labels", np.full(np.shape(inputs["ids"]), -100)))
    negatives = inputs.get("negatives", np.roll(np.arange(len(labels)), 1))
    asked = labels != -100
    clean = np.where(asked, labels, inputs["ids"])
    batch = nets.batch_of({**inputs, "ids": clean}, unit=True)
    draws = method.Draws(
        masking.of_dropped(jnp.asarray(inputs["mask"], bool), nets.same_count(inputs, "mask")),
        jnp.asarray(asked),
        jnp.asarray(inputs["ids"], jnp.int32),
        jnp.asarray(negatives, jnp.int32),
    )

    def run(params: Any) -> dict[str, Any]:
        out = method.forward(net, recipe, params, batch, draws)
        return {n: getattr(out, n) for n in ("pixels", "words", "match", "video", "text")}

    def step(params: Any) -> Any:
        out = method.forward(net, recipe, params, batch, draws)
        found = method.compare(recipe, out, batch, draws)
        short = dict(v="video", t="text", vtc="vtc", vtm="vtm")
        return terms.total(found, recipe.weights), dict(
            target=out.target, pixel_pred=out.pixels, mlm_logits=out.words, vtm_logits=out.match,
            text_feat=out.text, video_feat=out.video,
            **{f"loss_{a}": found[f"loss_{b}"].value() for a, b in short.items()},
        )  # fmt: skip

    return Net(lambda key: method.init(net, recipe, key, nets.spec_of(batch)), run, step)


def finetune(params: Params, inputs: Arrays, heads: Heads) -> Net:
    video, text = params["video"], params["text"]
    size, other = (
        nets.size_of(params[kind]["encoder"]["blocks"], heads["heads"]) for kind in retrieve.KINDS
    )
    if size != other:
        raise UserError(f"the towers are not of one size: video {tuple(size)}, text {tuple(other)}")
    found = embeddings_of(video["patch_embed"], text["text_embed"])
    base = method.make(size=size, decoder="tiny", **found, **NET)  # fine-tuned nets have none
    task, extra = retrieve.make(base=base, **QUIRKS), {kind: {} for kind in retrieve.KINDS}
    check(inputs, found["cube"], found["vocab_size"])
    batch = nets.batch_of(inputs, unit=True)

    def run(params: Any) -> dict[str, Any]:
        return {k: task.encode[k](params, extra, batch)["embedding"] for k in retrieve.KINDS}

    def step(params: Any) -> Any:
        found, nothing = run(params), jnp.zeros((), jnp.int32)
        loss, _ = task.loss(params, extra, batch, jax.random.key(0), nothing)
        unit = {kind: contrastive.normalise(x) for kind, x in found.items()}
        return loss, {**found, "sim": unit["text"] @ unit["video"].T}

    return Net(lambda key: task.init(key, nets.spec_of(batch)), run, step)


def pretrain_reference(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
    args = (inputs[n] for n in ("video", "mask", "ids", "attention_mask"))
    negatives = np.roll(np.arange(nets.ROWS), 1)
    return reference.pretrain(tensors, *args, **nets.named(heads), negatives=negatives)


def finetune_reference(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
    args = (inputs[n] for n in ("video", "ids", "attention_mask"))
    return reference.finetune(tensors, *args, **nets.named(heads))


def draw(prefix: str, text: str) -> nets.Draw:
    words = (f"{text}text_embeddings.{x}_embeddings.weight" for x in ("word", "position"))
    return nets.together(
        nets.draw_video(f"{prefix}.patch_embed.proj.weight"), nets.draw_words(*words)
    )


SOURCE = "wufeim/SimVTP @558d24e"
# Unused tensors of the fine-tuned towers, each of which has both kinds of embeddings.
IDLE = (r"video_encoder\.text_embeddings\..*", r"text_encoder\.patch_embed\..*")
VIDEO = "video (B, 3, T, H, W) normalised with ImageNet's statistics"
FORMATS = {
    "simvtp": Format(
        "the authors' SimVTP as pretrained",
        videomae.STACKS,
        pretrain_rules,
        pretrain,
        (bert.POSITION_IDS,),
        proof=Proof(draw("encoder", ""), pretrain_reference),
        step=Step(
            SOURCE,
            ("video", "mask", "ids", "labels", "attention_mask", "negatives"),
            f"{VIDEO}; mask (B, N), True = hidden; ids (B, L), hidden words already replaced; "
            "labels (B, L), -100 where no word is predicted; attention_mask (B, L); negatives "
            "(B,), each row's wrong video -> target, pixel_pred, mlm_logits, vtm_logits, "
            "text_feat, video_feat, loss_v, loss_t, loss_vtc, loss_vtm, loss",
        ),
    ),
    "simvtp_finetune": Format(
        "the authors' SimVTP as fine-tuned for retrieval: two towers",
        {"heads": "video_encoder.blocks.0.norm1.weight"},
        finetune_rules,
        finetune,
        (bert.POSITION_IDS, *IDLE),
        proof=Proof(draw("video_encoder", "text_encoder."), finetune_reference),
        step=Step(
            SOURCE,
            ("video", "ids", "attention_mask"),
            f"{VIDEO}; ids (B, L), the captions unmasked; attention_mask (B, L) -> video and "
            "text (B, d), before the cosine; sim (B, B), the cosines, rows text; loss, the sum of "
            "both directions' cross-entropies of sim / 0.05",
            idle=f"(?!.*position_ids)({'|'.join(IDLE)})",
        ),
    ),
}
