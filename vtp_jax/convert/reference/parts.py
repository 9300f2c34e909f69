"""The parts that several references share.

`b` rows, `n` tokens (slot by slot, row by row), `k` kept tokens, `l` words, `p` values of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Num
from scipy import special

from vtp_jax.types import UserError

Tensors = Mapping[str, Num[np.ndarray, "..."]]
Rows = Float64[np.ndarray, "b n d"]
Outputs = dict[str, Float64[np.ndarray, "..."]]
Mask = Bool[np.ndarray, "b l"] | Int[np.ndarray, "b l"]
Act = Literal["gelu", "quick_gelu"]


def gelu(x: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    return x * special.ndtr(x)


def quick_gelu(x: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    return x * special.expit(1.702 * x)


ACTS = {"gelu": gelu, "quick_gelu": quick_gelu}


class Names(NamedTuple):
    """The names of a block's tensors. Several are concatenated into rows q, k, v; None: zeros."""

    norm1: str
    qkv: tuple[str, ...]
    bias: tuple[str | None, ...]
    proj: str
    norm2: str
    fc1: str
    fc2: str


class Stack(NamedTuple):
    """The pre-norm blocks `prefix.{i}.` of a transformer."""

    prefix: str
    names: Names
    eps: float
    act: Callable[[np.ndarray], np.ndarray] = gelu


def read(t: Tensors, name: str) -> Float64[np.ndarray, "..."]:
    """A tensor in fp64. Raises UserError if the file has none of that name."""
    if name not in t:
        raise UserError(f"tensor {name} is missing; is the file of another model?")
    return np.asarray(t[name], np.float64)


def count(t: Tensors, prefix: str) -> int:
    """The number of blocks `prefix.{i}.`."""
    start = prefix + "."
    return len({n.removeprefix(start).split(".")[0] for n in t if n.startswith(start)})


def linear(t: Tensors, name: str, x: Float64[np.ndarray, "*b i"]) -> Float64[np.ndarray, "*b o"]:
    return x @ read(t, f"{name}.weight").T + read(t, f"{name}.bias")


def norm(
    t: Tensors, name: str, x: Float64[np.ndarray, "*b d"], eps: float
) -> Float64[np.ndarray, "*b d"]:
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * read(t, f"{name}.weight") + read(t, f"{name}.bias")


def attend(
    t: Tensors, prefix: str, names: Names, x: Rows, heads: int, mask: Float64[np.ndarray, "..."]
) -> Rows:
    """Self-attention; `mask` is added to the scores "b h n n"."""
    weight = np.concatenate([read(t, prefix + name) for name in names.qkv])
    if len(weight) % (3 * heads):
        raise UserError(f"{heads} heads do not divide a width of {len(weight) // 3} in {prefix}*")
    zeros = np.zeros(len(weight) // 3)
    bias = np.concatenate([zeros if n is None else read(t, prefix + n) for n in names.bias])
    qkv = (x @ weight.T + bias).reshape(*x.shape[:2], 3, heads, -1)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    scores = special.softmax(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]) + mask, -1)
    out = (scores @ v).swapaxes(1, 2).reshape(*x.shape[:2], -1)
    return linear(t, prefix + names.proj, out)


NOTHING = np.zeros(())  # added to the scores where nothing is masked


def run_blocks(
    t: Tensors, stack: Stack, x: Rows, heads: int, mask: Float64[np.ndarray, "..."] = NOTHING
) -> Rows:
    """All blocks of a stack, without the norm that follows them."""
    names, eps = stack.names, stack.eps
    for i in range(count(t, stack.prefix)):
        block = f"{stack.prefix}.{i}."
        x = x + attend(t, block, names, norm(t, block + names.norm1, x, eps), heads, mask)
        hidden = stack.act(linear(t, block + names.fc1, norm(t, block + names.norm2, x, eps)))
        x = x + linear(t, block + names.fc2, hidden)
    return x


def embed_cubes(t: Tensors, name: str, video: Float[np.ndarray, "b c t h w"]) -> Rows:
    """A convolution whose stride is its kernel, `name.weight` (d, c, [t], h, w), without bias."""
    kernel = read(t, f"{name}.weight")
    kernel = kernel if kernel.ndim == 5 else kernel[:, :, None]
    d, c, *cube = kernel.shape
    if video.shape[1] != c or any(a % s for a, s in zip(video.shape[2:], cube, strict=True)):
        raise UserError(f"{name} cuts cubes of {(c, *cube)}, which do not tile {video.shape[1:]}")
    slots, rows, columns = (a // s for a, s in zip(video.shape[2:], cube, strict=True))
    x = np.asarray(video, np.float64)
    x = x.reshape(len(x), c, slots, cube[0], rows, cube[1], columns, cube[2])
    x = x.transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(len(x), slots * rows * columns, -1)
    return x @ kernel.reshape(d, -1).T


def take(x: Rows, keep: Bool[np.ndarray, "b n"]) -> Float64[np.ndarray, "b k d"]:
    """The kept tokens in ascending order; every row must keep the same number."""
    if len(set(keep.sum(1).tolist())) > 1:
        hidden = keep.shape[1] - keep.sum(1)
        raise UserError(f"the mask hides a different number of tokens in each row: {hidden}")
    return x[keep].reshape(len(x), -1, x.shape[2])


def hide(keys: Bool[np.ndarray, "b n"]) -> Float64[np.ndarray, "b 1 1 n"]:
    """A term for the scores that hides keys that are False from all queries, as in SimVTP and
    BERT."""
    return np.where(keys, 0.0, -10000.0)[:, None, None]


def mean(x: Rows, where: Bool[np.ndarray, "b n"]) -> Float64[np.ndarray, "b d"]:
    return (x * where[..., None]).sum(1) / where.sum(1)[:, None]
