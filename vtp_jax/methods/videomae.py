"""VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training
(Tong et al., NeurIPS 2022, arXiv 2203.12602).
VideoMAE V2: Scaling Video Masked Autoencoders with Dual Masking (Wang et al., CVPR 2023, arXiv
2303.16727).

Code:      MCG-NJU/VideoMAE @14ef8d8 and OpenGVLab/VideoMAEv2 @29eab1e. CC-BY-NC and MIT; not
           copied.
Data:      videos; V2: several crops of each decode
Parity:    official nets, fp64, 1e-9: predictions, loss, logits, gradients; V2's decoder masks and
           parameter counts
Idea:      hide 90 % of a video's tubes; an encoder reads the rest, a small decoder predicts the
           hidden cubes, each normalised separately: L = mean squared error over hidden cubes.
           V2 also masks the decoder, which predicts only half of the places: "running cells" that
           advance by one place each frame. Only hidden places count in the loss.
Command:   vtp train --config videomae/pretrain_k400 --workdir DIR
           vtp train --config videomae_v2/pretrain_hybrid --workdir DIR
Published: VideoMAE, K400 top-1 at 16 x 224^2, 5 x 3 views: S 79.0, B 81.5, L 85.2, H 86.6; SSv2,
           2 x 3 views: S 66.8, B 70.8; UCF101 91.3.
           V2-g: K400 87.2, via K710 88.4; SSv2 77.0. Decoder masking costs 0.1 of SSv2 top-1
           (70.28 -> 70.15, B, 800 epochs) and saves 27 % of the multiplications (35.4 -> 25.8 G).

Two papers share this file: with decoder_ratio=0, V2's net, targets and loss equal VideoMAE's. V2's
other additions are elsewhere: several masked views of one decoded clip are the batch's
"b v t h w c" (data.video.repeats), ViT-g is a size, and post-pretraining on K710 is the task
`classify`.

Deviations, each with its reason:
- Only visible cubes are embedded, and only predicted cubes become targets: the same result for less
  work (the references embed all cubes and then select).
- Decoders are VideoMAE's: 12 blocks for L and H. V2's configs set its 4 blocks of width 512.
- Reconstructions predict every hidden cube, even if the decoder was trained on half of the places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtp_jax import augment, masking
from vtp_jax.nn import embed, mae, sizes
from vtp_jax.nn.bind import bind
from vtp_jax.nn.mae import MaskedAutoencoder
from vtp_jax.objectives import reconstruction, terms
from vtp_jax.types import (
    Batch,
    Encoded,
    Extra,
    Method,
    Out,
    Params,
    Spec,
    TokenMask,
    assemble,
    made_of,
)


class Recipe(NamedTuple):
    """How the net is trained; see `build`."""

    mask: str
    ratio: float
    decoder_ratio: float
    target: str


class Draws(NamedTuple):
    """All randomness of the loss except drop path."""

    mask: TokenMask  # of the encoder's cubes
    ask: Int[Array, "b a"]  # places that the decoder predicts
    scored: Bool[Array, "b a"]  # those that were hidden, which count in the loss


def draw(net: MaskedAutoencoder, recipe: Recipe, rng: Array, video: Any) -> Draws:
    """Tubes for the encoder; for the decoder all hidden places (VideoMAE), or V2's cells."""
    mask_key, cell_key = jax.random.split(rng)
    b, grid = video.shape[0], embed.grid_of(video.shape, net.cube)
    mask = masking.of_video(recipe.mask, mask_key, b, grid, recipe.ratio)
    if not recipe.decoder_ratio:
        return Draws(mask, mask.drop, jnp.ones(mask.drop.shape, bool))
    ask = masking.running_cells(cell_key, b, grid, recipe.decoder_ratio).keep
    return Draws(mask, ask, masking.take(mask.dropped, ask))


def forward(
    net: MaskedAutoencoder,
    recipe: Recipe,
    params: Params,
    batch: Batch,
    draws: Draws,
    rng: Array | None = None,
) -> tuple[Float[Array, "b a p"], Float[Array, "b a p"]]:
    """(predicted cubes, their targets) at the places `draws.ask`."""
    predicted = bind(net, params, rng).restore(batch["video"], draws.mask, draws.ask)
    return predicted, reconstruction.target(batch["video"], net.cube, draws.ask, recipe.target)


def loss(
    net: MaskedAutoencoder,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array,
    step: Array,
) -> tuple[Array, Out]:
    """Mean squared error over the scored cubes of all views of all valid rows."""
    draw_key, dropout_key = jax.random.split(rng)
    batch = augment.views_as_rows(batch)
    draws = draw(net, recipe, draw_key, batch["video"])
    predicted, target = forward(net, recipe, params, batch, draws, dropout_key)
    found = reconstruction.squared_error(predicted, target, draws.scored & batch["valid"][:, None])
    return found.value(), Out({"loss_video": found}, extra)


def init(net: MaskedAutoencoder, recipe: Recipe, rng: Array, spec: Spec) -> Params:
    video, hide = mae.half_hidden(net, spec)
    return net.init(rng, video, hide, hide.drop, method="restore")["params"]


# What the trained net is used for.


def encode_video(
    net: MaskedAutoencoder,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array | None = None,
) -> Encoded:
    """All cubes, none hidden, as the references evaluate."""
    bound = bind(net, params, rng)
    return bound.describe(bound.see(batch["video"]).raw)


def reconstruct(
    net: MaskedAutoencoder,
    recipe: Recipe,
    params: Params,
    extra: Extra,
    batch: Batch,
    rng: Array | None = None,
) -> Encoded:
    """Reconstructions for display, with masks drawn from `rng`: see `reconstruction.pictures`."""
    recipe = recipe._replace(decoder_ratio=0.0)
    draws = draw(net, recipe, jax.random.key(0) if rng is None else rng, batch["video"])
    predicted, _ = forward(net, recipe, params, batch, draws)
    return reconstruction.pictures(batch["video"], predicted, draws.mask, net.cube, recipe.target)


def build(
    *,
    size: str | Sequence[int] = "B",
    decoder: str | Sequence[int] | None = None,
    cube: Sequence[int] = (2, 16, 16),
    mask: str = "tubes",
    ratio: float = 0.9,
    decoder_ratio: float = 0.0,
    target: str = "normalised",
    drop_path: float = 0.0,
    dtype: str = "bfloat16",
    remat: str | None = None,
    unroll: int = 1,
    attention: str = "auto",
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> tuple[MaskedAutoencoder, Recipe]:
    """VideoMAE and VideoMAE V2.

    size, decoder: names in `nn.sizes`, or (width, depth, heads, mlp); the decoder's default is
    `size`. cube: frames, rows and columns of a token. mask: a name in `masking.MASKS`. ratio: of
    cubes hidden from the encoder. decoder_ratio: of places that the decoder does not predict: 0 is
    VideoMAE, 0.5 is V2. target: "normalised", every cube by its own mean and deviation, or "pixels"
    in [0, 1] (the codes' `normlize_target=False`). drop_path: of the encoder's blocks. dtype: of
    activations and matrix products; remat, unroll, attention: see nn.transformer.Stack.
    """
    net = MaskedAutoencoder(
        encoder_size=sizes.pick(sizes.ENCODERS, size, "method.size"),
        decoder_size=sizes.pick(sizes.DECODERS, decoder or size, "method.decoder"),
        cube=(cube[0], cube[1], cube[2]), drop_path=drop_path, dtype=dtype, remat=remat,
        unroll=unroll, attention=attention, mean=tuple(mean), std=tuple(std),
    )  # fmt: skip
    return net, Recipe(
        mask=terms.choose("mask", mask, masking.MASKS),
        ratio=ratio,
        decoder_ratio=decoder_ratio,
        target=terms.choose("target", target, reconstruction.TARGETS),
    )


@made_of(build)
def make(**cfg: Any) -> Method:
    verbs = dict(video=encode_video, reconstruct=reconstruct)
    return assemble(*build(**cfg), init=init, loss=loss, encode=verbs)
