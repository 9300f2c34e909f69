"""Pre-norm Transformer blocks with one parameter layout: layers stacked along axis 0.

Shapes: b rows, n tokens, d width, h heads, k width of a head. Matrix products run in `dtype`;
softmax and norm statistics in fp32 or wider (architecture: Numerics).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vtp_jax.nn.sizes import Size

# As PyTorch's xavier_uniform_ on the fused (3d, d) matrix: bound sqrt(6 / 4d).
QKV_INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", 0, (1, 2, 3))
XAVIER = nn.initializers.xavier_uniform()


def product(x: Float[Array, "*b d"], kernel: Float[Array, "d f"]) -> Float[Array, "*b f"]:
    """x @ kernel with the rows flattened: XLA's CPU backend is 1.2-1.4 times faster on matrices
    than on stacks of them, and the other backends do not mind."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nn.Module):
    """x "*b d" -> "*b f"; computes in `dtype`."""

    features: int
    use_bias: bool = True
    init: Callable[..., Any] = XAVIER
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        kernel = self.param("kernel", self.init, (x.shape[-1], self.features))
        y = product(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


def layer_norm(dtype: Any, eps: float = 1e-6, name: str | None = None) -> nn.LayerNorm:
    """Layer norm with two-pass statistics in fp32 or wider."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


def attend(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b n h k"]:
    """Scaled dot-product attention; keys where `mask` is False are not attended to."""
    logits = jnp.einsum("bnhk,bmhk->bhnm", q * q.shape[-1] ** -0.5, k)
    logits = logits.astype(jnp.promote_types(q.dtype, jnp.float32))
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(logits.dtype).min)
    return jnp.einsum("bhnm,bmhk->bnhk", jax.nn.softmax(logits).astype(v.dtype), v)


class Attention(nn.Module):
    """Self-attention; biases on q and v only, as in BEiT, MAE's video heirs and SimVTP."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None
    ) -> Float[Array, "b n d"]:
        b, n, d = x.shape
        h, k = self.heads, d // self.heads
        # Heads come before q, k, v so that a tensor axis splits one array dimension.
        kernel = self.param("qkv", QKV_INIT, (d, h, 3, k)).astype(self.dtype)
        q_bias = self.param("q_bias", nn.initializers.zeros, (h, k))
        v_bias = self.param("v_bias", nn.initializers.zeros, (h, k))
        bias = jnp.stack([q_bias, jnp.zeros_like(q_bias), v_bias], axis=1).astype(self.dtype)
        qkv = product(x, kernel.reshape(d, h * 3 * k)).reshape(b, n, h, 3, k) + bias
        qkv = nn.with_logical_constraint(qkv, ("act_batch", "act_len", "act_heads", None, None))
        out = attend(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :], mask)
        return Linear(d, dtype=self.dtype, name="proj")(out.reshape(b, n, d))


class Mlp(nn.Module):
    """Two layers with the exact (erf) GELU between."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        y = Linear(self.hidden, dtype=self.dtype, name="fc1")(x)
        y = nn.with_logical_constraint(y, ("act_batch", "act_len", "act_heads"))
        y = jax.nn.gelu(y, approximate=False)
        return Linear(x.shape[-1], dtype=self.dtype, name="fc2")(y)


class Block(nn.Module):
    """x += attention(norm x); x += mlp(norm x). Each branch may be dropped for a row (stochastic
    depth) with the layer's probability, when a `dropout` rng is given."""

    size: Size
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        drop: Float[Array, ""],
        mask: Bool[Array, "b n"] | None,
    ) -> tuple[Float[Array, "b n d"], None]:
        def branch(y: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
            if not self.has_rng("dropout"):
                return y
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop, (x.shape[0], 1, 1))
            return jnp.where(kept, y / (1 - drop).astype(y.dtype), 0)

        x = nn.with_logical_constraint(x, ("act_batch", "act_len", "act_emb"))
        y = Attention(self.size.heads, self.dtype, name="attn")(
            layer_norm(self.dtype, name="norm1")(x), mask
        )
        x = x + branch(y)
        y = Mlp(self.size.mlp, self.dtype, name="mlp")(layer_norm(self.dtype, name="norm2")(x))
        return x + branch(y), None


class Stack(nn.Module):
    """`depth` blocks; parameters are stacked along axis 0 whatever `unroll` is.

    drop_path: stochastic depth, rising linearly from 0 at the first block to this at the last.
    remat:     None, or the name of a policy of `jax.checkpoint_policies`: what is kept for the
               backward pass ("nothing_saveable" keeps the inputs of the blocks alone).
    unroll:    blocks per step of the loop; `depth` removes it (longer to compile, faster on CPU).
    """

    size: Size
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: str | None = None
    unroll: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        depth = self.size.depth
        block = Block
        if self.remat is not None:
            policy = getattr(jax.checkpoint_policies, self.remat)
            block = nn.remat(Block, policy=policy, prevent_cse=self.unroll > 1)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=depth,
            unroll=min(self.unroll, depth),
        )
        drop = jnp.linspace(0.0, self.drop_path, depth, dtype=jnp.float32)
        return stack(self.size, self.dtype, name="blocks")(x.astype(self.dtype), drop, mask)[0]
