"""Names and layouts of published weights: rules that are written once and used in both directions.

A rule maps the parameter `param` of this implementation to the tensor `tensor` of a published file,
by `layout`. If `tensor` has `{i}`, axis 0 of `param` stacks the layers; if it is several names, the
parameter is the concatenation of their rows. All layouts are linear, so gradients convert by the
same rules as weights. `convert.families` has the tables of the published nets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from jaxtyping import Num

from vtp_jax import tree
from vtp_jax.types import UserError

Tensor = Num[np.ndarray, "..."]


class Layout(NamedTuple):
    """into: published layout -> this implementation's; out: the inverse. Both for one layer."""

    into: Callable[[np.ndarray], np.ndarray]
    out: Callable[[np.ndarray], np.ndarray]


class Rule(NamedTuple):
    """One parameter; see the module's docstring."""

    param: str
    tensor: str | tuple[str, ...]
    layout: Layout

    def names(self, layer: int | None = None) -> list[str]:
        """The published names; those of layer `layer` if given."""
        names = [self.tensor] if isinstance(self.tensor, str) else list(self.tensor)
        return names if layer is None else [n.replace("{i}", str(layer)) for n in names]

    @property
    def stacked(self) -> bool:
        return "{i}" in self.names()[0]


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)  # (out, in) <-> (in, out)
# (out, c, t, h, w) <-> (t, h, w, c, out)
CONV = Layout(lambda x: x.transpose(2, 3, 4, 1, 0), lambda x: x.transpose(4, 3, 0, 1, 2))
# (out, c, h, w) <-> (1, h, w, c, out)
CONV2 = Layout(
    lambda x: x.transpose(2, 3, 1, 0)[None], lambda x: x.squeeze(0).transpose(3, 2, 0, 1)
)
TABLE = Layout(lambda x: x.reshape(x.shape[-2:]), lambda x: x[None])  # (1, n, d) <-> (n, d)
ROW = Layout(lambda x: x.reshape(x.shape[-1]), lambda x: x.reshape(1, 1, -1))  # (1, 1, d) <-> (d)


def fused_qkv(heads: int, parts: int = 3) -> Layout:
    """(3 h k, d), rows q | k | v, each head-major <-> (d, h, 3, k). parts: 2 for only k | v."""

    def into(x: np.ndarray) -> np.ndarray:
        return x.reshape(parts, heads, -1, x.shape[-1]).transpose(3, 1, 0, 2)

    def out(x: np.ndarray) -> np.ndarray:
        return x.transpose(2, 1, 3, 0).reshape(-1, x.shape[0])

    return Layout(into, out)


def fused_bias(heads: int, parts: int = 3) -> Layout:
    """(3 h k), q | k | v, each head-major <-> (h, 3, k). parts: 2 for only k | v."""
    return Layout(
        lambda x: x.reshape(parts, heads, -1).transpose(1, 0, 2),
        lambda x: x.transpose(1, 0, 2).reshape(-1),
    )


def per_head(heads: int) -> Layout:
    """(h k) <-> (h, k)."""
    return Layout(lambda x: x.reshape(heads, -1), lambda x: x.reshape(-1))


def head_kernel(heads: int) -> Layout:
    """(h k, d) <-> (d, h, k)."""
    return Layout(lambda x: x.T.reshape(x.shape[1], heads, -1), lambda x: x.reshape(len(x), -1).T)


def linear(param: str, tensor: str) -> list[Rule]:
    return [
        Rule(f"{param}/kernel", f"{tensor}.weight", LINEAR),
        Rule(f"{param}/bias", f"{tensor}.bias", SAME),
    ]


def norm(param: str, tensor: str) -> list[Rule]:
    return [
        Rule(f"{param}/scale", f"{tensor}.weight", SAME),
        Rule(f"{param}/bias", f"{tensor}.bias", SAME),
    ]


def cube_embed(param: str, tensor: str) -> list[Rule]:
    """`nn.embed.CubeEmbed` and a 3-D convolution with stride = kernel."""
    return [
        Rule(f"{param}/kernel", f"{tensor}.weight", CONV),
        Rule(f"{param}/bias", f"{tensor}.bias", SAME),
    ]


class BlockNames(NamedTuple):
    """The published names of a block's parts."""

    norm1: str
    qkv: str | tuple[str, ...]  # one tensor, or three
    bias: tuple[str, ...]  # of q and v, or of q, k and v in one or in three tensors
    proj: str
    norm2: str
    fc1: str
    fc2: str


def stack(param: str, tensor: str, heads: int, names: BlockNames) -> list[Rule]:
    """`nn.transformer.Stack` and the published blocks `tensor.{i}`."""
    mine, other = f"{param}/blocks", tensor + ".{i}."
    qkv = (names.qkv,) if isinstance(names.qkv, str) else names.qkv
    bias = tuple(other + b for b in names.bias)
    if len(bias) == 2:
        biases = [
            Rule(f"{mine}/attn/{x}_bias", b, per_head(heads))
            for x, b in zip("qv", bias, strict=True)
        ]
    else:
        biases = [Rule(f"{mine}/attn/qkv_bias", _one(bias), fused_bias(heads))]
    return [
        Rule(f"{mine}/attn/qkv", _one(tuple(other + x for x in qkv)), fused_qkv(heads)),
        *biases,
        *linear(f"{mine}/attn/proj", other + names.proj),
        *linear(f"{mine}/mlp/fc1", other + names.fc1),
        *linear(f"{mine}/mlp/fc2", other + names.fc2),
        *norm(f"{mine}/norm1", other + names.norm1),
        *norm(f"{mine}/norm2", other + names.norm2),
    ]


def _one(names: tuple[str, ...]) -> str | tuple[str, ...]:
    return names[0] if len(names) == 1 else names


def under(rules: Sequence[Rule], param: str = "", tensor: str = "") -> list[Rule]:
    """The same rules with prefixes on both names, such as param="text/" and tensor="bert."."""

    def prefixed(rule: Rule) -> Rule:
        names = tuple(tensor + name for name in rule.names())
        return Rule(param + rule.param, _one(names), rule.layout)

    return [prefixed(rule) for rule in rules]


def depth(names: Sequence[str] | Mapping[str, Any], prefix: str) -> int:
    """The number of blocks `prefix.{i}.` among tensor names."""
    rest = [n.removeprefix(prefix + ".") for n in names if n.startswith(prefix + ".")]
    return len({n.split(".")[0] for n in rest})


def to_params(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Nested parameters from published tensors, all of which must be used.

    Raises UserError with all names that are missing, unexpected, or of an impossible shape.
    """
    unused, flat, missing, wrong = set(tensors), {}, [], []
    for rule in rules:
        layers = [None]
        if rule.stacked:  # if there are no layers, those of the first are reported as missing
            layers = range(max(1, depth(tensors, rule.names()[0].split(".{i}")[0])))
        names = [rule.names(i) for i in layers]
        lacking = [n for part in names for n in part if n not in tensors]
        missing += lacking
        unused -= {n for part in names for n in part}
        if lacking:
            continue
        try:
            parts = [rule.layout.into(_join([np.asarray(tensors[n]) for n in p])) for p in names]
            flat[rule.param] = np.stack(parts) if rule.stacked else parts[0]
        except ValueError:
            wrong += [f"{n} {np.shape(tensors[n])}" for part in names for n in part]
    if missing or unused or wrong:
        raise UserError(
            f"tensor names do not fit: missing {sorted(missing) or 'none'}, "
            f"unexpected {sorted(unused) or 'none'}, wrong shape {sorted(wrong) or 'none'}"
        )
    return traverse_util.unflatten_dict(flat, sep="/")


def to_tensors(rules: Sequence[Rule], params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Published tensors from nested parameters (or gradients), all of which must be used.

    Raises UserError with the names that only the parameters or only the rules have.
    """
    flat, tensors = tree.flatten(params), {}
    if odd := sorted(set(flat) ^ {rule.param for rule in rules}):
        raise UserError(f"parameter names do not fit the rules: {', '.join(odd)}")
    for rule in rules:
        array = np.asarray(flat[rule.param])
        for i, layer in enumerate(array) if rule.stacked else [(None, array)]:
            names = rule.names(i)
            out = rule.layout.out(layer)
            parts = [out] if len(names) == 1 else np.split(out, len(names))
            tensors.update(zip(names, parts, strict=True))
    return tensors


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
