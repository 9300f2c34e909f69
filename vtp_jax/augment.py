"""Changes to a batch of clips on the device: pure functions of a key.

Views, flips, colour changes, erased boxes, and mixing of clips. Pixels are in [0, 1]; the draws for
row i depend on the key and on i. A row that is not valid is never mixed into another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vtp_jax.types import Batch, Spec, UserError


def views_as_rows(batch: Batch) -> Batch:
    """Every view as a row of its own: video "b v t h w c" -> "(b v) t h w c", the views of a clip
    consecutive, all other keys repeated for them (repeated augmentation, Hoffer et al., arXiv
    1901.09335). A batch without views is returned unchanged."""
    v = views_of(batch)
    return batch if v is None else spread(batch, lambda x: jnp.repeat(x, v, axis=0), 0)


def views_apart(batch: Batch) -> tuple[Batch, int]:
    """As `views_as_rows`, but all first views before all second ones, "(v b) t h w c"; and v (1
    without views). The rows form v groups, each of which has every clip and its text once."""
    v = views_of(batch)
    return (batch, 1) if v is None else (spread(batch, lambda x: jnp.concatenate([x] * v), 1), v)


def views_of(batch: Batch | Spec) -> int | None:
    """The number of views of a clip; None if `video` has no axis for views."""
    shape = batch["video"].shape
    return shape[1] if len(shape) > 5 else None


def spread(batch: Batch, copies: Callable[[Array], Array], axis: int) -> Batch:
    """The views of "b v ..." as rows. axis: the one of (b, v) that varies slowest; 0 makes the
    views of a clip consecutive. copies: repeats the other keys in the same order."""
    rows = {k: copies(x) for k, x in batch.items() if k != "video"}
    video = jnp.moveaxis(batch["video"], axis, 0)
    return {**rows, "video": video.reshape(-1, *video.shape[2:])}


def one_view(spec: Spec, name: str) -> None:
    """Raises UserError if rows have several views, for methods that read one."""
    if views := views_of(spec):
        raise UserError(
            f"method {name} reads one view of a clip, but rows have {views}: leave "
            "data.video.repeats at 1 (simvtp and videomae read each view as a row, snclr reads two)"
        )


def flip(
    rng: Array, video: Float[Array, "b t h w c"], prob: float = 0.5
) -> Float[Array, "b t h w c"]:
    """All frames of a clip mirrored left to right, with probability `prob`."""
    turned = jax.random.bernoulli(rng, prob, (video.shape[0], 1, 1, 1, 1))
    return jnp.where(turned, video[:, :, :, ::-1], video)


def erase(
    rng: Array,
    video: Float[Array, "b t h w c"],
    prob: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "b t h w c"]:
    """Random erasing (Zhong et al., arXiv 1708.04896) as in VideoMAE's fine-tuning: with
    probability `prob` one box, the same in all frames of a clip, is filled with noise that is
    N(0, 1) after standardisation by `mean` and `std`. Its area is 2 % to a third of the picture's,
    its aspect ratio 0.3 to 1 / 0.3. A box too long for the picture is cut to fit; VideoMAE's code
    draws again."""
    b, _, h, w, _ = video.shape
    asked, area, aspect, place, noise = jax.random.split(rng, 5)
    area = h * w * jax.random.uniform(area, (b,), minval=0.02, maxval=1 / 3)
    limit = math.log(1 / 0.3)
    aspect = jnp.exp(jax.random.uniform(aspect, (b,), minval=-limit, maxval=limit))
    size = jnp.sqrt(jnp.stack([area * aspect, area / aspect], axis=1))
    size = jnp.minimum(jnp.round(size).astype(jnp.int32), jnp.array([h - 1, w - 1]))
    room = jnp.array([h, w]) - size + 1
    start = (jax.random.uniform(place, (b, 2)) * room).astype(jnp.int32)
    box = boxes(start, start + size, h, w) & jax.random.bernoulli(asked, prob, (b, 1, 1))
    fill = jax.random.normal(noise, video.shape, video.dtype) * jnp.array(std) + jnp.array(mean)
    return jnp.where(box[:, None, :, :, None], fill.astype(video.dtype), video)


def mix(
    rng: Array,
    video: Float[Array, "b t h w c"],
    target: Float[Array, "b k"],
    valid: Bool[Array, " b"],
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    prob: float = 1.0,
    switch: float = 0.5,
    groups: int = 1,
) -> tuple[Float[Array, "b t h w c"], Float[Array, "b k"]]:
    """Mixup (Zhang et al., arXiv 1710.09412) or CutMix (Yun et al., arXiv 1905.04899) of each row
    with the row at the mirrored position in the batch, in timm's batch mode: one draw for all rows.

    target: distributions over classes, mixed in the same proportion as the pixels.
    mixup, cutmix: alpha of the Beta distribution of the row's own share; 0 turns that one off.
    prob: probability that the batch is mixed; switch: that CutMix is used, if both are on.
    groups: contiguous blocks of rows that are mixed internally, each with a draw of its own (the
    references' "per GPU"). A row whose partner is not valid is left unchanged. Raises UserError
    unless groups divides the rows.
    """
    if not (mixup or cutmix):
        return video, target
    b, _, h, w, _ = video.shape
    if b % groups:
        raise UserError(f"a batch of {b} rows does not divide into groups={groups}")
    keys = jax.random.split(rng, 5)
    asked = jax.random.bernoulli(keys[0], prob, (groups,))
    switch = switch if mixup and cutmix else float(cutmix > 0)
    cuts = jax.random.bernoulli(keys[1], switch, (groups,))
    # The draw for an alpha of 0 is never used; 1 takes its place, where Beta is defined.
    blend = jax.random.beta(keys[2], *[mixup or 1.0] * 2, shape=(groups,))
    kept = jax.random.beta(keys[3], *[cutmix or 1.0] * 2, shape=(groups,))

    # CutMix: a box with about 1 - kept of the area, clipped at the borders; the share is the area
    # that remains.
    half = (jnp.sqrt(1 - kept)[:, None] * jnp.array([h, w])).astype(jnp.int32) // 2
    centre = (jax.random.uniform(keys[4], (groups, 2)) * jnp.array([h, w])).astype(jnp.int32)
    box = boxes(centre - half, centre + half, h, w)
    share = jnp.where(cuts, 1 - box.mean(axis=(1, 2), dtype=jnp.float32), blend)
    weight = jnp.where(cuts[:, None, None], 1.0 - box, blend[:, None, None])

    def to_rows(x: Float[Array, "g *d"]) -> Float[Array, "b *d"]:
        return jnp.repeat(jnp.where(asked.reshape(-1, *[1] * (x.ndim - 1)), x, 1.0), b // groups, 0)

    def mirror(x: Array) -> Array:
        return x.reshape(groups, b // groups, *x.shape[1:])[:, ::-1].reshape(x.shape)

    alone = ~mirror(valid)
    weight = jnp.where(alone[:, None, None], 1.0, to_rows(weight))[:, None, :, :, None]
    share = jnp.where(alone, 1.0, to_rows(share))[:, None]

    def blended(x: Array, share: Array) -> Array:
        share = share.astype(x.dtype)
        return jnp.where(share == 1, x, share * x + (1 - share) * mirror(x))

    return blended(video, weight), blended(target, share)


def boxes(low: Array, high: Array, h: int, w: int) -> Bool[Array, "b h w"]:
    """True inside boxes from `low` up to but excluding `high`, (row, column) each, clipped at the
    borders."""
    y, x = jnp.arange(h)[None, :, None], jnp.arange(w)[None, None, :]
    low, high = low[:, None, None], high[:, None, None]
    return (y >= low[..., 0]) & (y < high[..., 0]) & (x >= low[..., 1]) & (x < high[..., 1])


class View(NamedTuple):
    """Augmentation of a view of an RGB clip after the crop (BYOL, arXiv 2006.07733; MoCo v3,
    2104.02057). All fields except `jitter` are probabilities.

    jitter: strengths for brightness, contrast, saturation and hue; jittered: its probability
    """

    jitter: tuple[float, ...] = (0.4, 0.4, 0.2, 0.1)
    jittered: float = 0.8
    grey: float = 0.2
    blur: float = 1.0
    solarise: float = 0.0
    flip: float = 0.5


def view(rng: Array, video: Float[Array, "b t h w 3"], how: View) -> Float[Array, "b t h w 3"]:
    """Clips jittered, greyed, blurred, solarised and flipped, in this order, each with one draw for
    all frames of a clip."""
    jitter_key, grey_key, blur_key, solarise_key, flip_key = jax.random.split(rng, 5)

    def sometimes(key: Array, prob: float, change: Callable[[Array], Array], video: Array) -> Array:
        if not prob:
            return video
        asked = jax.random.bernoulli(key, prob, (len(video), 1, 1, 1, 1))
        return jnp.where(asked, change(video), video)

    asked, strengths = jax.random.split(jitter_key)
    video = sometimes(asked, how.jittered, lambda x: jitter(strengths, x, how.jitter), video)
    video = sometimes(grey_key, how.grey, grey, video)
    asked, width = jax.random.split(blur_key)
    sigma = jax.random.uniform(width, video.shape[:1], minval=0.1, maxval=2.0)
    video = sometimes(asked, how.blur, lambda x: blur(x, sigma), video)
    video = sometimes(solarise_key, how.solarise, solarise, video)
    return flip(flip_key, video, how.flip) if how.flip else video


def jitter(
    rng: Array, video: Float[Array, "b t h w 3"], strength: tuple[float, ...]
) -> Float[Array, "b t h w 3"]:
    """torchvision's ColorJitter on every clip, but always in the order of `strength`: brightness,
    contrast, saturation (factors 1 +- strength) and hue (+- strength, in turns)."""
    low, high = jnp.array([[max(0.0, 1 - s), 1 + s] for s in strength[:3]]).T
    keys, each = jax.random.split(rng), (len(video), 1, 1, 1, 1)
    factor = jax.random.uniform(keys[0], (*each, 3), minval=low, maxval=high)
    turn = jax.random.uniform(keys[1], each[:-1], minval=-strength[3], maxval=strength[3])

    def blend(x: Array, other: Array | float, i: int) -> Array:
        share = factor[..., i]
        return jnp.clip(share * x + (1 - share) * other, 0, 1)

    video = blend(video, 0.0, 0)
    video = blend(video, grey(video).mean(axis=(1, 2, 3, 4), keepdims=True), 1)
    video = blend(video, grey(video), 2)
    return turn_hue(video, turn)


def grey(video: Float[Array, "b t h w 3"]) -> Float[Array, "b t h w 3"]:
    """Luma (ITU-R 601) in all three channels."""
    luma = (video * jnp.array([0.299, 0.587, 0.114], video.dtype)).sum(axis=-1, keepdims=True)
    return jnp.broadcast_to(luma, video.shape)


def turn_hue(
    video: Float[Array, "b t h w 3"], turn: Float[Array, "b 1 1 1"]
) -> Float[Array, "b t h w 3"]:
    """Rotates the hue of HSV by `turn`, 1 being a full turn; value and saturation stay."""
    r, g, b = jnp.moveaxis(video, -1, 0)
    value = video.max(axis=-1)
    spread = value - video.min(axis=-1)
    some = jnp.where(spread > 0, spread, 1)
    # Which channel is the largest is not asked as `value == r`: a compiler may compute both again,
    # each with its own rounding. At a tie the branches agree.
    red, green = r >= jnp.maximum(g, b), g >= b
    sixths = jnp.where(
        red, (g - b) / some, jnp.where(green, 2 + (b - r) / some, 4 + (r - g) / some)
    )
    k = ((sixths + 6 * turn)[..., None] + jnp.array([5.0, 3.0, 1.0], video.dtype)) % 6
    return value[..., None] - spread[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def blur(video: Float[Array, "b t h w c"], sigma: Float[Array, " b"]) -> Float[Array, "b t h w c"]:
    """Gaussian blur with standard deviation sigma (pixels) over rows and columns, its weights
    renormalised at the borders. Computed as two matrix products, for any sigma."""

    def weights(n: int) -> Float[Array, "b n n"]:
        apart = jnp.arange(n)[:, None] - jnp.arange(n)
        return jax.nn.softmax(-(apart**2) / (2 * sigma[:, None, None] ** 2))

    _, _, h, w, _ = video.shape
    exact = jax.lax.Precision.HIGHEST
    video = jnp.einsum("bij,btjwc->btiwc", weights(h), video, precision=exact)
    return jnp.einsum("bij,bthjc->bthic", weights(w), video, precision=exact)


def solarise(video: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
    """Inverts the upper half of the values: 128 of 255 and above."""
    return jnp.where(video >= 128 / 255, 1 - video, video)
