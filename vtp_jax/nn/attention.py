"""Attention: one function, and the kernels that compute it.

Shapes: b rows, n queries, m keys, h heads, k width of a head. Logits and softmax are fp32 or wider
in every kernel; the products run in the dtype of the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vtp_jax.types import UserError, wide

# Keys that may be attended to: one set for all queries, or one for each query.
Mask = Bool[Array, "b m"] | Bool[Array, "#b #n m"] | None
Drop = Callable[[Array], Array]  # dropout of the weights
# Logical axes of queries "b n h k", and of keys and values "b m h k". Where a mesh splits tokens,
# each device computes its own queries over all keys.
ASKING = ("act_batch", "act_len", "act_heads", None)
ASKED = ("act_batch", "act_keys", "act_heads", None)
LONG = 1024**2  # query-key pairs; from here on, the weights are not stored


def attend(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    mask: Mask = None,
    drop: Drop | None = None,
    kernel: str = "auto",
) -> Float[Array, "b n h k"]:
    """Scaled dot-product attention: softmax(q k^T / sqrt k) v. Keys where `mask` is False are not
    attended to: by any query if the mask is "b m", by query n if it is "b n m".

    kernel: "xla"    products and a softmax, weights "b h n m" stored for the backward pass
            "heads"  one head of one row at a time, weights recomputed in the backward pass, so
                     that they stay in a CPU's cache
            "cudnn"  the fused kernel of NVIDIA's library, bf16 and fp16
            "flash"  the fused Pallas kernel for TPUs
            "auto"   chosen by platform, shapes and mesh, see `choose`
    `drop` needs explicit weights, so "xla" always computes it. Raises UserError on an unknown
    kernel, and where a kernel chosen by name cannot take the arguments.
    """
    q = nn.with_logical_constraint(q, ASKING)
    k, v = (nn.with_logical_constraint(x, ASKED) for x in (k, v))
    if kernel == "auto":
        kernel = choose(q, k, mask, drop)
    elif kernel not in KERNELS:
        raise UserError(f"attention='{kernel}'; known: auto, {', '.join(KERNELS)}")
    if drop is not None:
        return by_xla(q, k, v, mask, drop)
    return KERNELS[kernel](q, k, v, mask)


def around() -> tuple[jax.sharding.AbstractMesh, Any]:
    """The ambient mesh and its kind of device (possibly of another machine, when compiling for it),
    or else this machine's device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh, mesh.abstract_device or jax.devices()[0]


def on_one_cpu() -> bool:
    mesh, device = around()
    return mesh.size <= 1 and device.platform == "cpu"


def choose(q: Array, k: Array, mask: Mask, drop: Drop | None) -> str:
    """The kernel for these arguments of `attend` on the platform that `around` returns."""
    _, device = around()
    n, m, width = q.shape[1], k.shape[1], q.shape[-1]
    plain = mask is None or mask.ndim == 2
    if drop is not None:
        return "xla"
    if "NVIDIA" in device.device_kind:
        fits = q.dtype.itemsize == 2 and width % 8 == 0 and width <= 128
        return "cudnn" if fits and (mask is None or n % 2 == m % 2 == 0) else "xla"
    if n * m >= LONG and plain:
        if device.platform == "tpu":
            return "flash"
        if on_one_cpu():
            return "heads"
    return "xla"


def by_xla(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    mask: Mask = None,
    drop: Drop | None = None,
) -> Float[Array, "b n h k"]:
    weights = weigh(q, k, mask).astype(v.dtype)
    return jnp.einsum("bhnm,bmhk->bnhk", weights if drop is None else drop(weights), v)


def weigh(
    q: Float[Array, "b n h k"], k: Float[Array, "b m h k"], mask: Mask = None
) -> Float[Array, "b h n m"]:
    """The attention weights softmax(q k^T / sqrt k), in fp32 or wider."""
    logits = wide(jnp.einsum("bnhk,bmhk->bhnm", q * q.shape[-1] ** -0.5, k))
    if mask is not None:
        logits = jnp.where(spread(mask), logits, jnp.finfo(logits.dtype).min)
    return jax.nn.softmax(logits)


def received(
    weights: Float[Array, "b h n m"], query: Float[Array, "b n"] | None = None
) -> Float[Array, "b m"]:
    """The attention that each key receives: weights averaged over heads and summed over queries.
    query: the weight of each query in the sum; None: 1."""
    if query is None:
        return weights.mean(axis=1).sum(axis=1)
    return jnp.einsum("bnm,bn->bm", weights.mean(axis=1), query)


def spread(mask: Bool[Array, "b *n m"]) -> Bool[Array, "b 1 #n m"]:
    """A mask with axes that broadcast against logits "b h n m"."""
    return mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]


def by_heads(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    mask: Mask = None,
) -> Float[Array, "b n h k"]:
    b, n, h, _ = q.shape
    if mask is None:
        mask = jnp.ones((b, k.shape[1]), bool)
    if mask.ndim > 2:
        raise UserError("attention='heads' takes masks of keys, 'b m', alone")
    bias = jnp.where(mask, 0, jnp.finfo(wide(q).dtype).min)
    split = [x.swapaxes(1, 2).reshape(b * h, -1, x.shape[-1]) for x in (q, k, v)]
    out = one_by_one(*split, jnp.repeat(bias, h, axis=0))
    return out.reshape(b, h, n, -1).swapaxes(1, 2)


@jax.custom_vjp
def one_by_one(
    q: Float[Array, "g n k"],
    k: Float[Array, "g m k"],
    v: Float[Array, "g m k"],
    bias: Float[Array, "g m"],
) -> Float[Array, "g n k"]:
    """Attention of g heads, one after the other; `bias` is added to the logits and gets no
    gradient."""
    return jax.lax.map(lambda some: attend_one(*some)[0], (q, k, v, bias))


def attend_one(
    q: Float[Array, "n k"], k: Float[Array, "m k"], v: Float[Array, "m k"], bias: Float[Array, " m"]
) -> tuple[Float[Array, "n k"], Float[Array, " n"]]:
    """One head's output, and the log-sum-exp of its logits."""
    logits = (q * q.shape[-1] ** -0.5) @ k.T + bias
    high = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - high)
    total = weights.sum(axis=-1, keepdims=True)
    # Divided after the product: n k divisions instead of n m.
    out = (weights.astype(v.dtype) @ v) / total
    return out.astype(v.dtype), (high + jnp.log(total))[:, 0]


def one_by_one_fwd(q: Array, k: Array, v: Array, bias: Array) -> tuple[Array, Any]:
    out, norm = jax.lax.map(lambda some: attend_one(*some), (q, k, v, bias))
    return out, (q, k, v, bias, out, norm)


def one_by_one_bwd(kept: Any, grad: Array) -> tuple[Array, Array, Array, None]:
    def back(some: Any) -> tuple[Array, Array, Array]:
        (q, k, v, bias, out, norm), grad = some
        scale = q.shape[-1] ** -0.5
        weights = jnp.exp((q * scale) @ k.T + bias - norm[:, None])
        slope = grad @ v.T - (grad * out).sum(axis=-1, keepdims=True)
        slope, weights = (weights * slope * scale).astype(q.dtype), weights.astype(v.dtype)
        return slope @ k, slope.T @ q, weights.T @ grad

    return *jax.lax.map(back, (kept, grad)), None


one_by_one.defvjp(one_by_one_fwd, one_by_one_bwd)


def by_cudnn(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    mask: Mask = None,
) -> Float[Array, "b n h k"]:
    def fused(q: Array, k: Array, v: Array, mask: Mask = None) -> Array:
        if mask is not None:  # the kernel needs full n x m masks, but not one for each head
            mask = jnp.broadcast_to(spread(mask), (len(q), 1, q.shape[1], k.shape[1]))
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")

    # The compiler can split this kernel over rows and heads, but not over queries.
    return split_by_hand(fused, q, k, v, mask)


def by_flash(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    mask: Mask = None,
) -> Float[Array, "b n h k"]:
    if mask is None:
        mask = jnp.ones(k.shape[:2], bool)
    if mask.ndim > 2:
        raise UserError("attention='flash' takes masks of keys, 'b m', alone")
    return split_by_hand(flash, q, k, v, mask)


def split_by_hand(kernel: Callable[..., Array], q: Array, k: Array, v: Array, mask: Mask) -> Array:
    """kernel(q, k, v, mask) by shard_map, each device computing its rows, heads and queries: for
    kernels that the compiler cannot split. Dimensions that the mesh does not divide stay whole."""
    mesh, _ = around()
    given = (q, k, v) if mask is None else (q, k, v, mask)
    if mesh.size <= 1:
        return kernel(*given)
    of_mask = (
        ("act_batch", "act_keys")
        if mask is None or mask.ndim == 2
        else ("act_batch", "act_len", "act_keys")
    )
    names = (ASKING, ASKED, ASKED, of_mask)[: len(given)]
    specs = tuple(divided(x.shape, axes, mesh) for x, axes in zip(given, names, strict=True))
    run = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return run(*given)


def divided(
    shape: tuple[int, ...], names: tuple[str | None, ...], mesh: jax.sharding.AbstractMesh
) -> jax.sharding.PartitionSpec:
    """The mesh axes of logical `names`, for the dimensions that they divide."""
    found = []
    for size, axes in zip(shape, nn.logical_to_mesh_axes(names) or (), strict=True):
        several = (axes,) if isinstance(axes, str) else axes or ()
        ways = math.prod(mesh.shape[axis] for axis in several)
        found.append(axes if size % ways == 0 else None)
    return jax.sharding.PartitionSpec(*found)


def flash(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """The Pallas kernel. It takes whole tiles only, so tokens are padded; segment ids mask keys: 1
    may be attended to, 0 may not."""
    from jax.experimental.pallas.ops.tpu import flash_attention as kernels

    n, width = q.shape[1], q.shape[-1]
    q, k, v, mask = (fill(x) for x in (q, k, v, mask))
    rows, columns = q.shape[1], k.shape[1]
    across, down = math.gcd(rows, 512), math.gcd(columns, 512)
    sizes = kernels.BlockSizes(
        block_b=1, block_q=across, block_k_major=down, block_k=down,
        block_q_major_dkv=across, block_k_major_dkv=down, block_k_dkv=down, block_q_dkv=across,
        block_k_major_dq=down, block_k_dq=down, block_q_dq=across,
    )  # fmt: skip
    ids = kernels.SegmentIds(jnp.ones((len(q), rows), jnp.int32), mask.astype(jnp.int32))
    heads = (x.swapaxes(1, 2) for x in (q, k, v))
    out = kernels.flash_attention(*heads, segment_ids=ids, sm_scale=width**-0.5, block_sizes=sizes)
    return out.swapaxes(1, 2)[:, :n]


def fill(x: Array, tile: int = 128) -> Array:
    """Pads the token axis with zeros to a multiple of `tile`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile)) + ((0, 0),) * (x.ndim - 2))


KERNELS: dict[str, Callable[..., Array]] = dict(
    xla=by_xla, heads=by_heads, cudnn=by_cudnn, flash=by_flash
)
