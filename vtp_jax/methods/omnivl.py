"""OmniVL: One Foundation Model for Image-Language and Video-Language Tasks (Wang et al., NeurIPS
2022, arXiv 2209.07526).

Code:      none was released. On a batch of images with different texts, the three losses are those
           of BLIP (salesforce/BLIP @056a169, BSD; not copied). The blocks are those of TimeSformer
           (facebookresearch/TimeSformer @a5ef29a, CC-BY-NC; not copied).
Data:      images and videos with texts or classes, in alternating batches
Parity:    on images BLIP's code, fp64, 1e-9: losses, hard negatives, queue, gradients; on clips
           TimeSformer's: tokens, gradients
Idea:      one visual encoder for images and videos, which come in alternating batches. Its
           features and a text encoder's are contrasted (UniVLC) against a momentum twin and queues
           of the twin's features. All rows of a class are positives of each other, so that class
           labels serve as texts. A decoder that attends to the visual tokens separates pairs from
           hard wrong ones (VLM), and a causal decoder generates the text (LM).
           L = L_UniVLC + L_VLM + L_LM, all weights 1.
Command:   vtp train --config omnivl/pretrain:images --workdir DIR
           vtp train --config omnivl/pretrain --workdir DIR
Published: fine-tuned text-to-video R@1 / R@5 / R@10: MSR-VTT 47.8 / 74.2 / 83.8, DiDeMo 52.4 / 79.5
           / 85.4; zero-shot: MSR-VTT 34.6 / 58.4 / 66.6, DiDeMo 33.3 / 58.7 / 68.5. MSRVTT-QA 44.1.

Choices of this implementation where the paper is silent:
- Blocks: TimeSformer's, attention over time, then over space; images skip the former. Images have a
  2-D patch embedding, clips a 3-D one (2 frames), whose weights may be initialised by inflating the
  2-D one.
- The three text nets share everything except the causal one's self-attention, and the two decoders
  read a task word instead of [CLS], as in BLIP.
- Momentum, queues, temperature, soft targets (alpha), hard negatives and label smoothing: BLIP's.
- A row with several positives spreads its target evenly over them. A batch of a single class has no
  wrong pairs, and VLM's loss is then 0.
- A row without a class is named by its `id`, so that a clip that recurs while its features are
  still in the queues is its own positive.

Deviations from BLIP, each with its reason:
- The twin runs without dropout, to keep noise out of the targets.
- Queues start empty. BLIP's start with random vectors that count as negatives.
- In-batch keys and wrong pairs come from the whole batch, in BLIP from one GPU's rows.    groups=N
- The config exempts biases and norms from weight decay; BLIP decays everything.     optim.rules
Left out: importing BLIP's weights and those of BERT's blocks; only BERT's words are imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vtp_jax import augment, masking, schedules
from vtp_jax.nn import blip, generate, sizes
from vtp_jax.nn.bind import bind, has
from vtp_jax.nn.blip import Blip
from vtp_jax.objectives import contrastive, matching, momentum, queue, terms
from vtp_jax.objectives.classification import cross_entropy, log_odds
from vtp_jax.types import (
    Batch,
    Encoded,
    Extra,
    Mean,
    Method,
    Out,
    Params,
    Spec,
    UserError,
    assemble,
    made_of,
    wide,
)

WEIGHTS = {"contrast": 1.0, "match": 1.0, "words": 1.0}
TEMPERATURES = (0.001, 0.5)  # BLIP's bounds of the learned temperature
TWIN = r"visual/.*|text/text_embed/.*|text/encoder/blocks/(attn|norm1|norm2|mlp)/.*|\w+_proj/.*"


class Recipe(NamedTuple):
    """How the net is trained, and how it generates text; see `build`."""

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
    wrong: Callable[..., matching.Wrong] = matching.hard  # chooses VLM's wrong pairs


class Outputs(NamedTuple):
    """Outputs of the two encoders for a batch."""

    seen: Float[Array, "b n d"]  # normed visual tokens
    video: Float[Array, "b e"]
    text: Float[Array, "b e"]


def forward(net: Blip, params: Params, batch: Batch, rng: Array | None = None) -> Outputs:
    bound = bind(net, params, rng)
    seen = bound.visual.norm(bound.see(batch["video"]).raw)
    words = bound.read(batch["text"], batch["text_mask"])
    return Outputs(seen, bound.video_proj(seen[:, 0]), bound.text_proj(words[:, 0]))


def match_loss(
    net: Blip,
    params: Params,
    batch: Batch,
    seen: Float[Array, "b n d"],
    wrong: matching.Wrong,
    rng: Array | None = None,
) -> tuple[Mean, Mean]:
    """VLM's loss and accuracy."""
    bound = bind(net, params, rng)
    seen, (ids, mask) = matching.triples(wrong, seen, (batch["text"], batch["text_mask"]))
    fused = bound.fuse(ids, mask, seen)
    return matching.scored(bound.match_head(fused[:, 0]), wrong.asked)


def word_loss(
    net: Blip,
    recipe: Recipe,
    params: Params,
    batch: Batch,
    seen: Float[Array, "b n d"],
    rng: Array | None = None,
) -> Mean:
    """LM: every word of the text from the words before it and the visual tokens."""
    text, mask = batch["text"], batch["text_mask"]
    logits = bind(net, blip.writing(params), rng).write(text, mask, seen)[:, :-1]
    asked = mask[:, 1:] & batch["valid"][:, None]
    return cross_entropy(logits, text[:, 1:], asked, smoothing=recipe.smoothing)


def identities(batch: Batch) -> Int[Array, " b"]:
    """The name of each row: its class, or its own id if it has none. Rows of the same name are each
    other's positives."""
    own = -1 - batch["id"]
    return jnp.where(batch["label"] >= 0, batch["label"], own) if "label" in batch else own


def loss(
    net: Blip, recipe: Recipe, params: Params, extra: Extra, batch: Batch, rng: Array, step: Array
) -> tuple[Array, Out]:
    embed_key, video_key, text_key, match_key, word_key = jax.random.split(rng, 5)
    valid, name, past = batch["valid"], identities(batch), extra["queue"]
    mine = forward(net, params, batch, embed_key)
    twin = forward(net, extra["twin"], batch)
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

    wrong = recipe.wrong((video_key, text_key), alike, near & (name[:, None] != name))
    if recipe.weights["match"]:
        found["loss_match"], found["match_accuracy"] = match_loss(
            net, params, batch, mine.seen, wrong, match_key
        )
    if recipe.weights["words"]:
        found["loss_words"] = word_loss(net, recipe, params, batch, mine.seen, word_key)
    return terms.total(found, recipe.weights), Out(found, {**extra, "queue": past})


# What is carried from step to step.


def init(net: Blip, recipe: Recipe, rng: Array, spec: Spec) -> Params:
    """The causal decoder's own attention is initialised like the text encoder's, because both start
    from BERT."""
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
    """The twin of both encoders, and an empty queue."""
    feature = jax.ShapeDtypeStruct((net.features,), jnp.float32)
    name = jax.ShapeDtypeStruct((), jnp.int32)
    past = queue.init(recipe.queue, video=feature, text=feature, name=name)
    return dict(twin=momentum.twin(params, TWIN), queue=past)


def after_update(
    net: Blip, recipe: Recipe, params: Params, extra: Extra, step: Array
) -> tuple[Params, Extra]:
    twin = momentum.follow(extra["twin"], params, recipe.momentum)
    temperature = jnp.clip(params["temperature"], *TEMPERATURES)
    return {**params, "temperature": temperature}, {**extra, "twin": twin}


# What the trained net is used for.


def encode_video(
    net: Blip,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array | None = None,
) -> Encoded:
    """memory: the normed tokens, which the decoders attend to."""
    bound = bind(net, params, rng)
    raw = bound.see(batch["video"]).raw
    tokens = bound.visual.norm(raw)
    found = dict(raw=raw, tokens=tokens, mask=jnp.ones(raw.shape[:2], bool), memory=tokens)
    return with_embedding(bound, "video", found)


def encode_text(
    net: Blip,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array | None = None,
) -> Encoded:
    """memory: the ids, which the decoders read again. BERT's blocks end with their norm, so raw and
    tokens are the same."""
    bound = bind(net, params, rng)
    tokens = bound.read(batch["text"], batch["text_mask"])
    found = dict(raw=tokens, tokens=tokens, mask=batch["text_mask"], memory=batch["text"])
    return with_embedding(bound, "text", found)


def with_embedding(bound: Blip, kind: str, found: dict[str, Array]) -> Encoded:
    """`found` with the embedding, unless a task has dropped the projection."""
    if not has(bound, f"{kind}_proj"):
        return found
    vector = getattr(bound, f"{kind}_proj")(found["tokens"][:, 0])
    return {**found, "embedding": wide(vector)}


def score_pair(
    net: Blip,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    video: Encoded,
    text: Encoded,
    rng: Array | None = None,
) -> Encoded:
    """score: VLM's log odds that video i and text i are a pair; embedding: the fused token from
    which VLM's head computes them."""
    bound = bind(net, params, rng)
    fused = wide(bound.fuse(text["memory"], text["mask"], video["memory"])[:, 0])
    if not has(bound, "match_head"):
        return dict(embedding=fused)
    return dict(score=log_odds(bound.match_head(fused)), embedding=fused)


def generate_text(
    net: Blip, recipe: Recipe, params: Params, extra: Extra, batch: Batch, rng: Array | None = None
) -> Encoded:
    """ids i32 "b l": a text for each clip from [CLS] to [SEP], then padding, where l is the
    method's length; score f32 "b": the mean log probability of its words. Every step reads the
    whole text so far, which is short."""
    bound = bind(net, blip.writing(params), rng)
    seen = bound.visual.norm(bound.see(batch["video"]).raw)
    ids, first = generate.begin(len(seen), recipe.length, recipe.start_id, net.pad_id)

    def read(ids: Int[Array, "r l"], mask: Array) -> Float[Array, "r l v"]:
        return bound.write(ids, mask, seen)[..., : net.vocab_size]

    found = generate.beam(
        generate.rereading(read), ids, ids, first,
        beams=recipe.beams, end_id=recipe.end_id, pad_id=net.pad_id,
    )  # fmt: skip
    return dict(ids=found.ids, score=found.score)


def build(
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
) -> tuple[Blip, Recipe]:
    """OmniVL. Batches need `video` (one frame: images), `text`, `text_mask` and `id`, and may have
    `label` (-1 for a row without a class). Classes are numbered across all data sets.

    size, text_size: names in `nn.sizes.ENCODERS`, or (width, depth, heads, mlp). features: width of
    embeddings. picture: side in pixels; frames: maximum number in a clip. cube: frames, rows and
    columns of a clip's token; an image's token has one frame. weights: of the losses contrast,
    match and words; match and words are not computed at weight 0. temperature: initial value of the
    learned one. queue: number of places. momentum: of the twin. alpha: a schedule, the twin's share
    in the targets of contrast. smoothing: of the targets of words. length, beams: of generated
    texts, which begin with cls_id and end with sep_id. dropout: BERT's. text_length: rows of the
    position table. The rest is as in nn.transformer.Stack.
    """
    if frames < 2 * cube[0]:
        raise UserError(
            f"method.frames={frames}: a clip needs at least 2 cubes of {cube[0]} frames"
        )
    sizes.check_patches("picture", picture, *cube[1:])
    net = Blip(
        size=sizes.pick(sizes.ENCODERS, size, "method.size"),
        text_size=sizes.pick(sizes.ENCODERS, text_size, "method.text_size"),
        features=features, picture=picture, frames=frames, cube=(cube[0], cube[1], cube[2]),
        dropout=dropout, drop_path=drop_path, dtype=dtype, remat=remat, unroll=unroll,
        vocab_size=vocab_size, text_length=text_length, pad_id=pad_id, mean=tuple(mean),
        std=tuple(std),
    )  # fmt: skip
    return net, Recipe(
        weights=terms.weights(weights, WEIGHTS),
        temperature=temperature,
        queue=queue,
        momentum=momentum,
        alpha=schedules.make(alpha, "method.alpha"),
        smoothing=smoothing,
        groups=groups,
        length=min(length, text_length),
        beams=beams,
        start_id=cls_id,
        end_id=sep_id,
    )


@made_of(build)
def make(**cfg: Any) -> Method:
    verbs = dict(video=encode_video, text=encode_text, pair=score_pair, generate=generate_text)
    return assemble(
        *build(**cfg), init=init, loss=loss, encode=verbs, start=start, after_update=after_update
    )
