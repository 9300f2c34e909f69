"""CoCa: Contrastive Captioners are Image-Text Foundation Models (Yu et al., TMLR 2022, arXiv
2205.01917).

Code:      none was released. OpenCLIP's CoCa (mlfoundations/open_clip @89fb801, MIT; not copied)
           follows the paper in part.
Data:      images and videos with captions
Parity:    OpenCLIP's CoCa where it follows the paper, fp64, 1e-9
Idea:      a decoder in two halves. The lower half reads only the words; a class token at their
           end gives the text embedding. The upper half also attends to the video and predicts
           the next word. A single pass thus serves contrast and captioning: L = L_con + 2 L_cap.
           Video tokens are pooled by attention: 256 learned queries for captions, one for contrast.
Command:   vtp train --config coca/pretrain --workdir DIR
Published: ImageNet zero-shot 86.3 (B 82.6, L 84.8), frozen 90.6; K400 / 600 / 700 frozen 88.0 /
           88.5 / 81.1; MSR-VTT full zero-shot R@1 / 5 / 10: text-to-video 30.0 / 52.4 / 61.6,
           video-to-text 49.9 / 73.4 / 81.4; COCO captions CIDEr 143.6.

An image is a clip of one frame. The encoder processes every frame separately, without positions in
time, and the poolers attend to the tokens of all frames: VideoCoCa (Yan et al., arXiv 2212.04979).
A still image repeated over any number of frames therefore gives the same output as the image.

Deviations, each with its reason and with the switch that restores the paper's behaviour:
- L_cap is the mean over all words of a batch, as in all public code; the paper's formula sums over
  the words of a caption, which weights captioning about 20 times more.          sum_words=True
- Zero-shot retrieval pools the tokens of all frames; the paper averages embeddings. frames="mean"
- AdamW replaces Adafactor, here and in the config.

Choices of this implementation where the paper is silent: blocks, projections, and poolers with one
norm for queries and one for the tokens they attend to are OpenCLIP's; one norm of the pooled tokens
serves all decoder layers (OpenCLIP has one for each). The class token takes no row of the position
table, so padding does not change its position. The scale 1 / sigma is clipped at 100, CLIP's bound.
Captions begin with [CLS] and end with [SEP].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vtp_jax import augment
from vtp_jax.nn import generate, sizes
from vtp_jax.nn.backbone import Tokens, by_frame
from vtp_jax.nn.bind import bind, has
from vtp_jax.nn.captioner import Captioner
from vtp_jax.nn.pool import AttentionPool
from vtp_jax.nn.text import causal
from vtp_jax.nn.transformer import Linear, Style
from vtp_jax.nn.vit import ViT
from vtp_jax.objectives import contrastive, terms
from vtp_jax.objectives.classification import scored
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

STYLE = Style("qkv", "gelu", 1e-5)
WEIGHTS = {"contrast": 1.0, "caption": 2.0}
MAX_SCALE = 100.0
# The decoder's lower half for encoders of the same names (table 1); the upper half is as deep.
TEXTS = {
    "tiny": sizes.Size(128, 1, 2, 256),
    "B": sizes.Size(768, 12, 12, 3072),
    "L": sizes.Size(1024, 12, 16, 4096),
    "g": sizes.Size(1408, 18, 16, 5632),
}
CHOICES = dict(poolers=("cascade", "parallel"), frames=("joint", "mean"))


class CoCa(nn.Module):
    """The net: parameters, and the verbs that the loss below uses."""

    size: sizes.Size
    text_size: sizes.Size
    layers: int
    side: int
    patch: int
    queries: int
    poolers: str
    frames: str
    dtype: Any
    remat: str | None
    unroll: int
    vocab_size: int
    length: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def setup(self):
        d, dtype = self.text_size.width, jnp.dtype(self.dtype)
        more: Any = dict(dtype=dtype, remat=self.remat, unroll=self.unroll)
        self.visual = ViT(
            self.size, (self.side // self.patch) ** 2, (1, self.patch, self.patch),
            len(self.mean), STYLE, has_class=False, pooling="mean", mean=self.mean, std=self.std,
            **more,
        )  # fmt: skip
        pooler = partial(
            AttentionPool, width=d, heads=self.text_size.heads, style=STYLE, dtype=dtype
        )
        self.caption_pool, self.contrast_pool = pooler(self.queries), pooler(1)
        self.video_proj = Linear(d, use_bias=False, dtype=dtype)
        self.text = Captioner(
            self.text_size, self.layers, self.vocab_size, self.length, STYLE, **more
        )
        if self.is_initializing():  # otherwise read where it is used: a task may have dropped it
            self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ())

    def see(self, video: Any) -> Tokens:
        """The encoder's last block on every frame. Pixels uint8, or floats in [0, 1]."""
        return by_frame(self.visual.see, video)

    def pool(
        self, tokens: Float[Array, "b n d"], frames: int
    ) -> tuple[Float[Array, "b q e"], Float[Array, "b e"]]:
        """(pooled tokens, from which captions are generated; the video's embedding), from the
        normalised tokens of all frames."""
        b, n, d = tokens.shape
        x = tokens if self.frames == "joint" else tokens.reshape(b * frames, n // frames, d)
        memory = self.caption_pool(x)
        one = self.contrast_pool(memory if self.poolers == "cascade" else x)[:, 0]
        memory, embedding = (
            y.reshape(b, -1, *y.shape[1:]).mean(axis=1) for y in (memory, self.video_proj(one))
        )
        return memory, embedding

    def visit(self, video: Any, ids: Int[Array, "b l"]) -> None:
        """Calls every verb once: linen creates only the parameters that `init` reaches."""
        memory, _ = self.pool(self.visual.norm(self.see(video).raw), video.shape[1])
        self.text.read(ids, jnp.ones(ids.shape, bool))
        self.text.prefill(ids, memory)


class Recipe(NamedTuple):
    """How the net is trained, and how it generates captions; see `build`."""

    weights: Mapping[str, float]
    sum_words: bool
    start_id: int
    end_id: int
    pad_id: int
    beams: int
    penalty: float


class Outputs(NamedTuple):
    """Embeddings and predictions for a batch."""

    video: Float[Array, "b d"]
    text: Float[Array, "b d"]
    logits: Float[Array, "b m v"]  # of words 1, 2, ...; m = l - 1
    scale: Float[Array, ""]  # 1 / sigma


def forward(net: CoCa, params: Params, batch: Batch) -> Outputs:
    """One pass of each half. The last word is left out of prediction, since it has no target."""
    bound = bind(net, params)
    seen = bound.visual.norm(bound.see(batch["video"]).raw)
    memory, video = bound.pool(seen, batch["video"].shape[1])
    words, text = bound.text.read(batch["text"], batch["text_mask"])
    before = words[:, :-1]
    logits = bound.text.predict(before, memory, causal(before.shape[1]))
    return Outputs(video, text, logits, jnp.exp(params["logit_scale"]))


def compare(recipe: Recipe, out: Outputs, batch: Batch) -> dict[str, Mean]:
    """L_con and L_cap (section 3.2), and the accuracy of the next word."""
    valid, found = batch["valid"], {}
    if recipe.weights["contrast"]:
        found["loss_contrast"] = contrastive.both_ways(
            out.video, out.text, valid, temperature=1 / out.scale, sum_directions=True
        )
        found["scale"] = Mean.of(out.scale[None])
    if recipe.weights["caption"]:
        target, asked = batch["text"][:, 1:], batch["text_mask"][:, 1:] & valid[:, None]
        words, found["word_accuracy"] = scored(out.logits, target, asked)
        rows = valid.sum(dtype=words.count.dtype)
        found["loss_caption"] = words._replace(count=rows) if recipe.sum_words else words
    return found


def loss(
    net: CoCa,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array,
    step: Array,
) -> tuple[Array, Out]:
    """L = L_con + 2 L_cap. Nothing is random."""
    found = compare(recipe, forward(net, params, batch), batch)
    return terms.total(found, recipe.weights), Out(found, extra)


def init(net: CoCa, recipe: Recipe, rng: Array, spec: Spec) -> Params:
    augment.one_view(spec, "coca")
    frame = jnp.zeros((1, 1, *spec["video"].shape[-3:]))
    ids = jnp.zeros((1, spec["text"].shape[-1]), jnp.int32)
    return net.init(rng, frame, ids, method="visit")["params"]


def after_update(
    net: CoCa, recipe: Recipe, params: Params, extra: Extra, step: Array
) -> tuple[Params, Extra]:
    scale = jnp.minimum(params["logit_scale"], math.log(MAX_SCALE))
    return {**params, "logit_scale": scale}, extra


# What the trained net is used for.


def encode_video(
    net: CoCa, recipe: Recipe, params: Params, extra: Extra, batch: Batch, rng: Array | None = None
) -> Encoded:
    """Tokens of all frames, in order. memory: the pooled tokens from which captions are generated.
    Tasks that start from `raw` may drop the rest."""
    bound = bind(net, params)
    raw = bound.see(batch["video"]).raw
    found = dict(raw=raw, mask=jnp.ones(raw.shape[:2], bool))
    if has(bound, "caption_pool"):
        tokens = bound.visual.norm(raw)
        memory, embedding = bound.pool(tokens, batch["video"].shape[1])
        found.update(embedding=wide(embedding), tokens=tokens, memory=memory)
    return found


def encode_text(
    net: CoCa, recipe: Recipe, params: Params, extra: Extra, batch: Batch, rng: Array | None = None
) -> Encoded:
    """The tokens of the words are those of the lower half; no norm follows it."""
    words, embedding = bind(net, params).text.read(batch["text"], batch["text_mask"])
    return dict(embedding=wide(embedding), tokens=words, raw=words, mask=batch["text_mask"])


def generate_text(
    net: CoCa,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array | None = None,
) -> Encoded:
    """Captions of the videos: ids i32 "b l" from [CLS] to [SEP], then padding, where l is the
    method's length; score f32 "b", their log probability (with beams: divided by a power of their
    length)."""
    memory = encode_video(net, recipe, params, extra, batch)["memory"]
    ids, start = generate.begin(len(memory), net.length, recipe.start_id, recipe.pad_id)
    _, kept = net.apply(
        {"params": params}, ids, memory,
        method=lambda m, *x: m.text.prefill(*x), mutable=["cache", "context"],
    )  # fmt: skip
    fixed = {"params": params, "context": kept["context"]}

    def step(
        cache: Any, token: Int[Array, " r"], place: Int[Array, " r"]
    ) -> tuple[Float[Array, "r v"], Any]:
        logits, new = net.apply(
            {**fixed, "cache": cache}, token, place, memory,
            method=lambda m, *x: m.text.step(*x), mutable=["cache"],
        )  # fmt: skip
        return logits, new["cache"]

    stop = dict(end_id=recipe.end_id, pad_id=recipe.pad_id)
    if recipe.beams == 1:
        found = generate.greedy(step, kept["cache"], ids, start, **stop)
    else:
        more: Any = dict(beams=recipe.beams, penalty=recipe.penalty, axis=1)  # after the layers
        found = generate.beam(step, kept["cache"], ids, start, **stop, **more)
    return dict(ids=found.ids, score=found.score)


def build(
    *,
    size: str | Sequence[int] = "B",
    text_size: str | Sequence[int] | None = None,
    layers: int | None = None,
    side: int = 288,
    patch: int = 18,
    queries: int = 256,
    poolers: str = "cascade",
    frames: str = "joint",
    weights: Mapping[str, float] | None = None,
    sum_words: bool = False,
    beams: int = 1,
    penalty: float = 1.0,
    length: int = 64,
    dtype: str = "bfloat16",
    remat: str | None = None,
    unroll: int = 1,
    vocab_size: int = 64000,
    cls_id: int = 101,
    sep_id: int = 102,
    pad_id: int = 0,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> tuple[CoCa, Recipe]:
    """CoCa.

    size: of the encoder, a name in `nn.sizes.ENCODERS` or (width, depth, heads, mlp). text_size:
    of the decoder's lower half, a name in `TEXTS` (default: `size`) or four numbers; layers: depth
    of the upper half (default: that of the lower). side, patch: in pixels. queries: pooled
    tokens. poolers: `cascade`, contrast pools the pooled tokens, or `parallel`, it pools all.
    frames: `joint`, poolers attend to all frames, or `mean`, they attend to each frame and their
    outputs are averaged. weights: of `contrast` and `caption`; a loss with weight 0 is not
    computed. sum_words: see above. beams: 1 for greedy generation; penalty: see `nn.generate.beam`.
    length: rows of the position table, and length of generated captions. dtype: of activations and
    matrix products; remat, unroll: see nn.transformer.Stack.
    """
    for name, value in dict(poolers=poolers, frames=frames).items():
        terms.choose(name, value, CHOICES[name])
    sizes.check_patches("side", side, patch)
    if beams < 1 or penalty < 0:
        raise UserError(f"method.beams={beams}, penalty={penalty}: at least 1, and at least 0")
    chosen = sizes.pick(TEXTS, text_size or size, "method.text_size")
    net = CoCa(
        size=sizes.pick(sizes.ENCODERS, size, "method.size"), text_size=chosen,
        layers=layers or chosen.depth, side=side, patch=patch, queries=queries, poolers=poolers,
        frames=frames, dtype=dtype, remat=remat, unroll=unroll, vocab_size=vocab_size,
        length=length, mean=tuple(mean), std=tuple(std),
    )  # fmt: skip
    return net, Recipe(
        weights=terms.weights(weights, WEIGHTS),
        sum_words=sum_words,
        start_id=cls_id,
        end_id=sep_id,
        pad_id=pad_id,
        beams=beams,
        penalty=penalty,
    )


@made_of(build)
def make(**cfg: Any) -> Method:
    verbs = dict(video=encode_video, text=encode_text, generate=generate_text)
    return assemble(*build(**cfg), init=init, loss=loss, encode=verbs, after_update=after_update)
