"""SimVTP: Simple Video Text Pre-training with Masked Autoencoders (Ma et al., arXiv 2212.03490).

Code:      the authors' release, commit 4b54321 (mirror: wufeim/SimVTP @558d24e). CC-BY-NC, not
           copied: written from the numbers.
Data:      videos with captions
Parity:    released model, fp64, 1e-9: losses, outputs, gradients
Idea:      hide 90 % of a video's tubes and 75 % of its caption's words; one encoder reads what is
           left of both and must restore both. The same encoder, run on each alone, gives the
           embeddings of video-text contrast (VTC); run on right and wrong pairs, it tells them
           apart (VTM). L = L_v + L_t + L_vtc + L_vtm, all weights 1.
Command:   vtp train --config simvtp/pretrain_webvid --workdir DIR
Published: MSR-VTT 1k-A text-to-video R@1 53.6 / R@5 82.8 / R@10 90.8 (ViT-B, 200 epochs of
           WebVid-2M, fine-tuned; best epoch chosen on the test set); 43.8 R@1 with 10 % of it.

Deviations, each with its reason and with the switch that brings the reference back:
- VTC and VTM read the clean caption. The reference masks ids in place, so that all four passes see
  a caption of which 75 % is [MASK], and testing sees another one.  contrast_text, match_text=masked
- Means over tokens leave padding out; the reference's depend on batch-mates.    pool_padding=True
- VTC is the mean of its two directions, the reference's is their sum.         sum_directions=True
- Negatives come from the whole batch and means run over it; the reference's come from one GPU's 16
  pairs, and its losses are means over GPUs of means.                                     groups=N
- With match_text="masked" the first joint pass serves as VTM's positives; the reference runs it
  again, which differs by a second draw of word dropout only.                     second_draw=True
  (Clean captions in VTM cannot share that pass: it reads masked ones. The price at 32 words is
  176 GFLOP forward a clip where sharing has 142 and the reference 191.)
- Only visible cubes are embedded, once a step, and negatives are drawn by index, j != i: the same
  numbers as the reference's for a quarter less work.
- Sizes other than B are ours: VideoMAE's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtp_jax import augment, masking
from vtp_jax.nn import embed, pool, sizes
from vtp_jax.nn.chunks import in_chunks
from vtp_jax.nn.transformer import AttentionMask, Linear, Stack, layer_norm
from vtp_jax.objectives import contrastive, reconstruction
from vtp_jax.objectives.classification import accuracy, cross_entropy
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
)

WEIGHTS = {"video": 1.0, "text": 1.0, "vtc": 1.0, "vtm": 1.0}


class SimVTP(nn.Module):
    """The net and its recipe: parameters, and the verbs that the loss below is written in."""

    # The net. One encoder reads video, words, or both.
    encoder_size: sizes.Size
    decoder_size: sizes.Size
    cube: tuple[int, int, int] = (2, 16, 16)  # frames, rows and columns of a token
    dropout: float = 0.1  # of word embeddings
    drop_path: float = 0.0  # of the encoder's blocks
    dtype: Any = "bfloat16"  # of activations and matrix products
    remat: str | None = None  # see nn.transformer.Stack
    unroll: int = 1
    attention: str = "auto"  # see nn.attention.attend
    chunks: int = 1  # the encoder and decoder run over this part of the rows at a time
    contrast_chunks: int = 1  # VTC's logits: see objectives.contrastive.info_nce
    # The recipe.
    mask: str = "tubes"  # or "tokens": every frame's places by themselves
    video_ratio: float = 0.9
    text_ratio: float = 0.75
    decoder_ratio: float = 0.0  # of places the decoder is not asked at; 0.5 is VideoMAE V2's cells
    weights: Mapping[str, float] = nn.FrozenDict(WEIGHTS)  # a loss with weight 0 is not computed
    temperature: float = 0.05
    contrast_text: str = "clean"  # or "masked"
    match_text: str = "clean"  # or "masked"
    pool_padding: bool = False
    sum_directions: bool = False
    second_draw: bool = False
    groups: int = 1
    # Facts of the data.
    vocab_size: int = 30522
    text_length: int = 512  # rows of the position table
    pad_id: int = 0
    mask_id: int = 103
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def setup(self):
        d, dtype = self.encoder_size.width, jnp.dtype(self.dtype)
        stack: Any = dict(
            dtype=dtype, remat=self.remat, unroll=self.unroll, attention=self.attention
        )
        self.patch_embed = embed.CubeEmbed(d, self.cube, len(self.mean), dtype)
        self.text_embed = embed.WordEmbed(
            self.vocab_size, d, self.pad_id, self.text_length, dropout=self.dropout, dtype=dtype
        )
        self.encoder = Stack(self.encoder_size, self.drop_path, **stack)
        self.encoder_norm = layer_norm(dtype)
        self.encoder_to_decoder = Linear(self.decoder_size.width, use_bias=False, dtype=dtype)
        if self.is_initializing():  # else read where it is used: a task may have dropped it
            self.param("mask_token", MASK_INIT, (self.decoder_size.width,))
        self.decoder = Stack(self.decoder_size, **stack)
        self.decoder_norm = layer_norm(dtype)
        self.decoder_head = Linear(math.prod(self.cube) * len(self.mean), dtype=dtype)
        self.text_cls = Linear(self.vocab_size, dtype=dtype)
        self.vtm_head = Linear(2, dtype=dtype)

    def embed_video(
        self, cubes: Float[Array, "b k p"], index: Int[Array, "b k"], n: int
    ) -> Float[Array, "b k d"]:
        """Tokens of the cubes (pixels in [0, 1]) at places `index` of n."""
        x = self.patch_embed(embed.standardise(cubes, self.mean, self.std))
        return x + embed.positions(n, x.shape[-1], x.dtype)[index]

    def embed_text(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        return self.text_embed(ids)

    def encode(
        self, tokens: Float[Array, "b n d"], mask: AttentionMask = None
    ) -> Float[Array, "b n d"]:
        """The shared encoder, over tokens of either kind or of both one after the other."""
        return self.encoder_norm(self.encoder(tokens, mask))

    def decode(
        self, seen: Float[Array, "b k e"], keep: Int[Array, "b k"], ask: Int[Array, "b d"], n: int
    ) -> Float[Array, "b d p"]:
        """Predicted cubes at places `ask` of n, from the encoder's output at places `keep`."""
        x = self.encoder_to_decoder(seen)
        place = embed.positions(n, x.shape[-1], x.dtype)
        asked = self.variables["params"]["mask_token"].astype(x.dtype) + place[ask]
        x = jnp.concatenate([x + place[keep], asked], axis=1)
        return self.decoder_head(self.decoder_norm(self.decoder(x, read=ask.shape[1])))

    def restore_words(self, words: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """Logits over the vocabulary for every word."""
        return self.text_cls(words)

    def match(self, pooled: Float[Array, "*m d"]) -> Float[Array, "*m 2"]:
        """Logits: not a pair, a pair."""
        return self.vtm_head(pooled)

    def visit(self, cubes: Float[Array, "b n p"], ids: Int[Array, "b l"]) -> None:
        """Every verb once: linen creates only the parameters that init touches."""
        b, n, _ = cubes.shape
        mask = masking.tokens(jax.random.key(0), b, n, 0.5)
        video = self.embed_video(masking.take(cubes, mask.keep), mask.keep, n)
        words = self.encode(self.embed_text(ids))
        self.decode(self.encode(video), mask.keep, mask.drop, n)
        self.restore_words(words)
        self.match(pool.mean(words))


MASK_INIT = nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)


class Draws(NamedTuple):
    """All that is random in the loss beside dropout."""

    mask: TokenMask  # of the video's cubes
    hidden: Bool[Array, "b l"]  # words to restore
    masked: Int[Array, "b l"]  # the caption with these words replaced
    negative: Int[Array, " b"]  # the row whose video makes a wrong pair with this row's caption
    ask: Int[Array, "b d"] | None = None  # places the decoder is asked at; None: all that is hidden


class Outputs(NamedTuple):
    """What the net says, before any loss. None where no loss asks for it."""

    target: Float[Array, "b d p"] | None = None
    pixels: Float[Array, "b d p"] | None = None
    words: Float[Array, "b l v"] | None = None
    match: Float[Array, "m 2"] | None = None  # all right pairs, then all wrong ones
    video: Float[Array, "b d"] | None = None
    text: Float[Array, "b d"] | None = None


def draw(net: SimVTP, rng: Array, batch: Batch) -> Draws:
    """Section 3 of the paper: 90 % of the tubes, 75 % of the words; one wrong video a caption."""
    mask_key, word_key, negative_key, cell_key = jax.random.split(rng, 4)
    grid = embed.grid_of(batch["video"].shape, net.cube)
    b, n = batch["video"].shape[0], math.prod(grid)
    if net.mask == "tubes":
        mask = masking.tubes(mask_key, b, grid, net.video_ratio)
    else:
        mask = masking.tokens(mask_key, b, n, net.video_ratio)
    hidden = masking.words(word_key, batch["maskable"], net.text_ratio)
    masked = jnp.where(hidden, net.mask_id, batch["text"])
    negative, ask = masking.negatives(negative_key, batch["valid"], net.groups), None
    if net.decoder_ratio:
        ask = masking.running_cells(cell_key, b, grid, net.decoder_ratio).keep
    return Draws(mask, hidden, masked, negative, ask)


def forward(
    net: SimVTP, params: Params, batch: Batch, draws: Draws, rng: Array | None = None
) -> Outputs:
    """All passes of a step: video and words together, each alone, and wrong pairs."""
    embed_key, pass_key = (None, None) if rng is None else jax.random.split(rng)
    bound, weights, mask = bind(net, params, embed_key), net.weights, draws.mask

    # Cut in uint8: only cubes that are looked at become floats and tokens, once.
    cubes = embed.cut(batch["video"], net.cube)
    visible = embed.to_unit(masking.take(cubes, mask.keep))
    video = bound.embed_video(visible, mask.keep, cubes.shape[1])
    text = {"masked": bound.embed_text(draws.masked)}
    if "clean" in (net.contrast_text, net.match_text):
        text["clean"] = bound.embed_text(batch["text"])
    k, ask = video.shape[1], mask.drop if draws.ask is None else draws.ask

    # Each alone: one pass too, in which neither sees the other.
    together = beside(k, batch["text_mask"])[:, None]
    is_text = jnp.arange(together.shape[-1]) >= k
    alone = together & (is_text[:, None] == is_text)
    passes = {"pair": (video, text["masked"], together)}
    if weights["vtc"]:
        passes["alone"] = (video, text[net.contrast_text], alone)
    if weights["vtm"]:
        words = text[net.match_text]
        if net.second_draw:
            words = bound.embed_text(batch["text"] if net.match_text == "clean" else draws.masked)
        if net.match_text == "clean" or net.second_draw:
            passes["right"] = (video, words, together)
        passes["wrong"] = (video[draws.negative], words, together)

    def run(rng: Array | None, passes: Any, keep: Any, ask: Any, real: Any) -> Outputs:
        bound, out = bind(net, params, rng), Outputs()
        seen = encode_passes(bound, passes)
        if weights["video"]:
            out = out._replace(pixels=bound.decode(seen["pair"][:, :k], keep, ask, cubes.shape[1]))
        if weights["text"]:
            out = out._replace(words=bound.restore_words(seen["pair"][:, k:]))
        if weights["vtc"]:
            each = seen["alone"][:, :k], seen["alone"][:, k:]
            out = out._replace(video=pool.mean(each[0]), text=pool.mean(each[1], real))
        if weights["vtm"]:
            pairs = (seen.get("right", seen["pair"]), seen["wrong"])
            pooled = [pool.mean(tokens, beside(k, real)) for tokens in pairs]
            out = out._replace(match=bound.match(jnp.stack(pooled, axis=1)))
        return out

    real = jnp.ones_like(batch["text_mask"]) if net.pool_padding else batch["text_mask"]
    out = in_chunks(run, net.chunks)(pass_key, passes, mask.keep, ask, real)
    if out.pixels is not None:
        target = reconstruction.normalise(embed.to_unit(masking.take(cubes, ask)))
        out = out._replace(target=target)
    if out.match is not None:
        out = out._replace(match=out.match.swapaxes(0, 1).reshape(-1, 2))
    return out


def encode_passes(
    bound: SimVTP, passes: Mapping[str, tuple[Array, Array, Array]]
) -> Mapping[str, Float[Array, "b n d"]]:
    """The encoder's output for (video "b k d", words "b l d", who sees whom "b n n" or "b 1 n") by
    name. All are rows of one batch: a weight is read once, its gradient made in one product."""
    n = sum(x.shape[1] for x in next(iter(passes.values()))[:2])
    tokens, sees = [], []
    for video, words, mask in passes.values():
        tokens.append(jnp.concatenate([video, words], axis=1))
        sees.append(jnp.broadcast_to(mask, (len(mask), n, n)))
    # Passes behind rows: a device that has a row has all of its passes.
    x, mask = jnp.stack(tokens, axis=1), jnp.stack(sees, axis=1)
    y = bound.encode(x.reshape(-1, *x.shape[2:]), mask.reshape(-1, n, n)).reshape(x.shape)
    return {name: y[:, i] for i, name in enumerate(passes)}


def terms(net: SimVTP, out: Outputs, batch: Batch, draws: Draws) -> dict[str, Mean]:
    """L_v, L_t, L_vtc and L_vtm (section 3), and how often words and pairs were right."""
    valid, found = batch["valid"], {}
    if out.pixels is not None and out.target is not None:
        scored = valid
        if draws.ask is not None:  # what the encoder saw may be asked for, and does not count
            scored = masking.take(draws.mask.dropped, draws.ask) & valid[:, None]
        found["loss_video"] = reconstruction.squared_error(out.pixels, out.target, scored)
    if out.words is not None:
        asked = draws.hidden & valid[:, None]
        found["loss_text"] = cross_entropy(out.words, batch["text"], asked, net.groups)
        found["word_accuracy"] = accuracy(out.words, batch["text"], asked)
    if out.video is not None and out.text is not None:
        found["loss_vtc"] = contrastive.both_ways(
            out.text,
            out.video,
            valid,
            temperature=net.temperature,
            groups=net.groups,
            chunks=net.contrast_chunks,
            sum_directions=net.sum_directions,
        )
    if out.match is not None:
        # Right pairs are asked only where there is a wrong one to hold against them.
        both = jnp.tile(valid & (draws.negative != jnp.arange(valid.shape[0])), 2)
        label = jnp.repeat(jnp.array([1, 0]), valid.shape[0])
        found["loss_vtm"] = cross_entropy(out.match, label, both)
        found["match_accuracy"] = accuracy(out.match, label, both)
    return found


def total(net: SimVTP, found: Mapping[str, Mean]) -> Float[Array, ""]:
    """L = L_v + L_t + L_vtc + L_vtm, with the recipe's weights."""
    names = [name for name in WEIGHTS if f"loss_{name}" in found]
    return sum((net.weights[n] * found[f"loss_{n}"].value() for n in names), jnp.zeros(()))


def loss(
    net: SimVTP, params: Params, extra: Extra, batch: Batch, rng: Array, step: Array
) -> tuple[Array, Out]:
    """Several views of a clip are rows with the same words, each view a group of its own."""
    batch, views = augment.views_apart(batch)
    net = net.clone(groups=net.groups * views)
    draw_key, dropout_key = jax.random.split(rng)
    draws = draw(net, draw_key, batch)
    found = terms(net, forward(net, params, batch, draws, dropout_key), batch, draws)
    return total(net, found), Out(found, extra)


def init(net: SimVTP, rng: Array, spec: Spec) -> Params:
    n = math.prod(embed.grid_of(spec["video"].shape, net.cube))
    cubes = jnp.zeros((1, n, math.prod(net.cube) * spec["video"].shape[-1]))
    ids = jnp.zeros((1, spec["text"].shape[-1]), jnp.int32)
    return net.init(rng, cubes, ids, method="visit")["params"]


# What the trained net is used for.


def encode_video(
    net: SimVTP, params: Params, extra: Extra, batch: Batch, rng: Array | None = None
) -> Encoded:
    """All cubes, none hidden, as the reference tests. memory: the tokens before the encoder."""
    bound, cubes = bind(net, params, rng), embed.cut(batch["video"], net.cube)
    b, n, _ = cubes.shape
    index = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
    memory = bound.embed_video(embed.to_unit(cubes), index, n)
    return describe(bound, memory)


def encode_text(
    net: SimVTP, params: Params, extra: Extra, batch: Batch, rng: Array | None = None
) -> Encoded:
    """The caption as it is. memory: the tokens before the encoder."""
    bound = bind(net, params, rng)
    return describe(bound, bound.embed_text(batch["text"]), batch["text_mask"])


def describe(
    bound: SimVTP, memory: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
) -> Encoded:
    """What the encoders of one kind give. Tasks that go on from `raw` may drop the last norm."""
    raw = bound.encoder(memory, mask)
    mask = jnp.ones(memory.shape[:2], bool) if mask is None else mask
    found = dict(raw=raw, mask=mask, memory=memory)
    if "encoder_norm" in bound.variables["params"]:
        tokens = bound.encoder_norm(raw)
        pooled = jnp.ones_like(mask) if bound.pool_padding else mask
        found.update(embedding=pool.mean(tokens, pooled), tokens=tokens)
    return found


def score_pair(
    net: SimVTP,
    params: Params,
    extra: Extra,
    video: Encoded,
    text: Encoded,
    rng: Array | None = None,
) -> Encoded:
    """score: VTM's log odds that row i of the one belongs to row i of the other; embedding: of both
    together, which VTM's head reads."""
    bound, k = bind(net, params, rng), video["memory"].shape[1]
    tokens = bound.encode(
        jnp.concatenate([video["memory"], text["memory"]], axis=1), beside(k, text["mask"])
    )
    text_mask = jnp.ones_like(text["mask"]) if net.pool_padding else text["mask"]
    found = dict(embedding=pool.mean(tokens, beside(k, text_mask)))
    if "vtm_head" in params:  # a task may have dropped it
        logits = bound.match(found["embedding"]).astype(jnp.float32)
        found["score"] = logits[:, 1] - logits[:, 0]
    return found


def reconstruct(
    net: SimVTP, params: Params, extra: Extra, batch: Batch, rng: Array | None = None
) -> Encoded:
    """What a person looks at, masks drawn with `rng`, dropout off: `reconstruction.pictures`, and
    text, masked_text, predicted_text i32 "b l"; text_hidden bool "b l"."""
    draws = draw(net, jax.random.key(0) if rng is None else rng, batch)
    weights = {"video": 1.0, "text": 1.0, "vtc": 0.0, "vtm": 0.0}
    net = net.clone(weights=weights, decoder_ratio=0.0, chunks=1)
    out = forward(net, params, batch, draws)
    assert out.pixels is not None and out.words is not None  # their weights are not 0
    said = jnp.argmax(out.words, axis=-1).astype(jnp.int32)
    return dict(
        **reconstruction.pictures(batch["video"], out.pixels, draws.mask, net.cube),
        text=batch["text"],
        masked_text=draws.masked,
        predicted_text=jnp.where(draws.hidden, said, batch["text"]),
        text_hidden=draws.hidden,
    )


def make(*, size: Any = "B", decoder: Any = None, **recipe: Any) -> Method:
    """SimVTP as a `Method`.

    size, decoder: names in `nn.sizes`, or (width, depth, heads, mlp); the decoder's is `size`
    unless given. recipe: the fields of `SimVTP` above.
    """
    recipe["weights"] = {**WEIGHTS, **recipe.get("weights", {})}
    for name in ("cube", "mean", "std"):
        if name in recipe:
            recipe[name] = tuple(recipe[name])
    for name, known in CHOICES.items():
        if recipe.get(name, known[0]) not in known:
            raise UserError(f"method.{name}={recipe[name]!r}; known: {', '.join(known)}")
    if wrong := sorted(set(recipe["weights"]) - set(WEIGHTS)):
        raise UserError(f"method.weights: no loss '{wrong[0]}'; known: {', '.join(WEIGHTS)}")
    net = SimVTP(
        sizes.pick(sizes.ENCODERS, size, "method.size"),
        sizes.pick(sizes.DECODERS, decoder or size, "method.decoder"),
        **recipe,
    )
    verbs = dict(video=encode_video, text=encode_text, pair=score_pair, reconstruct=reconstruct)
    return Method(
        init=partial(init, net),
        loss=partial(loss, net),
        encode={name: partial(verb, net) for name, verb in verbs.items()},
    )


CHOICES = dict(
    mask=("tubes", "tokens"), contrast_text=("clean", "masked"), match_text=("clean", "masked")
)


def bind(net: SimVTP, params: Params, rng: Array | None) -> SimVTP:
    """The net with its parameters; word dropout and drop path act when there is a key."""
    return net.bind({"params": params}, rngs={} if rng is None else {"dropout": rng})


def beside(k: int, text_mask: Bool[Array, "b l"]) -> Bool[Array, "b n"]:
    """The mask of k video tokens, all real, followed by a text's."""
    return jnp.pad(text_mask, ((0, 0), (k, 0)), constant_values=True)
