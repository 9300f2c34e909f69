"""TVTSv2: Learning Out-of-the-box Spatiotemporal Visual Representations at Scale (Zeng et al.,
arXiv 2305.14173).

Code:      TencentARC/TVTS @290a63e, folder v2; not copied. Its released models are imported by
           `vtp_jax.convert import --format tvtsv2` or `tvtsv2_h14`.
Data:      clips in order with their transcripts
Parity:    official code, fp64, 1e-9: outputs, losses, gradients
Idea:      extend CLIP to videos without forgetting: each block of its image tower gets attention
           over time, among the tokens of one place in all frames; half of the tubes are dropped.
           Two losses: contrast of the clip with the mean of its K texts (VTC), and transcript
           sorting: given the clip's tokens, a small Transformer predicts the turn of each of K
           pieces of the transcript, which it receives without their order. Speech recognition is
           noisy, and a text tower trained on its transcripts forgets CLIP's knowledge, so its first
           three quarters are frozen. L = L_vtc + 2 L_sort.
Command:   vtp train --config tvtsv2/pretrain_yt_webvid --workdir DIR
Published: zero-shot MSR-VTT text-to-video R@1 B/32 34.5, B/16 35.9, H/14 38.2 (CLIP B/16: 31.8);
           DiDeMo 31.2, 33.4, 34.6; K400 top-1 B/16 54.3, H/14 59.6 (CLIP B/16: 48.0).

The batch: `video` "b t h w c", or "b v t h w c" with the clips of a longer video in order, which
are concatenated; `text` "b k l", a text for each part of the video in order, or "b l" for a single
clip (WebVid), which has nothing to sort. Batches of both kinds may alternate.

Deviations, each with its reason and with the switch that restores the reference:
- In attention over time, the last matrix is initialised to 0. In the code the first is 0 and the
  last all ones, a saddle that only rounding errors leave.              time_init="reference"
- The code's gather of embeddings gives each GPU only the gradient of its own rows, which is then
  divided by the number of GPUs: relative to sorting, contrast weighs 1 / GPUs. Here its weight is
  that of the paper's sum.                                                weights.vtc=1/GPUs
- With a ratio of 0.7 the code keeps int(256 * 0.3) = 76 places of H/14; here int(ratio * places)
  are dropped.                                                           ratio=180/256
- "b v t h w c" has t frames of every clip. The code draws all frames from equal parts of the whole
  video, so that clips may have one more or less; use a batch of "b t h w c" for that.
- The sorter's matrices have the initialisation of the other nets here (Xavier), not PyTorch's.
Left out: retrieval with the dual softmax, zero-shot classes by a prompt, the linear probe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from vtp_jax import masking
from vtp_jax.nn import embed, sizes
from vtp_jax.nn.backbone import Tokens
from vtp_jax.nn.bind import bind
from vtp_jax.nn.spacetime import TIME_INITS, SpaceTimeViT
from vtp_jax.nn.text import CausalText
from vtp_jax.nn.transformer import ACTIVATIONS, CLIP, VIT, Linear, Stack, layer_norm
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
    TokenMask,
    UserError,
    assemble,
    made_of,
    wide,
)

WEIGHTS = {"vtc": 1.0, "sort": 2.0}
SORTED_BY = ("tokens", "patches")


class Sorter(nn.Module):
    """Predicts the turn of each of K texts. It has no positions: texts differ only by content."""

    size: sizes.Size
    turns: int
    dtype: Any

    @nn.compact
    def __call__(
        self, video: Float[Array, "b n e"], texts: Float[Array, "b k e"]
    ) -> Float[Array, "b k turns"]:
        kind = self.param("type", nn.initializers.zeros, (2, self.size.width)).astype(self.dtype)
        x = jnp.concatenate([video + kind[0], texts + kind[1]], axis=1)
        x = Stack(self.size, 0.0, VIT, self.dtype, name="encoder")(x)[:, video.shape[1] :]
        x = layer_norm(self.dtype, VIT.eps, "norm")(x)
        return Linear(self.turns, dtype=self.dtype, name="head")(x)


class TVTSv2(nn.Module):
    """Parameters, and the verbs that the loss below uses; see `build`."""

    size: sizes.Size
    text_size: sizes.Size
    features: int
    grid: int  # patches along a side of the picture
    patch: int
    frames: int
    turns: int
    sorted_by: str
    act: str
    time_init: str
    dtype: Any
    remat: str | None
    unroll: int
    vocab_size: int
    text_length: int
    sep_id: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def setup(self):
        rest: Any = dict(
            style=CLIP._replace(act=self.act), dtype=jnp.dtype(self.dtype), remat=self.remat,
            unroll=self.unroll,
        )  # fmt: skip
        self.visual = SpaceTimeViT(
            self.size, self.grid**2, (1, self.patch, self.patch), len(self.mean), first_norm=True,
            features=self.features, frames=self.frames, time_init=self.time_init, mean=self.mean,
            std=self.std, **rest,
        )  # fmt: skip
        self.text = CausalText(
            self.text_size, self.features, self.vocab_size, self.text_length, self.sep_id, **rest
        )
        # As wide as the embeddings, with heads of 64, as in the code.
        e = self.features
        sorter = sizes.Size(e, 2, max(e // 64, 1), 4 * e)
        self.sorter = Sorter(sorter, self.turns, rest["dtype"])

    def see(self, video: Num[Array, "b t h w c"], hide: TokenMask | None = None) -> Tokens:
        """The tower's output (`nn.backbone`), the clip's token first."""
        return self.visual.see(video, hide)

    def project(self, raw: Float[Array, "b n d"]) -> Float[Array, "b n e"]:
        """All tokens, projected to the space that video and text share. H/14's code projects
        patches without a norm."""
        if self.sorted_by == "tokens":
            return self.visual.project(raw)
        first, rest = self.visual.project(raw[:, :1]), self.visual.proj(raw[:, 1:])
        return jnp.concatenate([first, rest], axis=1)

    def encode_texts(self, ids: Int[Array, "b k l"]) -> Float[Array, "b k e"]:
        return self.text(ids.reshape(-1, ids.shape[-1])).reshape(*ids.shape[:2], -1)

    def sort(
        self, tokens: Float[Array, "b n e"], texts: Float[Array, "b k e"]
    ) -> Float[Array, "b k turns"]:
        """Logits over turns for each text, from the clip's projected tokens and the texts."""
        return self.sorter(tokens if self.sorted_by == "tokens" else tokens[:, 1:], texts)

    def visit(self, video: Num[Array, "b t h w c"], ids: Int[Array, "b k l"]) -> None:
        """Calls every verb once: linen creates only the parameters that `init` reaches."""
        self.sort(self.project(self.see(video).raw), self.encode_texts(ids))


class Recipe(NamedTuple):
    """How the net is trained; see `build`."""

    ratio: float
    weights: Mapping[str, float]
    temperature: float


class Outputs(NamedTuple):
    """Outputs of the net, before any loss."""

    video: Float[Array, "b n e"]  # all tokens, projected, the clip's first
    texts: Float[Array, "b k e"]
    turns: Float[Array, "b k turns"] | None  # None for one text per row, which has no order


def cube_of(net: TVTSv2) -> embed.Triple:
    return (1, net.patch, net.patch)


def grid_of(net: TVTSv2, shape: tuple[int, ...]) -> embed.Triple:
    """Frames, rows and columns of a video's patches. Raises UserError unless rows and columns are
    those of the position table."""
    t, h, w = embed.grid_of(shape, cube_of(net))
    if (h, w) != (net.grid, net.grid):
        side = net.grid * net.patch
        raise UserError(f"frames of {shape[-3]} x {shape[-2]} pixels; method.side={side}")
    return t, h, w


def join_clips(video: Num[Array, "..."]) -> Num[Array, "b t h w c"]:
    """The clips of a row, concatenated: "b v t h w c" -> "b (v t) h w c"."""
    return video.reshape(len(video), -1, *video.shape[-3:])


def check_clips(batch: Batch | Spec) -> None:
    """Raises UserError if several clips share one text: they are crops of one clip."""
    if len(shape := batch["video"].shape) > 5 and batch["text"].ndim == 2:
        raise UserError(
            f"method tvtsv2 reads clips with a text each, but rows have {shape[1]} clips and one "
            "text: leave data.video.repeats at 1 and data.video.views at None, or set pieces"
        )


def texts_of(batch: Batch) -> Int[Array, "b k l"]:
    """The texts of a row, one or several."""
    ids = batch["text"]
    return ids if ids.ndim == 3 else ids[:, None]


def mean_of(texts: Float[Array, "b k e"]) -> Float[Array, "b e"]:
    """The mean of a row's texts, in fp32 or wider."""
    return wide(texts).mean(axis=1)


def forward(net: TVTSv2, params: Params, batch: Batch, mask: TokenMask) -> Outputs:
    """Sorting trains the video tower and the sorter; its gradient does not reach the text tower."""
    bound = bind(net, params)
    tokens = bound.project(bound.see(join_clips(batch["video"]), mask).raw)
    texts = bound.encode_texts(texts_of(batch))
    turns = bound.sort(tokens, jax.lax.stop_gradient(texts)) if texts.shape[1] > 1 else None
    return Outputs(tokens, texts, turns)


def compare(recipe: Recipe, out: Outputs, valid: Bool[Array, " b"]) -> dict[str, Mean]:
    """L_vtc, the sum of both directions; L_sort over all texts, and its accuracy."""
    found = {}
    if recipe.weights["vtc"]:
        found["loss_vtc"] = contrastive.both_ways(
            out.video[:, 0],
            mean_of(out.texts),
            valid,
            temperature=recipe.temperature,
            sum_directions=True,
        )
    if recipe.weights["sort"]:
        sort = right = Mean(jnp.zeros(()), jnp.zeros(()))  # batches of both kinds have these names
        if out.turns is not None:
            turn = jnp.broadcast_to(jnp.arange(out.turns.shape[1]), out.turns.shape[:2])
            sort, right = scored(out.turns, turn, jnp.broadcast_to(valid[:, None], turn.shape))
        found["loss_sort"], found["sort_accuracy"] = sort, right
    return found


def loss(
    net: TVTSv2,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array,
    step: Array,
) -> tuple[Array, Out]:
    """L = L_vtc + 2 L_sort; dropped tubes are drawn from rng."""
    check_clips(batch)
    grid = grid_of(net, join_clips(batch["video"]).shape)
    mask = masking.tubes(rng, len(batch["video"]), grid, recipe.ratio)
    found = compare(recipe, forward(net, params, batch, mask), batch["valid"])
    return terms.total(found, recipe.weights), Out(found, extra)


def init(net: TVTSv2, recipe: Recipe, rng: Array, spec: Spec) -> Params:
    check_clips(spec)
    shape, k = spec["video"].shape, spec["text"].shape[1] if spec["text"].ndim == 3 else 1
    if k > net.turns:
        raise UserError(f"{k} texts of a video to sort; method.turns={net.turns}")
    if (t := grid_of(net, shape)[0] * math.prod(shape[1:-4])) > net.frames:
        raise UserError(f"videos of {t} frames; method.frames={net.frames}")
    frame = jnp.zeros((1, 1, *shape[-3:]))
    ids = jnp.zeros((1, 1, spec["text"].shape[-1]), jnp.int32)
    return net.init(rng, frame, ids, method="visit")["params"]


# What the trained net is used for.


def encode_video(
    net: TVTSv2,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array | None = None,
) -> Encoded:
    """All cubes, none dropped. embedding: the clip's token; tokens: all of them, projected."""
    bound, video = bind(net, params), join_clips(batch["video"])
    grid_of(net, video.shape)  # checks the side
    raw = bound.see(video).raw
    tokens = bound.project(raw)
    mask = jnp.ones(raw.shape[:2], bool)
    return dict(embedding=wide(tokens[:, 0]), tokens=tokens, raw=raw, mask=mask)


def encode_text(
    net: TVTSv2,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array | None = None,
) -> Encoded:
    """embedding: the mean over a video's texts, as in the loss. With one text there are also
    tokens, raw and mask."""
    bound, several = bind(net, params).text, texts_of(batch)
    ids = several.reshape(-1, several.shape[-1])
    raw = bound.encode(ids)
    found = dict(embedding=mean_of(bound.pool(raw, ids).reshape(*several.shape[:2], -1)))
    if several.shape[1] == 1:
        found.update(tokens=bound.norm(raw), raw=raw, mask=batch["text_mask"].reshape(ids.shape))
    return found


def build(
    *,
    size: str | Sequence[int] = "B",
    text_size: str | Sequence[int] | None = None,
    features: int = 512,
    side: int = 224,
    patch: int = 16,
    frames: int = 12,
    turns: int = 4,
    ratio: float = 0.5,
    weights: Mapping[str, float] | None = None,
    temperature: float = 0.05,
    sorted_by: str = "tokens",
    act: str = "quick_gelu",
    time_init: str = "zero",
    dtype: str = "bfloat16",
    remat: str | None = None,
    unroll: int = 1,
    text_length: int = 77,
    vocab_size: int = 49408,
    sep_id: int | None = None,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> tuple[TVTSv2, Recipe]:
    """TVTSv2. Batches need `video`, `text` and `text_mask`.

    size, text_size: CLIP's towers, names in `nn.sizes` or (width, depth, heads, mlp); the text
    tower's default is `size`. features: width of the embeddings. side: of the square picture, in
    pixels; patch: of a patch. frames: rows of the time table. turns: maximum number of texts of one
    video. ratio: of tubes dropped in training. weights: of the losses vtc and sort; a loss of
    weight 0 is not computed. temperature: of contrast. sorted_by: "tokens" (B/16, B/32), or
    "patches" as in H/14's code, which sorts by the patches before the last norm, without the clip's
    token. act: "gelu" for OpenCLIP's. time_init: see nn.spacetime.SpaceTimeBlock. dtype: of
    activations and matrix products; remat, unroll: see nn.transformer.Stack. text_length: rows of
    the position table. sep_id: the id that ends a text; None: the largest id of the text, as in
    CLIP's vocabulary. Raises UserError on unknown options and on a side that patches do not divide.
    """
    terms.choose("sorted_by", sorted_by, SORTED_BY)
    terms.choose("time_init", time_init, TIME_INITS)
    terms.choose("act", act, ACTIVATIONS)
    sizes.check_patches("side", side, patch)
    net = TVTSv2(
        size=sizes.pick(sizes.ENCODERS, size, "method.size"),
        text_size=sizes.pick(sizes.TEXTS, text_size or size, "method.text_size"),
        features=features, grid=side // patch, patch=patch, frames=frames, turns=turns,
        sorted_by=sorted_by, act=act, time_init=time_init, dtype=dtype, remat=remat, unroll=unroll,
        vocab_size=vocab_size, text_length=text_length, sep_id=sep_id, mean=tuple(mean),
        std=tuple(std),
    )  # fmt: skip
    return net, Recipe(
        ratio=ratio, weights=terms.weights(weights, WEIGHTS), temperature=temperature
    )


@made_of(build)
def make(**cfg: Any) -> Method:
    verbs = dict(video=encode_video, text=encode_text)
    return assemble(*build(**cfg), init=init, loss=loss, encode=verbs)
