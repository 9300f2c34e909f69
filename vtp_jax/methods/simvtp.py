"""SimVTP: Simple Video Text Pre-training with Masked Autoencoders (Ma et al., arXiv 2212.03490).

Code:      the authors' release, commit 4b54321 (mirror: wufeim/SimVTP @558d24e). CC-BY-NC; not
           copied: written from its numbers.
Data:      videos with captions
Parity:    released model, fp64, 1e-9: losses, outputs, gradients
Idea:      hide 90 % of a video's tubes and 75 % of its caption's words; one encoder reads the rest
           of both, from which both are reconstructed. Run on video and text separately, the same
           encoder gives the embeddings of video-text contrast (VTC); run on right and wrong pairs,
           it classifies them (VTM). L = L_v + L_t + L_vtc + L_vtm, all weights 1.
Command:   vtp train --config simvtp/pretrain_webvid --workdir DIR
Published: MSR-VTT 1k-A text-to-video R@1 53.6 / R@5 82.8 / R@10 90.8 (ViT-B, 200 epochs of
           WebVid-2M, fine-tuned; best epoch chosen on the test set); 43.8 R@1 with 10 % of it.

Deviations, each with its reason and with the switch that restores the reference's behaviour:
- VTC and VTM read the clean caption. The reference masks ids in place, so all four of its passes
  read a caption that is 75 % [MASK], unlike in testing.            contrast_text, match_text=masked
- Means over tokens exclude padding; the reference's depend on batch-mates.      pool_padding=True
- VTC is the mean of its two directions; in the reference it is their sum.     sum_directions=True
- Negatives and means are over the whole batch; in the reference negatives come from one GPU's 16
  pairs, and losses are means over GPUs of means.                                         groups=N
- With match_text="masked" the first joint pass also gives VTM's positives; the reference runs it
  again, which differs only by a second draw of word dropout.                     second_draw=True
  (With clean captions VTM cannot share that pass, which reads masked ones. A forward pass of a clip
  and 32 words then takes 176 GFLOP; with sharing it takes 142, in the reference 191.)
- Only visible cubes are embedded, once per step, and negatives are drawn by index, j != i: the same
  result as the reference's for a quarter less work.
- Sizes other than B are VideoMAE's; the paper has only B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtp_jax import augment, masking
from vtp_jax.nn import embed, joint, mae, pool, sizes
from vtp_jax.nn.bind import bind, has
from vtp_jax.nn.chunks import in_chunks
from vtp_jax.nn.mae import MaskedAutoencoder
from vtp_jax.nn.transformer import Linear
from vtp_jax.objectives import contrastive, reconstruction, terms
from vtp_jax.objectives.classification import log_odds, scored
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
    assemble,
    made_of,
)  # fmt: skip

WEIGHTS = {"video": 1.0, "text": 1.0, "vtc": 1.0, "vtm": 1.0}
TEXTS = ("clean", "masked")


class SimVTP(MaskedAutoencoder, kw_only=True):
    """The net: VideoMAE's, with an encoder that reads video, words, or both in one sequence."""

    dropout: float  # of word embeddings
    vocab_size: int
    text_length: int  # rows of the position table
    pad_id: int

    def setup(self):
        super().setup()
        dtype = jnp.dtype(self.dtype)
        self.text_embed = embed.WordEmbed(
            self.vocab_size, self.encoder_size.width, self.pad_id, self.text_length,
            dropout=self.dropout, dtype=dtype,
        )  # fmt: skip
        self.text_cls = Linear(self.vocab_size, dtype=dtype)
        self.vtm_head = Linear(2, dtype=dtype)

    def embed_text(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        return self.text_embed(ids)

    def restore_words(self, tokens: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """Logits over the vocabulary."""
        return self.text_cls(tokens)

    def match(self, pooled: Float[Array, "*m d"]) -> Float[Array, "*m 2"]:
        """Logits: not a pair, a pair."""
        return self.vtm_head(pooled)

    def visit(self, video: Any, hide: TokenMask, ids: Int[Array, "b l"]) -> None:
        """Calls every verb once: linen creates only the parameters that `init` reaches."""
        words = self.encode(self.embed_text(ids))
        self.restore(video, hide, hide.drop)
        self.restore_words(words)
        self.match(pool.mean(words))


class Recipe(NamedTuple):
    """How the net is trained; see `build`."""

    mask: str
    video_ratio: float
    text_ratio: float
    decoder_ratio: float
    target: str
    weights: Mapping[str, float]
    temperature: float
    contrast_text: str
    match_text: str
    pool_padding: bool
    sum_directions: bool
    second_draw: bool
    groups: int
    chunks: int
    contrast_chunks: int
    mask_id: int


class Draws(NamedTuple):
    """All randomness of the loss except dropout."""

    mask: TokenMask  # of the video's cubes
    hidden: Bool[Array, "b l"]  # words to predict
    masked: Int[Array, "b l"]  # the caption with these words replaced
    negative: Int[Array, " b"]  # the row whose video makes a wrong pair with this row's caption
    ask: Int[Array, "b a"] | None = None  # places that the decoder predicts; None: all hidden ones


class Outputs(NamedTuple):
    """Predictions and targets, before any loss. None where no loss needs them."""

    target: Float[Array, "b a p"] | None = None
    pixels: Float[Array, "b a p"] | None = None
    words: Float[Array, "b l v"] | None = None
    match: Float[Array, "m 2"] | None = None  # all right pairs, then all wrong ones
    video: Float[Array, "b d"] | None = None
    text: Float[Array, "b d"] | None = None


def draw(net: SimVTP, recipe: Recipe, rng: Array, batch: Batch) -> Draws:
    """Section 3 of the paper: masks of 90 % of the tubes and 75 % of the words; one wrong video for
    each caption."""
    mask_key, word_key, negative_key, cell_key = jax.random.split(rng, 4)
    b, grid = len(batch["video"]), embed.grid_of(batch["video"].shape, net.cube)
    hidden = masking.words(word_key, batch["maskable"], recipe.text_ratio)
    draws = Draws(
        masking.of_video(recipe.mask, mask_key, b, grid, recipe.video_ratio),
        hidden,
        jnp.where(hidden, recipe.mask_id, batch["text"]),
        masking.negatives(negative_key, batch["valid"], recipe.groups),
    )
    if not recipe.decoder_ratio:
        return draws
    return draws._replace(ask=masking.running_cells(cell_key, b, grid, recipe.decoder_ratio).keep)


def forward(
    net: SimVTP, recipe: Recipe, params: Params, batch: Batch, draws: Draws,
    rng: Array | None = None,
) -> Outputs:  # fmt: skip
    """All passes of a step: video and words jointly, each alone, and wrong pairs."""
    embed_key, pass_key = (None, None) if rng is None else jax.random.split(rng)
    bound, weights, mask = bind(net, params, embed_key), recipe.weights, draws.mask
    ask = mask.drop if draws.ask is None else draws.ask

    # Cubes and words are embedded once.
    video, _, _, grid = bound.embed_video(batch["video"], mask)
    ids = {"masked": draws.masked, "clean": batch["text"]}
    used = {"masked", recipe.contrast_text, recipe.match_text}
    text = {kind: bound.embed_text(ids[kind]) for kind in ids if kind in used}

    k, words = video.shape[1], text[recipe.match_text]
    pair = joint.together(k, batch["text_mask"])
    passes = {"pair": (video, text["masked"], pair)}
    if weights["vtc"]:
        alone = joint.apart(k, batch["text_mask"])
        passes["alone"] = (video, text[recipe.contrast_text], alone)
    if weights["vtm"]:
        if recipe.second_draw:
            words = bound.embed_text(ids[recipe.match_text])
        if recipe.match_text == "clean" or recipe.second_draw:
            passes["right"] = (video, words, pair)
        passes["wrong"] = (video[draws.negative], words, pair)

    def run(rng: Array | None, passes: Any, keep: Any, ask: Any, real: Any) -> Outputs:
        bound, out = bind(net, params, rng), Outputs()
        seen = joint.encode_passes(bound.encode, passes)
        if weights["video"]:
            pixels = bound.decode(seen["pair"][:, :k], keep, ask, math.prod(grid))
            out = out._replace(pixels=pixels)
        if weights["text"]:
            out = out._replace(words=bound.restore_words(seen["pair"][:, k:]))
        if weights["vtc"]:
            each = seen["alone"][:, :k], seen["alone"][:, k:]
            out = out._replace(video=pool.mean(each[0]), text=pool.mean(each[1], real))
        if weights["vtm"]:
            pairs = (seen.get("right", seen["pair"]), seen["wrong"])
            pooled = [pool.mean(tokens, joint.real(k, real)) for tokens in pairs]
            out = out._replace(match=bound.match(jnp.stack(pooled, axis=1)))
        return out

    real = jnp.ones_like(batch["text_mask"]) if recipe.pool_padding else batch["text_mask"]
    out = in_chunks(run, recipe.chunks)(pass_key, passes, mask.keep, ask, real)
    if out.pixels is not None:
        target = reconstruction.target(batch["video"], net.cube, ask, recipe.target)
        out = out._replace(target=target)
    if out.match is not None:
        out = out._replace(match=out.match.swapaxes(0, 1).reshape(-1, 2))
    return out


def compare(recipe: Recipe, out: Outputs, batch: Batch, draws: Draws) -> dict[str, Mean]:
    """L_v, L_t, L_vtc and L_vtm (section 3), and the accuracies of words and pairs."""
    valid, found = batch["valid"], {}
    if out.pixels is not None and out.target is not None:
        counted = valid
        if draws.ask is not None:  # a visible cube may be predicted, but does not count
            counted = masking.take(draws.mask.dropped, draws.ask) & valid[:, None]
        found["loss_video"] = reconstruction.squared_error(out.pixels, out.target, counted)
    if out.words is not None:
        asked = draws.hidden & valid[:, None]
        found["loss_text"], found["word_accuracy"] = scored(
            out.words, batch["text"], asked, recipe.groups
        )
    if out.video is not None and out.text is not None:
        found["loss_vtc"] = contrastive.both_ways(
            out.text, out.video, valid, temperature=recipe.temperature, groups=recipe.groups,
            chunks=recipe.contrast_chunks, sum_directions=recipe.sum_directions,
        )  # fmt: skip
    if out.match is not None:
        # A right pair counts only where its row has a wrong one.
        both = jnp.tile(valid & (draws.negative != jnp.arange(valid.shape[0])), 2)
        label = jnp.repeat(jnp.array([1, 0]), valid.shape[0])
        found["loss_vtm"], found["match_accuracy"] = scored(out.match, label, both)
    return found


def loss(
    net: SimVTP, recipe: Recipe, params: Params, extra: Extra, batch: Batch, rng: Array, step: Array
) -> tuple[Array, Out]:
    """Several views of a clip become rows with the same words; each view is a group of its own."""
    batch, views = augment.views_apart(batch)
    recipe = recipe._replace(groups=recipe.groups * views)
    draw_key, dropout_key = jax.random.split(rng)
    draws = draw(net, recipe, draw_key, batch)
    found = compare(recipe, forward(net, recipe, params, batch, draws, dropout_key), batch, draws)
    return terms.total(found, recipe.weights), Out(found, extra)


def init(net: SimVTP, recipe: Recipe, rng: Array, spec: Spec) -> Params:
    video, hide = mae.half_hidden(net, spec)
    ids = jnp.zeros((1, 1), jnp.int32)
    return net.init(rng, video, hide, ids, method="visit")["params"]


# What the trained net is used for.


def encode_video(
    net: SimVTP, recipe: Recipe, params: Params, extra: Extra, batch: Batch,
    rng: Array | None = None,
) -> Encoded:  # fmt: skip
    """All cubes, none hidden, as the reference evaluates. memory: the tokens before the encoder."""
    bound = bind(net, params, rng)
    memory = bound.embed_video(batch["video"]).raw
    return dict(bound.describe(bound.encoder(memory)), memory=memory)


def encode_text(
    net: SimVTP, recipe: Recipe, params: Params, extra: Extra, batch: Batch,
    rng: Array | None = None,
) -> Encoded:  # fmt: skip
    """The caption, no word hidden. memory: the tokens before the encoder."""
    bound, mask = bind(net, params, rng), batch["text_mask"]
    memory = bound.embed_text(batch["text"])
    found = bound.describe(bound.encoder(memory, mask), mask, recipe.pool_padding)
    return dict(found, memory=memory)


def score_pair(
    net: SimVTP, recipe: Recipe, params: Params, extra: Extra, video: Encoded, text: Encoded,
    rng: Array | None = None,
) -> Encoded:  # fmt: skip
    """score: VTM's log odds that video i and text i are a pair; embedding: the joint one, which
    VTM's head reads."""
    bound, k, mask = bind(net, params, rng), video["memory"].shape[1], text["mask"]
    tokens = bound.encode(joint.join(video["memory"], text["memory"]), joint.real(k, mask))
    pooled = jnp.ones_like(mask) if recipe.pool_padding else mask
    found = dict(embedding=pool.mean(tokens, joint.real(k, pooled)))
    if has(bound, "vtm_head"):
        found["score"] = log_odds(bound.match(found["embedding"]))
    return found


def reconstruct(
    net: SimVTP, recipe: Recipe, params: Params, extra: Extra, batch: Batch,
    rng: Array | None = None,
) -> Encoded:  # fmt: skip
    """Reconstructions for display, with masks drawn from `rng` and dropout off:
    `reconstruction.pictures`, and text, masked_text, predicted_text i32 "b l"; text_hidden bool
    "b l". What ends in _alone is restored without the other modality: pixels without the caption,
    words without the video, as neither attends to the other."""
    draws = draw(net, recipe, jax.random.key(0) if rng is None else rng, batch)
    bound, mask = bind(net, params), draws.mask
    video, words = bound.embed_video(batch["video"], mask), bound.embed_text(draws.masked)
    k, real = video.raw.shape[1], batch["text_mask"]
    passes = {"": joint.together(k, real), "_alone": joint.apart(k, real)}
    seen = joint.encode_passes(
        bound.encode, {name: (video.raw, words, one) for name, one in passes.items()}
    )

    def pixels(tokens: Float[Array, "b n d"]) -> Float[Array, "b a p"]:
        return bound.decode(tokens[:, :k], mask.keep, mask.drop, math.prod(video.grid))

    def fill(tokens: Float[Array, "b n d"]) -> Int[Array, "b l"]:
        predicted = jnp.argmax(bound.restore_words(tokens[:, k:]), axis=-1).astype(jnp.int32)
        return jnp.where(draws.hidden, predicted, batch["text"])

    return dict(
        **reconstruction.pictures(
            batch["video"], pixels(seen[""]), mask, net.cube, recipe.target, pixels(seen["_alone"])
        ),
        **{f"predicted_text{name}": fill(tokens) for name, tokens in seen.items()},
        text=batch["text"],
        masked_text=draws.masked,
        text_hidden=draws.hidden,
    )


def build(
    *,
    size: str | Sequence[int] = "B",
    decoder: str | Sequence[int] | None = None,
    cube: Sequence[int] = (2, 16, 16),
    mask: str = "tubes",
    video_ratio: float = 0.9,
    text_ratio: float = 0.75,
    decoder_ratio: float = 0.0,
    target: str = "normalised",
    weights: Mapping[str, float] | None = None,
    temperature: float = 0.05,
    contrast_text: str = "clean",
    match_text: str = "clean",
    pool_padding: bool = False,
    sum_directions: bool = False,
    second_draw: bool = False,
    groups: int = 1,
    dropout: float = 0.1,
    drop_path: float = 0.0,
    dtype: str = "bfloat16",
    remat: str | None = None,
    unroll: int = 1,
    attention: str = "auto",
    chunks: int = 1,
    contrast_chunks: int = 1,
    vocab_size: int = 30522,
    text_length: int = 512,
    pad_id: int = 0,
    mask_id: int = 103,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> tuple[SimVTP, Recipe]:
    """SimVTP.

    size, decoder: names in `nn.sizes`, or (width, depth, heads, mlp); the decoder's default is
    `size`. cube: frames, rows and columns of a token. mask: a name in `masking.MASKS`. video_ratio:
    of hidden cubes; text_ratio: of hidden words; decoder_ratio: of places that the decoder does not
    predict (0.5: VideoMAE V2's cells). weights: of `video`, `text`, `vtc` and `vtm`; a loss of
    weight 0 is not computed. contrast_text, match_text: the caption that VTC and VTM read, "clean"
    or "masked". pool_padding, sum_directions, second_draw, groups: see above. dropout: of word
    embeddings; drop_path: of the encoder's blocks. dtype: of activations and matrix products;
    remat, unroll, attention: see `nn.transformer.Stack`. chunks: encoder and decoder run over
    1 / chunks of the rows at a time (`nn.chunks`); contrast_chunks: see `contrastive.info_nce`.
    text_length: rows of the position table.
    """
    net = SimVTP(
        encoder_size=sizes.pick(sizes.ENCODERS, size, "method.size"),
        decoder_size=sizes.pick(sizes.DECODERS, decoder or size, "method.decoder"),
        cube=(cube[0], cube[1], cube[2]), drop_path=drop_path, dtype=dtype, remat=remat,
        unroll=unroll, attention=attention, mean=tuple(mean), std=tuple(std), dropout=dropout,
        vocab_size=vocab_size, text_length=text_length, pad_id=pad_id,
    )  # fmt: skip
    return net, Recipe(
        mask=terms.choose("mask", mask, masking.MASKS),
        video_ratio=video_ratio,
        text_ratio=text_ratio,
        decoder_ratio=decoder_ratio,
        target=terms.choose("target", target, reconstruction.TARGETS),
        weights=terms.weights(weights, WEIGHTS),
        temperature=temperature,
        contrast_text=terms.choose("contrast_text", contrast_text, TEXTS),
        match_text=terms.choose("match_text", match_text, TEXTS),
        pool_padding=pool_padding,
        sum_directions=sum_directions,
        second_draw=second_draw,
        groups=groups,
        chunks=chunks,
        contrast_chunks=contrast_chunks,
        mask_id=mask_id,
    )


@made_of(build)
def make(**cfg: Any) -> Method:
    verbs = dict(video=encode_video, text=encode_text, pair=score_pair, reconstruct=reconstruct)
    return assemble(*build(**cfg), init=init, loss=loss, encode=verbs)
