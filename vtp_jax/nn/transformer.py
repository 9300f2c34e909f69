"""Transformer blocks with one parameter layout: layers stacked along axis 0.

Shapes: b rows, n tokens, d width, h heads, k width of a head; m other tokens of width e.
Matrix products run in `dtype`; softmax and norm statistics in fp32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vtp_jax.nn.attention import attend, on_one_cpu, weigh
from vtp_jax.nn.layers import rematerialised, stacked
from vtp_jax.nn.sizes import Size

# As PyTorch's xavier_uniform_ on the fused (3d, d) matrix: bound sqrt(6 / 4d).
QKV_INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", 0, (1, 2, 3))
Q_INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", 0, (1, 2))
KV_INIT = QKV_INIT  # of the fused (2d, e) matrix
XAVIER = nn.initializers.xavier_uniform()


def quick_gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """x sigmoid(1.702 x): OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),  # exact, by erf
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
}


class Style(NamedTuple):
    """What the blocks of published nets differ in.

    bias: which of q, k and v have one: "qv" or "qkv"
    act:  the feed-forward part's activation, a name in `ACTIVATIONS`
    eps:  of the layer norms
    norm: "pre": x + f(norm x), or "post": norm(x + f x), for every branch f of a block
    """

    bias: str = "qv"
    act: str = "gelu"
    eps: float = 1e-6
    norm: str = "pre"


# Keys that may be attended to: by every query, or by each query its own. "b 1 p": by one token a
# row, of all p places of a cache.
AttentionMask = Bool[Array, "b n"] | Bool[Array, "#b n n"] | Bool[Array, "b 1 p"] | None
CrossMask = Bool[Array, "b m"] | Bool[Array, "#b n m"] | None
OtherMask = Bool[Array, "c m"] | Bool[Array, "#b n m"] | None

BEIT = Style()  # BEiT, VideoMAE, SimVTP
VIT = Style("qkv")  # ViT, MAE, timm
CLIP = Style("qkv", "quick_gelu", 1e-5)  # OpenAI's; OpenCLIP trains with the exact GELU
BERT = Style("qkv", "gelu", 1e-12, "post")


def product(x: Float[Array, "*b d"], kernel: Float[Array, "d f"]) -> Float[Array, "*b f"]:
    """x @ kernel. Rows are flattened on a CPU, whose backend is 1.2-1.4 times faster on matrices
    than on stacks of them; the others do not mind, but a mesh may split both rows and tokens."""
    if not on_one_cpu():
        return x @ kernel
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


def remember(
    module: nn.Module,
    k: Float[Array, "b n h k"],
    v: Float[Array, "b n h k"],
    mask: AttentionMask,
) -> tuple[Float[Array, "b p h k"], Float[Array, "b p h k"]]:
    """The keys and values to attend to when words are decoded one by one (see `Stack`): those of
    the cache, with this token's at its place, the last one that `mask` "b 1 p" lets it see."""
    if module.is_initializing() or not module.is_mutable_collection("cache"):
        return k, v
    if not module.has_variable("cache", "k"):
        module.put_variable("cache", "k", k)
        module.put_variable("cache", "v", v)
        return k, v
    assert mask is not None and mask.ndim == 3  # one token a row
    seen = mask[:, 0]
    own = (seen & ~jnp.pad(seen[:, 1:], ((0, 0), (0, 1))))[..., None, None]
    for name, new in (("k", k), ("v", v)):
        old = module.get_variable("cache", name)
        module.put_variable("cache", name, jnp.where(own, new, old))
    return module.get_variable("cache", "k"), module.get_variable("cache", "v")


class Dropout(nn.Module):
    """Acts when a `dropout` rng is given."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b"]) -> Float[Array, "*b"]:
        return nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(x)


def dropping(module: nn.Module, rate: float) -> Dropout | None:
    """Dropout for a function that has a cheaper way where there is none."""
    return Dropout(rate) if rate and module.has_rng("dropout") else None


class Attention(nn.Module):
    """Self-attention. dropout: of the attention weights. how: `attend`, or a function of its
    arguments in which not every token attends to all. qkv_init, proj_init: of the two kernels.
    read: the last tokens alone ask, and have an output; None: all do."""

    heads: int
    style: Style = BEIT
    dtype: Any = jnp.float32
    dropout: float = 0.0
    how: Callable[..., Array] = attend
    qkv_init: Callable[..., Any] = QKV_INIT
    proj_init: Callable[..., Any] = XAVIER
    read: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], mask: AttentionMask) -> Float[Array, "b r d"]:
        b, n, d = x.shape
        h, k = self.heads, d // self.heads
        # Heads come before q, k, v so that a tensor axis splits one array dimension.
        kernel = self.param("qkv", self.qkv_init, (d, h, 3, k)).astype(self.dtype)
        if self.style.bias == "qv":
            q_bias = self.param("q_bias", nn.initializers.zeros, (h, k))
            v_bias = self.param("v_bias", nn.initializers.zeros, (h, k))
            bias = jnp.stack([q_bias, jnp.zeros_like(q_bias), v_bias], axis=1)
        else:
            bias = self.param("qkv_bias", nn.initializers.zeros, (h, 3, k))

        def project(x: Float[Array, "b n d"], first: int, last: int) -> list[Array]:
            w, bs = kernel[:, :, first:last], bias[:, first:last]
            y = product(x, w.reshape(d, -1)).reshape(b, -1, *w.shape[1:]) + bs.astype(self.dtype)
            y = nn.with_logical_constraint(y, ("act_batch", "act_len", "act_heads", None, None))
            return [y[..., i, :] for i in range(last - first)]

        if self.read is None:
            q, keys, values = project(x, 0, 3)
        else:
            q, keys, values = *project(x[:, n - self.read :], 0, 1), *project(x, 1, 3)
        keys, values = remember(self, keys, values, mask)
        if self.is_mutable_collection("attention") and not self.is_initializing():
            self.put_variable("attention", "weights", weigh(q, keys, mask))
        out = self.how(q, keys, values, mask, dropping(self, self.dropout))
        proj = Linear(d, init=self.proj_init, dtype=self.dtype, name="proj")
        return proj(out.reshape(b, -1, d))


class CrossAttention(nn.Module):
    """Attention of tokens to others, whose width e may be another. dropout: of the weights.

    `other` may have fewer rows: each is then attended to by b / c rows of x, one after the other
    (what a decoder tries for one video).
    """

    heads: int
    style: Style = BEIT
    dtype: Any = jnp.float32
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], other: Float[Array, "c m e"], mask: OtherMask = None
    ) -> Float[Array, "b n d"]:
        (b, n, d), (c, m, e) = x.shape, other.shape
        h, k, zeros = self.heads, d // self.heads, nn.initializers.zeros
        q_kernel = self.param("q", Q_INIT, (d, h, k)).astype(self.dtype)
        kv_kernel = self.param("kv", KV_INIT, (e, h, 2, k)).astype(self.dtype)
        q_bias = self.param("q_bias", zeros, (h, k))
        if self.style.bias == "qv":
            v_bias = self.param("v_bias", zeros, (h, k))
            kv_bias = jnp.stack([jnp.zeros_like(v_bias), v_bias], axis=1)
        else:
            kv_bias = self.param("kv_bias", zeros, (h, 2, k))
        q = product(x, q_kernel.reshape(d, h * k)).reshape(c, b // c * n, h, k)
        q = q + q_bias.astype(self.dtype)
        if self.has_variable("context", "kv"):  # words are decoded one by one, see `Stack`
            kv = self.get_variable("context", "kv")
        else:
            kv = product(other.astype(self.dtype), kv_kernel.reshape(e, h * 2 * k))
            kv = kv.reshape(c, m, h, 2, k) + kv_bias.astype(self.dtype)
            if self.is_mutable_collection("context") and not self.is_initializing():
                self.put_variable("context", "kv", kv)
        kv = nn.with_logical_constraint(kv, ("act_batch", "act_keys", "act_heads", None, None))
        out = attend(q, kv[..., 0, :], kv[..., 1, :], mask, dropping(self, self.dropout))
        return Linear(d, dtype=self.dtype, name="proj")(out.reshape(b, n, d))


class Mlp(nn.Module):
    """Two layers with an activation between, a name in `ACTIVATIONS`."""

    hidden: int
    act: str = "gelu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        y = Linear(self.hidden, dtype=self.dtype, name="fc1")(x)
        y = nn.with_logical_constraint(y, ("act_batch", "act_len", "act_heads"))
        y = ACTIVATIONS[self.act](y)
        return Linear(x.shape[-1], dtype=self.dtype, name="fc2")(y)


class Block(nn.Module):
    """x += attention(norm x); x += cross-attention(norm x, other) where there is an `other`;
    x += mlp(norm x); with `Style.norm` "post" the norms follow the sums. With a `dropout` rng,
    `dropout` acts on what a branch adds and on attention weights (BERT's two places), and each
    branch may be dropped for a row (stochastic depth) with the layer's probability.
    attention: see `nn.attention.attend`. read: the last tokens alone have an output; None: all."""

    size: Size
    style: Style = BEIT
    dtype: Any = jnp.float32
    dropout: float = 0.0
    attention: str = "auto"
    read: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        drop: Float[Array, ""],
        mask: AttentionMask,
        other: Float[Array, "c m e"] | None = None,
        other_mask: OtherMask = None,
    ) -> tuple[Float[Array, "b r d"], None]:
        size, style = self.size, self.style
        x = nn.with_logical_constraint(x, ("act_batch", "act_len", "act_emb"))

        def branch(y: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
            y = Dropout(self.dropout)(y)
            if not self.has_rng("dropout"):
                return y
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop, (x.shape[0], 1, 1))
            return jnp.where(kept, y / (1 - drop).astype(y.dtype), 0)

        def add(x: Float[Array, "b n d"], f: Callable[..., Array], norm: str) -> Array:
            normalise = layer_norm(self.dtype, style.eps, norm)
            post = style.norm == "post"
            y = branch(f(x if post else normalise(x)))
            y = x[:, x.shape[1] - y.shape[1] :] + y
            return normalise(y) if post else y

        how = partial(attend, kernel=self.attention)
        attention = Attention(
            size.heads, style, self.dtype, self.dropout, how, name="attn", read=self.read
        )
        x = add(x, lambda y: attention(y, mask), "norm1")
        if other is not None:
            cross = CrossAttention(size.heads, style, self.dtype, self.dropout, name="cross")
            x = add(x, lambda y: cross(y, other, other_mask), "norm_cross")
        return add(x, Mlp(size.mlp, style.act, self.dtype, name="mlp"), "norm2"), None


class Stack(nn.Module):
    """`depth` blocks; parameters are stacked along axis 0 whatever `unroll` is.

    Called with other tokens, every block attends to them between attention and mlp (ALBEF, BLIP,
    CoCa); called without, the same blocks leave that out. Only an init that has seen others makes
    parameters for them.

    A stack can be run in parts, over some of its layers, between which a method may drop tokens:
    `part`, and `part_weighed`, which also returns attention weights. An init must call the whole.

    Three collections in addition to the parameters exist in a pass in which they are mutable:
        "attention"         gets the weights of each layer's self-attention, "b h n m"
        "cache", "context"  get the keys and values of the pass's own n tokens and of the others.
                            With these, and "cache" mutable, a pass takes one token a row, and its
                            mask "b 1 n" defines which of the n places it sees, of which the last
                            is its own: so words are decoded one by one (nn.generate)

    drop_path: stochastic depth, rising linearly from 0 at the first block to this at the last.
    remat:     None, or the name of a policy of `jax.checkpoint_policies`: what is kept for the
               backward pass ("nothing_saveable" keeps the inputs of the blocks alone).
    unroll:    blocks per step of the loop; `depth` removes it (longer to compile, faster on CPU).
    dropout:   of what a branch adds and of attention weights: BERT's, 0.1.
    attention: the kernel, see `nn.attention.attend`.

    read: only the last tokens have an output, and only they ask in the last block: the same numbers
    for less work. Not with a cache.
    """

    size: Size
    drop_path: float = 0.0
    style: Style = BEIT
    dtype: Any = jnp.float32
    remat: str | None = None
    unroll: int = 1
    dropout: float = 0.0
    attention: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: AttentionMask = None,
        other: Float[Array, "c m e"] | None = None,
        other_mask: OtherMask = None,
        read: int | None = None,
    ) -> Float[Array, "b r d"]:
        depth = self.size.depth
        if read is not None and not self.is_initializing():
            return self.part(x, 0, depth, mask, other, other_mask, read=read)
        blocks = self._layers(depth)(*self._fields(), name="blocks")
        x = blocks(x.astype(self.dtype), self._drops(), mask, other, other_mask)[0]
        return x if read is None else x[:, x.shape[1] - read :]

    def part(
        self,
        x: Float[Array, "b n d"],
        start: int,
        stop: int,
        mask: AttentionMask = None,
        other: Float[Array, "c m e"] | None = None,
        other_mask: OtherMask = None,
        read: int | None = None,
    ) -> Float[Array, "b r d"]:
        """Layers start to stop - 1 alone. Parts that follow each other are the whole, but for the
        draws of dropout and of stochastic depth."""
        rest, x = (mask, other, other_mask), x.astype(self.dtype)
        last = stop if read is None else stop - 1
        if last > start:
            layers = self._layers(last - start)(*self._fields(), parent=None)
            x = self._apply(layers, slice(start, last), x, rest)[0]
        if read is None:
            return x
        block = rematerialised(Block, self.remat, self.unroll)
        return self._apply(block(*self._fields(), read, parent=None), last, x, rest)[0]

    def part_weighed(
        self,
        x: Float[Array, "b n d"],
        start: int,
        stop: int,
        mask: AttentionMask = None,
        other: Float[Array, "c m e"] | None = None,
        other_mask: OtherMask = None,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "l b h n n"]]:
        """`part`, and the weights of its layers' self-attention in fp32 or wider, before dropout.
        Whether a token is dropped before or after the mlp of a layer whose weights chose it changes
        nothing for the others."""
        layers = self._layers(stop - start)(*self._fields(), parent=None)
        rest = (mask, other, other_mask)
        (x, _), found = self._apply(
            layers, slice(start, stop), x.astype(self.dtype), rest, mutable=["attention"]
        )
        return x, found["attention"]["attn"]["weights"]

    def _fields(self) -> tuple[Any, ...]:
        return self.size, self.style, self.dtype, self.dropout, self.attention

    def _drops(self) -> Float[Array, " l"]:
        return jnp.linspace(0.0, self.drop_path, self.size.depth, dtype=jnp.float32)

    def _layers(self, depth: int) -> Any:
        return stacked(
            Block, depth, remat=self.remat, unroll=self.unroll, shared=3,
            collections=("params", "cache", "context", "attention"),
        )  # fmt: skip

    def _apply(
        self, module: nn.Module, layers: slice | int, x: Array, rest: Any, **more: Any
    ) -> Any:
        """The result of a module with the parameters of some layers, and with a key of its own."""
        own = jax.tree.map(lambda w: w[layers], self.variables["params"]["blocks"])
        rngs = {"dropout": self.make_rng("dropout")} if self.has_rng("dropout") else {}
        return module.apply({"params": own}, x, self._drops()[layers], *rest, rngs=rngs, **more)
