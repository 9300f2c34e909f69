"""BLIP, which OmniVL equals on images with different texts: the encoders with their momentum twins,
matching, and the causal decoder, which has its own self-attention and shares the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vtp_jax import tree
from vtp_jax.convert import nets, rules
from vtp_jax.convert.families import bert, timm
from vtp_jax.convert.formats import Format, Step, Tensors
from vtp_jax.convert.nets import Arrays, Heads, Net
from vtp_jax.convert.rules import Rule
from vtp_jax.methods import omnivl as method
from vtp_jax.objectives import contrastive, matching, momentum
from vtp_jax.types import Params

WORDS = "text_encoder{}.embeddings.word_embeddings.weight"
TYPES = "text_encoder{}.embeddings.token_type_embeddings.weight"
TASKS = 2  # words that the model adds, at the end of BLIP's table


def encoder_rules(heads: int, text_heads: int, twin: str = "") -> list[Rule]:
    """The rules of the two encoders and their projections. twin: "_m" for the momentum ones."""
    words = [
        *bert.embedding_rules("text_embed", "embeddings"),
        Rule("text_embed/task", "embeddings.word_embeddings.weight.task", rules.SAME),
        *rules.stack("encoder", "encoder.layer", text_heads, bert.BERT),
    ]
    return [
        *rules.under(timm.vit_rules(heads, head=None), "visual/", f"visual_encoder{twin}."),
        *rules.under(words, "text/", f"text_encoder{twin}."),
        *rules.linear("video_proj", f"vision_proj{twin}"),
        *rules.linear("text_proj", f"text_proj{twin}"),
    ]


def pretrain_rules(heads: int, text_heads: int) -> list[Rule]:
    decoder = rules.stack("decoder", "text_decoder.bert.encoder.layer", text_heads, bert.BERT)
    head = "text_decoder.cls.predictions"
    online = [
        *encoder_rules(heads, text_heads),
        *bert.cross_rules("text/encoder", "text_encoder.encoder.layer", text_heads),
        *rules.linear("match_head", "itm_head"),
        *(r for r in decoder if "/attn/" in r.param or "/norm1/" in r.param),
        *rules.linear("word_head/fc", f"{head}.transform.dense"),
        *rules.norm("word_head/norm", f"{head}.transform.LayerNorm"),
        Rule("word_head/bias", f"{head}.bias", rules.SAME),
        Rule("temperature", "temp", rules.SAME),
    ]
    twins = encoder_rules(heads, text_heads, "_m")
    return [*rules.under(online, "params/"), *rules.under(twins, "twin/")]


def tidy(tensors: Tensors) -> Tensors:
    """Separates the words that the model adds from the vocabulary; adds zeros for the token types,
    which BLIP's BERT lacks."""
    found = dict(tensors)
    for twin in ("", "_m"):
        if (name := WORDS.format(twin)) in found:
            words = np.asarray(found[name])
            found[name], found[f"{name}.task"] = words[:-TASKS], words[-TASKS:]
            found[TYPES.format(twin)] = np.zeros((2, words.shape[-1]), words.dtype)
    return found


def untidy(tensors: Tensors) -> Tensors:
    found = dict(tensors)
    for twin in ("", "_m"):
        if (task := f"{WORDS.format(twin)}.task") in found:
            name = WORDS.format(twin)
            found[name] = np.concatenate([found[name], found.pop(task)])
            del found[TYPES.format(twin)]
    return found


def complete(params: Params, shapes: Params) -> Params:
    """The parameters with constants for those that only clips use, which BLIP lacks."""
    rest = jax.tree.map(lambda x: np.full(x.shape, 0.1), shapes)
    return tree.replace(rest, tree.flatten(params))


def pretrain(params: Params, inputs: Arrays, heads: Heads) -> Net:
    """params: {"params": the trained ones, "twin": their average before the step}."""
    nets.check_pixels(inputs, "image")
    visual, text = params["params"]["visual"], params["params"]["text"]
    features = params["params"]["video_proj"]["bias"].shape[0]
    patch = nets.cube_of(visual["patch_embed"])[1]
    places, length = np.shape(inputs["image_queue"])[1], inputs["ids"].shape[-1]
    net, recipe = method.build(
        size=nets.size_of(visual["encoder"]["blocks"], heads["heads"]),
        text_size=nets.size_of(text["encoder"]["blocks"], heads["text-heads"]),
        features=features, picture=nets.side_of(visual["position"]) * patch, frames=4,
        cube=(2, patch, patch), queue=places, dropout=0.0,
        vocab_size=len(text["text_embed"]["word"]),
        text_length=len(text["text_embed"]["position"]), **nets.NORMALISED,
    )  # fmt: skip
    b = len(inputs["image"])
    nets.check_shapes(
        inputs, ids=(b, length), attention_mask=(b, length), image_neg=(b,), text_neg=(b,),
        image_queue=(features, places), text_queue=(features, places),
    )  # fmt: skip
    nets.check_ids(inputs, net.vocab_size, ids=0)
    batch = {**nets.batch_of(inputs, unit=False), "id": jnp.arange(b, dtype=jnp.int32)}
    past = dict(
        video=jnp.asarray(inputs["image_queue"], jnp.float64).T,
        text=jnp.asarray(inputs["text_queue"], jnp.float64).T,
        next=jnp.int32(inputs["queue_ptr"]),
        real=jnp.ones(places, bool),
        name=-100 - jnp.arange(places, dtype=jnp.int32),  # different from all names of the batch
    )
    # A schedule would round to fp32.
    recipe = recipe._replace(alpha=lambda step: float(inputs["alpha"]))

    def fresh(key: Any) -> Params:
        return method.init(net, recipe, key, nets.spec_of(batch))

    shapes = jax.eval_shape(fresh, jax.random.key(0))
    twin_shapes = jax.eval_shape(lambda params: momentum.twin(params, method.TWIN), shapes)

    def step(params: Any) -> Any:
        """BLIP updates the average at the start of a step."""
        online, chosen = complete(params["params"], shapes), []
        old = complete(params["twin"], twin_shapes)
        twin = momentum.follow(old, online, float(inputs["momentum"]))

        def choose(rngs: Any, alike: Any, allowed: Any) -> matching.Wrong:
            chosen.append(given_wrong(inputs, alike, allowed))
            return chosen[-1]

        extra = jax.lax.stop_gradient(dict(twin=twin, queue=past))
        fixed, zero = recipe._replace(wrong=choose), jnp.int32(0)
        loss, out = method.loss(net, fixed, online, extra, batch, jax.random.key(0), zero)
        terms = dict(ita="contrast", itm="match", lm="words")
        queue, (wrong,) = out.extra["queue"], chosen
        return loss, dict(
            **{f"loss_{a}": out.metrics[f"loss_{b}"].value() for a, b in terms.items()},
            image_neg=wrong.video, text_neg=wrong.text,
            image_queue=contrastive.normalise(queue["video"]).T,
            text_queue=contrastive.normalise(queue["text"]).T, queue_ptr=queue["next"],
        )  # fmt: skip

    def init(key: Any) -> Params:
        online = fresh(key)
        return dict(params=online, twin=momentum.twin(online, method.TWIN))

    return Net(init, lambda params: step(params)[1], step)


def given_wrong(inputs: Mapping[str, Any], alike: Any, allowed: Any) -> matching.Wrong:
    """The wrong pairs in `inputs`; otherwise the most likely ones."""
    names = ("image_neg", alike[1]), ("text_neg", alike[0])
    video, text = (
        jnp.asarray(inputs[name], jnp.int32)
        if name in inputs
        else jnp.argmax(jnp.where(allowed, scores, -jnp.inf), axis=1).astype(jnp.int32)
        for name, scores in names
    )
    return matching.Wrong(video, text, allowed.any(axis=1))


UNUSED = (  # buffers, and the parts of the decoder that are the text encoder's under another name
    bert.POSITION_IDS,
    r"image_queue|text_queue|queue_ptr",
    r"text_decoder\.bert\.embeddings\..*",
    r"text_decoder\.bert\.encoder\.layer\.\d+\.(crossattention|intermediate|output)\..*",
    r"text_decoder\.cls\.predictions\.decoder\..*",
    r"text_encoder_m\.encoder\.layer\.\d+\.crossattention\..*",
)
FORMATS = {
    "omnivl": Format(
        "OmniVL on images: BLIP as pretrained",
        {
            "heads": "visual_encoder.blocks.0.norm1.weight",
            "text-heads": "text_encoder.encoder.layer.0.attention.output.LayerNorm.weight",
        },
        pretrain_rules,
        pretrain,
        UNUSED,
        tidy=tidy,
        untidy=untidy,
        step=Step(
            "salesforce/BLIP @056a169",
            (
                "image", "ids", "attention_mask", "image_queue", "text_queue", "queue_ptr", "alpha",
                "momentum",
            ),
            "image (B, 3, H, W), normalised; ids (B, L), the first one [CLS]; attention_mask (B, "
            "L); image_queue and text_queue (d, K); queue_ptr, alpha, momentum (); image_neg and "
            "text_neg (B,), wrong pairs, by default the most likely ones -> loss_ita, "
            "loss_itm, loss_lm, loss; image_neg and text_neg; the queues and queue_ptr after the "
            "step",
            frozen=r"\w+_m\b.*",
        ),
    )
}  # fmt: skip
