"""Shared by the families' nets: sizes inferred from parameters, batches, and random inputs for
checks.

Parameters are fp64, and everything is computed in fp64, without dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vtp_jax.nn import embed, sizes
from vtp_jax.types import Params, Spec, UserError

Arrays = Mapping[str, Any]
Heads = Mapping[str, int]

ROWS, WORDS = 2, 6  # of random inputs, at most
# ImageNet's statistics as in the released code, in fp32. Nets with pixel targets take pixels in
# [0, 1]; `batch_of` undoes the normalisation of the inputs with the same numbers.
MEAN, STD = (
    tuple(float(np.float32(x)) for x in v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)
PIXELS: dict[str, Any] = dict(mean=MEAN, std=STD, dtype="float64")
# Nets without pixel targets take normalised pixels unchanged.
NORMALISED: dict[str, Any] = dict(mean=(0.0,) * 3, std=(1.0,) * 3, dtype="float64")


class Net(NamedTuple):
    """This implementation's net, at the sizes of given parameters and bound to given inputs.

    init: key -> parameters, traced for their shapes
    run:  parameters -> outputs, under the reference's names
    step: parameters -> (loss, outputs under the official code's names), as the official code
          trains; the output "after" is a tree of parameters after the step. None for nets without a
          method in this project
    """

    init: Callable[[Any], Any]
    run: Callable[[Any], Mapping[str, Any]]
    step: Callable[[Any], tuple[Any, Mapping[str, Any]]] | None = None


def size_of(blocks: Params, heads: int) -> sizes.Size:
    """The size of stacked blocks. The number of heads cannot be inferred from them."""
    depth, width, mlp = blocks["mlp"]["fc1"]["kernel"].shape
    return sizes.Size(width, depth, heads, mlp)


def cube_of(patch_embed: Params) -> embed.Triple:
    t, h, w, *_ = patch_embed["kernel"].shape
    return t, h, w


def side_of(position: Any, has_class: bool = True) -> int:
    """The number of patches along a side of the square picture that a position table covers."""
    return math.isqrt(len(position) - has_class)


def frames_last(video: Any) -> Any:
    """ "b c t h w" -> fp64 "b t h w c"."""
    return jnp.asarray(np.asarray(video, np.float64).transpose(0, 2, 3, 4, 1))


def image_rows(image: Any) -> Any:
    """ "b c h w" -> clips of one frame, fp64 "b 1 h w c"."""
    return jnp.asarray(np.asarray(image, np.float64).transpose(0, 2, 3, 1))[:, None]


def batch_of(inputs: Arrays, unit: bool) -> dict[str, Any]:
    """The batch of a method from official inputs: video "b 3 t h w", normalised; ids "b [k] l";
    attention_mask. unit: pixels are converted back to [0, 1] with ImageNet's statistics."""
    batch: dict[str, Any] = {}
    if "video" in inputs:
        video = frames_last(inputs["video"])
        batch["video"] = video * jnp.array(STD) + jnp.array(MEAN) if unit else video
    if "image" in inputs:
        batch["video"] = image_rows(inputs["image"])
    if "ids" in inputs:
        batch["text"] = jnp.asarray(inputs["ids"], jnp.int32)
    if "attention_mask" in inputs:
        batch["text_mask"] = jnp.asarray(np.asarray(inputs["attention_mask"], bool))
    return {**batch, "valid": jnp.ones(len(next(iter(batch.values()))), bool)}


def spec_of(batch: Mapping[str, Any]) -> Spec:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


# User inputs: checks for mistakes that would otherwise give meaningless numbers.


def check_pixels(inputs: Arrays, name: str = "video") -> None:
    """Raises UserError unless the pixels are "b 3 t h w" of a video, or "b 3 h w" of an image."""
    axes, shape = ("T, H, W" if name == "video" else "H, W"), np.shape(inputs[name])
    if len(shape) != 2 + len(axes.split(", ")) or shape[1] != len(MEAN):
        raise UserError(f"inputs['{name}'] is {shape}; it must be (B, {len(MEAN)}, {axes})")


def check_shapes(inputs: Arrays, **shapes: tuple[int, ...]) -> None:
    """Raises UserError if one of the given inputs has another shape."""
    for name, shape in shapes.items():
        if name in inputs and np.shape(inputs[name]) != shape:
            raise UserError(f"inputs['{name}'] is {np.shape(inputs[name])}; it must be {shape}")


def check_ids(inputs: Arrays, words: int, **least: int) -> None:
    """Raises UserError on ids outside [least, words)."""
    for name, low in least.items():
        ids = np.asarray(inputs.get(name, 0))
        if ((ids < low) | (ids >= words)).any():
            raise UserError(f"inputs['{name}'] has ids beyond the vocabulary of {words}")


def same_count(inputs: Arrays, name: str) -> int:
    """The number of True entries in each row. Raises UserError unless all rows have the same."""
    counts = np.asarray(inputs[name], bool).sum(axis=1)
    if (counts != counts[0]).any():
        raise UserError(f"inputs['{name}'] marks different numbers of tokens in different rows")
    return int(counts[0])


# Random inputs for a check: the smallest that use every tensor.

Draw = Callable[[Mapping[str, Any], np.random.Generator], dict[str, np.ndarray]]


def draw_video(kernel: str, cubes: int = 2) -> Draw:
    """Normalised pixels, `cubes` cubes along each axis, and a mask of half of them."""

    def draw(tensors: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        _, c, t, h, w = tensors[kernel].shape
        video = rng.standard_normal((ROWS, c, cubes * t, cubes * h, cubes * w))
        mask = np.argsort(rng.random((ROWS, cubes**3)), axis=1) < cubes**3 // 2
        return dict(video=video.astype(np.float32), mask=mask)

    return draw


def draw_words(table: str, positions: str) -> Draw:
    """ids "b l", the second row two words shorter, and their attention_mask; l is WORDS, or the
    number of rows of the position table if that is smaller."""

    def draw(tensors: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        length, words = min(WORDS, len(tensors[positions])), len(tensors[table])
        ids = rng.integers(min(1, words - 1), words, (ROWS, length))
        attention = np.arange(length) < np.array([[length], [max(1, length - 2)]])
        return dict(ids=np.where(attention, ids, 0), attention_mask=attention)

    return draw


def factors(n: int) -> tuple[int, int]:
    """Rows and columns of a grid of n places, as close to square as possible."""
    rows = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    return rows, n // rows


def draw_image(kernel: str, table: str) -> Draw:
    """An image with one patch for each row of the position table except the class token's, and half
    of the patches to keep."""

    def draw(tensors: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        _, c, h, w = tensors[kernel].shape
        rows, columns = factors(n := max(1, tensors[table].shape[-2] - 1))
        image = rng.standard_normal((ROWS, c, rows * h, columns * w)).astype(np.float32)
        keep = np.argsort(rng.random((ROWS, n)), axis=1)[:, : n // 2]
        return dict(image=image, keep=np.sort(keep, axis=1))

    return draw


def together(*draws: Draw) -> Draw:
    return lambda tensors, rng: {k: v for draw in draws for k, v in draw(tensors, rng).items()}


def named(heads: Heads) -> dict[str, int]:
    """Numbers of heads as keyword arguments for the references."""
    return {name.replace("-", "_"): n for name, n in heads.items()}


def need(inputs: Arrays, names: Sequence[str]) -> None:
    """Raises UserError if an input is missing."""
    if missing := [name for name in names if name not in inputs]:
        raise UserError(f"inputs have no '{missing[0]}'; needed: {', '.join(names)}")
