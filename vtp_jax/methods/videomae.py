"""VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training
(Tong et al., NeurIPS 2022, arXiv 2203.12602).
VideoMAE V2: Scaling Video Masked Autoencoders with Dual Masking (Wang et al., CVPR 2023, arXiv
2303.16727).

Code:      MCG-NJU/VideoMAE @14ef8d8 and OpenGVLab/VideoMAEv2 @29eab1e. CC-BY-NC and MIT; not
           copied.
Data:      videos; V2: several crops of each decode
Parity:    official nets, fp64, 1e-9: predictions, loss, logits, gradients; V2's decoder masks and
           parameter counts
Idea:      hide 90 % of a video's tubes; an encoder reads the rest, a small decoder restores the
           hidden cubes, each normalised by itself: L = mean squared error over hidden cubes.
           V2 masks the decoder too: it is asked at half of the places only, "running cells" that
           move on by one place each frame, and the loss counts where a place was hidden as well.
Command:   vtp train --config videomae/pretrain_k400 --workdir DIR
           vtp train --config videomae_v2/pretrain_hybrid --workdir DIR
Published: VideoMAE, K400 top-1 at 16 x 224^2, 5 x 3 views: S 79.0, B 81.5, L 85.2, H 86.6; SSv2,
           2 x 3 views: S 66.8, B 70.8; UCF101 91.3.
           V2-g: K400 87.2, by way of K710 88.4; SSv2 77.0. Decoder masking costs 0.1 of SSv2 top-1
           (70.28 -> 70.15, B, 800 epochs) and saves 27 % of the multiplications (35.4 -> 25.8 G).

Two papers, one file: V2's net, targets and loss are VideoMAE's, number for number, where
decoder_ratio is 0. What else V2 adds stands elsewhere: several masked views of one decoded clip are
the batch's "b v t h w c" (data.video.repeats), ViT-g is a size, and post-pretraining on K710 is the
task `classify`.

Deviations, each with its reason:
- Only visible cubes are embedded and only cubes that are asked for become targets: the same
  numbers for less work (the references embed all and then choose).
- Decoders are as VideoMAE's: 12 blocks for L and H. V2's configs ask for its 4 of width 512.
- Pictures ask for every hidden cube, also of a net whose decoder was trained on half of the places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtp_jax import augment, masking
from vtp_jax.nn import embed, pool, sizes
from vtp_jax.nn.transformer import Linear, Stack, layer_norm
from vtp_jax.objectives import reconstruction
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

MASK_INIT = nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)
MASKS = ("tubes", "tokens")


class VideoMAE(nn.Module):
    """The net and its recipe: parameters, and the verbs that the loss below is written in."""

    encoder_size: sizes.Size
    decoder_size: sizes.Size
    cube: tuple[int, int, int]
    mask: str
    ratio: float
    decoder_ratio: float
    drop_path: float
    dtype: Any
    remat: str | None
    unroll: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    attention: str = "auto"

    def setup(self):
        d, e, dtype = self.encoder_size.width, self.decoder_size.width, jnp.dtype(self.dtype)
        stack: Any = dict(
            dtype=dtype, remat=self.remat, unroll=self.unroll, attention=self.attention
        )
        self.patch_embed = embed.CubeEmbed(d, self.cube, len(self.mean), dtype)
        self.encoder = Stack(self.encoder_size, self.drop_path, **stack)
        self.encoder_norm = layer_norm(dtype)
        self.encoder_to_decoder = Linear(e, use_bias=False, dtype=dtype)
        self.decoder = Stack(self.decoder_size, **stack)
        self.decoder_norm = layer_norm(dtype)
        self.decoder_head = Linear(math.prod(self.cube) * len(self.mean), dtype=dtype)
        if self.is_initializing():  # else read where it is used: a task may have dropped it
            self.param("mask_token", MASK_INIT, (e,))

    def embed_video(
        self, cubes: Float[Array, "b k p"], index: Int[Array, "b k"], n: int
    ) -> Float[Array, "b k d"]:
        """Tokens of the cubes (pixels in [0, 1]) at places `index` of n."""
        x = self.patch_embed(embed.standardise(cubes, self.mean, self.std))
        return x + embed.positions(n, x.shape[-1], x.dtype)[index]

    def decode(
        self, seen: Float[Array, "b k e"], keep: Int[Array, "b k"], ask: Int[Array, "b d"], n: int
    ) -> Float[Array, "b d p"]:
        """Predicted cubes at places `ask` of n, from the encoder's output at places `keep`."""
        x = self.encoder_to_decoder(seen)
        place = embed.positions(n, x.shape[-1], x.dtype)
        asked = self.variables["params"]["mask_token"].astype(x.dtype) + place[ask]
        x = self.decoder(jnp.concatenate([x + place[keep], asked], axis=1))
        return self.decoder_head(self.decoder_norm(x[:, keep.shape[1] :]))

    def restore(
        self, cubes: Float[Array, "b k p"], keep: Int[Array, "b k"], ask: Int[Array, "b d"], n: int
    ) -> Float[Array, "b d p"]:
        """The whole autoencoder: from the visible cubes to the predicted ones."""
        seen = self.encoder_norm(self.encoder(self.embed_video(cubes, keep, n)))
        return self.decode(seen, keep, ask, n)


class Draws(NamedTuple):
    """All that is random in the loss beside drop path."""

    mask: TokenMask  # of the cubes that the encoder sees
    ask: Int[Array, "b d"]  # places that the decoder is asked at
    scored: Bool[Array, "b d"]  # those of them that were hidden, which count


def draw(net: VideoMAE, rng: Array, video: Any) -> Draws:
    """Tubes for the encoder; for the decoder all that is hidden (VideoMAE), or V2's cells."""
    mask_key, cell_key = jax.random.split(rng)
    b, grid = video.shape[0], embed.grid_of(video.shape, net.cube)
    if net.mask == "tubes":
        mask = masking.tubes(mask_key, b, grid, net.ratio)
    else:
        mask = masking.tokens(mask_key, b, math.prod(grid), net.ratio)
    if not net.decoder_ratio:
        return Draws(mask, mask.drop, jnp.ones(mask.drop.shape, bool))
    cells = masking.running_cells(cell_key, b, grid, net.decoder_ratio)
    return Draws(mask, cells.keep, masking.take(mask.dropped, cells.keep))


def forward(
    net: VideoMAE, params: Params, batch: Batch, draws: Draws, rng: Array | None = None
) -> tuple[Float[Array, "b d p"], Float[Array, "b d p"]]:
    """(predicted cubes, their targets) at the places that were asked for."""
    # Cut in uint8: only cubes that are looked at become floats, once.
    cubes, keep = embed.cut(batch["video"], net.cube), draws.mask.keep
    visible = embed.to_unit(masking.take(cubes, keep))
    n = cubes.shape[1]
    predicted = bind(net, params, rng).restore(visible, keep, draws.ask, n)
    target = reconstruction.normalise(embed.to_unit(masking.take(cubes, draws.ask)))
    return predicted, target


def loss(
    net: VideoMAE, params: Params, extra: Extra, batch: Batch, rng: Array, step: Array
) -> tuple[Array, Out]:
    """Mean squared error over the scored cubes of all views of all valid rows."""
    draw_key, dropout_key = jax.random.split(rng)
    batch = augment.views_as_rows(batch)
    draws = draw(net, draw_key, batch["video"])
    predicted, target = forward(net, params, batch, draws, dropout_key)
    where = draws.scored & batch["valid"][:, None]
    found: dict[str, Mean] = {"loss_video": reconstruction.squared_error(predicted, target, where)}
    return found["loss_video"].value(), Out(found, extra)


def init(net: VideoMAE, rng: Array, spec: Spec) -> Params:
    n = math.prod(embed.grid_of(spec["video"].shape, net.cube))
    cubes = jnp.zeros((1, n, math.prod(net.cube) * spec["video"].shape[-1]))
    index = jnp.arange(n, dtype=jnp.int32)[None]
    return net.init(rng, cubes, index, index[:, :1], n, method="restore")["params"]


# What the trained net is used for.


def encode_video(
    net: VideoMAE, params: Params, extra: Extra, batch: Batch, rng: Array | None = None
) -> Encoded:
    """All cubes, none hidden, as the references test. memory: the tokens before the encoder. Tasks
    that go on from `raw`, as fine-tuning does, may drop the last norm."""
    bound, cubes = bind(net, params, rng), embed.cut(batch["video"], net.cube)
    b, n, _ = cubes.shape
    index = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
    memory = bound.embed_video(embed.to_unit(cubes), index, n)
    found = dict(raw=bound.encoder(memory), mask=jnp.ones((b, n), bool), memory=memory)
    if "encoder_norm" in params:
        tokens = bound.encoder_norm(found["raw"])
        found.update(embedding=pool.mean(tokens), tokens=tokens)
    return found


def reconstruct(
    net: VideoMAE, params: Params, extra: Extra, batch: Batch, rng: Array | None = None
) -> Encoded:
    """What a person looks at, masks drawn with `rng`: see `reconstruction.pictures`."""
    net = net.clone(decoder_ratio=0.0)
    draws = draw(net, jax.random.key(0) if rng is None else rng, batch["video"])
    predicted, _ = forward(net, params, batch, draws)
    return reconstruction.pictures(batch["video"], predicted, draws.mask, net.cube)


def make(
    *,
    size: str | Sequence[int] = "B",
    decoder: str | Sequence[int] | None = None,
    cube: Sequence[int] = (2, 16, 16),
    mask: str = "tubes",
    ratio: float = 0.9,
    decoder_ratio: float = 0.0,
    drop_path: float = 0.0,
    dtype: str = "bfloat16",
    remat: str | None = None,
    unroll: int = 1,
    attention: str = "auto",
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> Method:
    """VideoMAE as a `Method`.

    size, decoder: names in `nn.sizes`, or (width, depth, heads, mlp); the decoder's is `size`
    unless given. cube: frames, rows and columns of a token. mask: `tubes`, or `tokens` for every
    frame's places by themselves. ratio: of cubes hidden from the encoder. decoder_ratio: of places
    that the decoder is not asked at: 0 is VideoMAE, 0.5 is V2. drop_path: of the encoder's blocks.
    dtype: of activations and matrix products; remat, unroll, attention: see nn.transformer.Stack.
    """
    if mask not in MASKS:
        raise UserError(f"method.mask={mask!r}; known: {', '.join(MASKS)}")
    net = VideoMAE(
        sizes.pick(sizes.ENCODERS, size, "method.size"),
        sizes.pick(sizes.DECODERS, decoder or size, "method.decoder"),
        (cube[0], cube[1], cube[2]), mask, ratio, decoder_ratio,
        drop_path, dtype, remat, unroll, tuple(mean), tuple(std), attention,
    )  # fmt: skip
    return Method(
        init=partial(init, net),
        loss=partial(loss, net),
        encode=dict(video=partial(encode_video, net), reconstruct=partial(reconstruct, net)),
    )


def bind(net: VideoMAE, params: Params, rng: Array | None) -> VideoMAE:
    """The net with its parameters; drop path acts when there is a key."""
    return net.bind({"params": params}, rngs={} if rng is None else {"dropout": rng})
