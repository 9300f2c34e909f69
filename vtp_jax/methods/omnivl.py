"""OmniVL: One Foundation Model for Image-Language and Video-Language Tasks (Wang et al., NeurIPS
2022, arXiv 2209.07526).

Code:      none was released. On a batch of images whose texts are all different, the three losses
           are those of BLIP (salesforce/BLIP @056a169, BSD; not copied).
Data:      images and videos with texts or classes, in alternating batches
Parity:    on images BLIP's code, fp64, 1e-9: losses, hard negatives, queue, gradients
Idea:      one visual encoder for images and videos, whose batches alternate. A text encoder is
           contrasted with it (UniVLC): against a momentum twin and queues of its features, where
           rows of one class all count as each other's pairs: so classes are texts like others. A
           decoder that attends to what is seen tells pairs from hard wrong ones (VLM), and a causal
           one writes the text (LM). L = L_UniVLC + L_VLM + L_LM, all weights 1.
Command:   python -m vtp_jax.train --config configs/omnivl/pretrain.py:images --workdir DIR
           python -m vtp_jax.train --config configs/omnivl/pretrain.py --workdir DIR
Published: fine-tuned text-to-video R@1 / R@5 / R@10: MSR-VTT 47.8 / 74.2 / 83.8, DiDeMo 52.4 / 79.5
           / 85.4; zero-shot: MSR-VTT 34.6 / 58.4 / 66.6, DiDeMo 33.3 / 58.7 / 68.5. MSRVTT-QA 44.1.

The paper as we could read it leaves open, and these are choices of ours:
- Blocks: TimeSformer's, attention over time, then over space; images skip the first. Images are cut
  by a 2-D, clips by a 3-D embedding (2 frames), whose weights may start as the former's, inflated.
- The three text nets share everything but the causal one's self-attention, and begin with a word
  of their own in [CLS]'s place: BLIP's.
- Momentum, queues, temperature, soft targets (alpha), hard negatives and label smoothing: BLIP's.
- A row with several positives spreads its target evenly over them. In a batch of one class, for
  whom nobody is wrong, VLM asks nothing.
- A row without a class is named by its place in the data (`id`), so that a clip that comes again
  while its features are still in the queues is its own positive.

Deviations from BLIP, each with its reason:
- The twin works without dropout: a target should not be noise.
- Queues begin empty. BLIP's begin with random vectors that count as negatives.
- In-batch keys and wrong pairs come from the whole batch, BLIP's from one GPU's.          groups=N
- Its config spares biases and norms weight decay, BLIP decays all.                  optim.rules
Left out: BLIP's weights do not come in, nor do BERT's blocks, only its words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtp_jax import augment, masking, schedules, tree
from vtp_jax.nn import blip, sizes
from vtp_jax.nn import generate as generation
from vtp_jax.nn.blip import Blip
from vtp_jax.objectives import contrastive, queue
from vtp_jax.objectives.classification import accuracy, cross_entropy
from vtp_jax.types import Batch, Encoded, Extra, Mean, Method, Out, Params, Spec, UserError

WEIGHTS = {"contrast": 1.0, "match": 1.0, "words": 1.0}
TWIN = r"visual/.*|text/text_embed/.*|text/encoder/blocks/(attn|norm1|norm2|mlp)/.*|\w+_proj/.*"


class Recipe(NamedTuple):
    """How it is trained, and how it writes; see `make`."""

    weights: Mapping[str, float]
    temperature: float
    queue: int
    momentum: float
    alpha: schedules.Schedule
    smoothing: float
    groups: int
    length: int
    beams: int
    start_id: int
    end_id: int


class Embedded(NamedTuple):
    """What the two encoders say of a batch."""

    seen: Float[Array, "b n d"]  # normed tokens
    video: Float[Array, "b e"]
    text: Float[Array, "b e"]


def embedded(net: Blip, params: Params, batch: Batch, rng: Array | None = None) -> Embedded:
    bound = blip.bind(net, params, rng)
    seen = bound.visual.norm(bound.see(batch["video"]))
    words = bound.read(batch["text"], batch["text_mask"])
    return Embedded(seen, bound.video_proj(seen[:, 0]), bound.text_proj(words[:, 0]))


def match(
    net: Blip,
    params: Params,
    batch: Batch,
    seen: Float[Array, "b n d"],
    wrong: Mapping[str, Int[Array, " b"]],
    asked: Bool[Array, " b"],
    rng: Array | None = None,
) -> dict[str, Mean]:
    """VLM: each row's pair, its text with a wrong video, and its video with a wrong text."""
    b, text, mask = len(asked), batch["text"], batch["text_mask"]
    bound = blip.bind(net, params, rng)
    ids, mask = (jnp.concatenate([x, x, x[wrong["text"]]]) for x in (text, mask))
    fused = bound.fuse(ids, mask, jnp.concatenate([seen, seen[wrong["video"]], seen]))
    logits, label = bound.match_head(fused[:, 0]), (jnp.arange(3 * b) < b).astype(jnp.int32)
    asked = jnp.tile(asked, 3)
    return dict(
        loss_match=cross_entropy(logits, label, asked),
        match_accuracy=accuracy(logits, label, asked),
    )


def write(
    net: Blip,
    recipe: Recipe,
    params: Params,
    batch: Batch,
    seen: Float[Array, "b n d"],
    rng: Array | None = None,
) -> Mean:
    """LM: every word of the text from those before it and from what is seen."""
    text, mask = batch["text"], batch["text_mask"]
    logits = blip.bind(net, blip.writing(params), rng).write(text, mask, seen)[:, :-1]
    asked = mask[:, 1:] & batch["valid"][:, None]
    return cross_entropy(logits, text[:, 1:], asked, smoothing=recipe.smoothing)


def loss(
    net: Blip, recipe: Recipe, params: Params, extra: Extra, batch: Batch, rng: Array, step: Array
) -> tuple[Array, Out]:
    embed_key, video_key, text_key, match_key, write_key = jax.random.split(rng, 5)
    valid, name, past = batch["valid"], names(batch), extra["queue"]
    mine = embedded(net, params, batch, embed_key)
    twin = embedded(net, extra["twin"], batch)
    found = {"temperature": Mean.of(params["temperature"][None])}

    near = masking.together(valid, recipe.groups)
    found["loss_contrast"], alike = contrastive.with_twin(
        (mine.video, mine.text),
        (twin.video, twin.text),
        (past["video"], past["text"], past["name"], past["real"]),
        name,
        near,
        temperature=params["temperature"],
        alpha=recipe.alpha(step),
    )
    past = queue.push(past, dict(video=twin.video, text=twin.text, name=name), valid)

    allowed = near & (name[:, None] != name)
    wrong = dict(
        video=masking.hard_negatives(video_key, alike[1], allowed),
        text=masking.hard_negatives(text_key, alike[0], allowed),
    )
    if recipe.weights["match"]:
        asked = allowed.any(axis=1)
        found.update(match(net, params, batch, mine.seen, wrong, asked, match_key))
    if recipe.weights["words"]:
        found["loss_words"] = write(net, recipe, params, batch, mine.seen, write_key)
    value = sum(w * found[f"loss_{name}"].value() for name, w in recipe.weights.items() if w)
    return jnp.asarray(value), Out(found, dict(twin=extra["twin"], queue=past))


def names(batch: Batch) -> Int[Array, " b"]:
    """Rows of one name are each other's pairs: a class, or what is no class's, the row's own id."""
    own = -1 - batch["id"]
    return jnp.where(batch["label"] >= 0, batch["label"], own) if "label" in batch else own


# What is carried from step to step.


def init(net: Blip, recipe: Recipe, rng: Array, spec: Spec) -> Params:
    """The causal decoder's own attention starts as the text encoder's, as both start from BERT."""
    augment.one_view(spec, "omnivl")
    *_, h, w, c = spec["video"].shape
    image, clip = (jnp.zeros((1, frames, h, w, c)) for frames in (1, net.frames))
    ids = jnp.zeros((1, spec["text"].shape[-1]), jnp.int32)
    params = net.init(rng, image, clip, ids, method="visit")["params"]
    blocks = params["text"]["encoder"]["blocks"]
    return {
        **params,
        "decoder": {"blocks": {name: blocks[name] for name in blip.OWN}},
        "temperature": jnp.float32(recipe.temperature),
    }


def start(net: Blip, recipe: Recipe, rng: Array, spec: Spec, params: Params) -> Extra:
    """The twin of what encodes, and empty queues."""
    feature = jax.ShapeDtypeStruct((net.features,), jnp.float32)
    name = jax.ShapeDtypeStruct((), jnp.int32)
    past = queue.init(recipe.queue, video=feature, text=feature, name=name)
    return dict(twin=queue.twin(encoders(params)), queue=past)


def after_update(
    net: Blip, recipe: Recipe, params: Params, extra: Extra, step: Array
) -> tuple[Params, Extra]:
    twin = queue.moving_average(extra["twin"], encoders(params), recipe.momentum)
    temperature = jnp.clip(params["temperature"], 0.001, 0.5)
    return {**params, "temperature": temperature}, {**extra, "twin": twin}


def encoders(params: Params) -> Params:
    """The parameters that have a twin."""
    return tree.split(params, lambda name: re.fullmatch(TWIN, name) is not None)[0]


# What the trained net is used for.


def encode_video(
    net: Blip, params: Params, extra: Extra, batch: Batch, rng: Array | None = None
) -> Encoded:
    """memory: the normed tokens, which the decoders attend to."""
    bound = blip.bind(net, params, rng)
    raw = bound.see(batch["video"])
    tokens = bound.visual.norm(raw)
    found = dict(raw=raw, tokens=tokens, mask=jnp.ones(raw.shape[:2], bool), memory=tokens)
    return with_embedding(bound, "video", found)


def encode_text(
    net: Blip, params: Params, extra: Extra, batch: Batch, rng: Array | None = None
) -> Encoded:
    """memory: the ids, which the decoders read anew. BERT's blocks end in their norm."""
    bound = blip.bind(net, params, rng)
    tokens = bound.read(batch["text"], batch["text_mask"])
    found = dict(raw=tokens, tokens=tokens, mask=batch["text_mask"], memory=batch["text"])
    return with_embedding(bound, "text", found)


def with_embedding(bound: Blip, kind: str, found: dict[str, Array]) -> Encoded:
    """Tasks may drop the projections."""
    if f"{kind}_proj" not in bound.variables["params"]:
        return found
    vector = getattr(bound, f"{kind}_proj")(found["tokens"][:, 0])
    return {**found, "embedding": vector.astype(jnp.promote_types(vector.dtype, jnp.float32))}


def score_pair(
    net: Blip, params: Params, extra: Extra, video: Encoded, text: Encoded, rng: Array | None = None
) -> Encoded:
    """score: VLM's log odds that row i of the one belongs to row i of the other; embedding: the
    fused token that tells it."""
    bound = blip.bind(net, params, rng)
    fused = bound.fuse(text["memory"], text["mask"], video["memory"])[:, 0]
    fused = fused.astype(jnp.promote_types(fused.dtype, jnp.float32))
    if "match_head" not in params:
        return dict(embedding=fused)
    logits = bound.match_head(fused).astype(jnp.float32)
    return dict(score=logits[:, 1] - logits[:, 0], embedding=fused)


def generate(
    net: Blip, recipe: Recipe, params: Params, extra: Extra, batch: Batch, rng: Array | None = None
) -> Encoded:
    """ids i32 "b l": a text for each clip from [CLS] to [SEP], then padding, l the method's length;
    score f32 "b": the mean log probability of its words. Every step reads the text so far anew, for
    texts are short."""
    bound = blip.bind(net, blip.writing(params), rng)
    seen = bound.visual.norm(bound.see(batch["video"]))
    ids, start = generation.begin(len(seen), recipe.length, recipe.start_id, net.pad_id)

    def read(ids: Int[Array, "r l"], mask: Bool[Array, "r l"]) -> Float[Array, "r l v"]:
        return bound.write(ids, mask, seen)[..., : net.vocab_size]

    said = generation.beam(
        generation.rereading(read), ids, ids, start,
        beams=recipe.beams, end_id=recipe.end_id, pad_id=net.pad_id,
    )  # fmt: skip
    return dict(ids=said.ids, score=said.score)


def make(
    *,
    size: str | Sequence[int] = "B",
    text_size: str | Sequence[int] = "B",
    features: int = 256,
    picture: int = 224,
    frames: int = 8,
    cube: Sequence[int] = (2, 16, 16),
    weights: Mapping[str, float] | None = None,
    temperature: float = 0.07,
    queue: int = 57600,
    momentum: float = 0.995,
    alpha: float | Mapping[str, Any] = 0.4,
    smoothing: float = 0.1,
    groups: int = 1,
    length: int = 30,
    beams: int = 3,
    dropout: float = 0.1,
    drop_path: float = 0.0,
    dtype: str = "bfloat16",
    remat: str | None = None,
    unroll: int = 1,
    vocab_size: int = 30522,
    text_length: int = 512,
    pad_id: int = 0,
    cls_id: int = 101,
    sep_id: int = 102,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> Method:
    """OmniVL as a `Method`. Batches need `video` (of one frame: images), `text`, `text_mask`, `id`,
    and may have `label` (-1 where a row has no class); classes of all data are numbered as one.

    size, text_size: names in `nn.sizes.ENCODERS`, or (width, depth, heads, mlp). features: width of
    embeddings. picture: pixels of a side; frames: of a clip, at most. cube: frames, rows and
    columns of a clip's token; an image's is one frame of it. weights: of contrast, match and words;
    match and words are not computed at weight 0. temperature: of step 0, learned from there. queue:
    rows held. momentum: of the twin. alpha: a schedule, the twin's share in contrast's targets.
    smoothing: of words. length, beams: of texts that are generated; cls_id begins them, sep_id ends
    them. dropout: BERT's. text_length: rows of the position table. The rest as in
    nn.transformer.Stack.
    """
    weights = {**WEIGHTS, **(weights or {})}
    if wrong := sorted(set(weights) - set(WEIGHTS)):
        raise UserError(f"method.weights: no loss '{wrong[0]}'; known: {', '.join(WEIGHTS)}")
    if frames < 2 * cube[0]:
        raise UserError(f"method.frames={frames}: a clip has 2 cubes of {cube[0]} frames or more")
    net = Blip(
        sizes.pick(sizes.ENCODERS, size, "method.size"),
        sizes.pick(sizes.ENCODERS, text_size, "method.text_size"),
        features, picture, frames, (cube[0], cube[1], cube[2]), dropout, drop_path, dtype, remat,
        unroll, vocab_size, text_length, pad_id, tuple(mean), tuple(std),
    )  # fmt: skip
    share = schedules.make(alpha, "method.alpha")
    recipe = Recipe(
        weights, temperature, queue, momentum, share, smoothing, groups,
        min(length, text_length), beams, cls_id, sep_id,
    )  # fmt: skip
    verbs = dict(video=encode_video, text=encode_text, pair=score_pair)
    return Method(
        init=partial(init, net, recipe),
        loss=partial(loss, net, recipe),
        encode={
            **{name: partial(verb, net) for name, verb in verbs.items()},
            "generate": partial(generate, net, recipe),
        },
        start=partial(start, net, recipe),
        after_update=partial(after_update, net, recipe),
    )
