"""Names and layouts between vtp_jax and PyTorch, per part of `nn`, written once, used both ways.

A rule says: our parameter `ours` is their tensor `theirs`, in layout `layout`. Where `theirs` has
`{i}`, ours stacks the layers along axis 0. All layouts are linear, so that gradients convert by
the same rules as weights.
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
    """into: theirs -> ours, out: ours -> theirs, for one layer."""

    into: Callable[[np.ndarray], np.ndarray]
    out: Callable[[np.ndarray], np.ndarray]


class Rule(NamedTuple):
    ours: str
    theirs: str
    layout: Layout


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)  # (out, in) <-> (in, out)
# (out, c, t, h, w) <-> (t, h, w, c, out)
CONV = Layout(lambda x: x.transpose(2, 3, 4, 1, 0), lambda x: x.transpose(4, 3, 0, 1, 2))
ROW = Layout(lambda x: x.reshape(x.shape[-1]), lambda x: x.reshape(1, 1, -1))  # (1, 1, d) <-> (d)


def fused_qkv(heads: int) -> Layout:
    """(3 h k, d), rows q | k | v and head-major inside <-> (d, h, 3, k)."""

    def into(x: np.ndarray) -> np.ndarray:
        return x.reshape(3, heads, -1, x.shape[-1]).transpose(3, 1, 0, 2)

    def out(x: np.ndarray) -> np.ndarray:
        return x.transpose(2, 1, 3, 0).reshape(-1, x.shape[0])

    return Layout(into, out)


def per_head(heads: int) -> Layout:
    """(h k) <-> (h, k)."""
    return Layout(lambda x: x.reshape(heads, -1), lambda x: x.reshape(-1))


def linear(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule(f"{ours}/kernel", f"{theirs}.weight", LINEAR),
        Rule(f"{ours}/bias", f"{theirs}.bias", SAME),
    ]


def norm(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule(f"{ours}/scale", f"{theirs}.weight", SAME),
        Rule(f"{ours}/bias", f"{theirs}.bias", SAME),
    ]


def stack(ours: str, theirs: str, heads: int) -> list[Rule]:
    """`nn.transformer.Stack` and the blocks of BEiT, VideoMAE and SimVTP."""
    mine, other = f"{ours}/blocks", theirs + ".{i}"
    return [
        Rule(f"{mine}/attn/qkv", f"{other}.attn.qkv.weight", fused_qkv(heads)),
        Rule(f"{mine}/attn/q_bias", f"{other}.attn.q_bias", per_head(heads)),
        Rule(f"{mine}/attn/v_bias", f"{other}.attn.v_bias", per_head(heads)),
        *linear(f"{mine}/attn/proj", f"{other}.attn.proj"),
        *linear(f"{mine}/mlp/fc1", f"{other}.mlp.fc1"),
        *linear(f"{mine}/mlp/fc2", f"{other}.mlp.fc2"),
        *norm(f"{mine}/norm1", f"{other}.norm1"),
        *norm(f"{mine}/norm2", f"{other}.norm2"),
    ]


def bert_embeddings(ours: str, theirs: str) -> list[Rule]:
    """`nn.embed.WordEmbed` and BERT's embedding module."""
    tables = dict(word="word", position="position", type="token_type")
    return [
        *(Rule(f"{ours}/{a}", f"{theirs}.{b}_embeddings.weight", SAME) for a, b in tables.items()),
        *norm(f"{ours}/norm", f"{theirs}.LayerNorm"),
    ]


def simvtp(encoder_heads: int, decoder_heads: int) -> list[Rule]:
    """The official SimVTP pretraining model: 227 tensors at depth 12 + 4."""
    return [
        Rule("patch_embed/kernel", "encoder.patch_embed.proj.weight", CONV),
        Rule("patch_embed/bias", "encoder.patch_embed.proj.bias", SAME),
        *stack("encoder", "encoder.blocks", encoder_heads),
        *norm("encoder_norm", "encoder.norm"),
        Rule("encoder_to_decoder/kernel", "encoder_to_decoder.weight", LINEAR),
        Rule("mask_token", "mask_token", ROW),
        *stack("decoder", "decoder.blocks", decoder_heads),
        *norm("decoder_norm", "decoder.norm"),
        *linear("decoder_head", "decoder.head"),
        *bert_embeddings("text_embed", "text_embeddings"),
        *linear("text_cls", "text_cls"),
        *linear("vtm_head", "vtm_head"),
    ]


def depth(names: Sequence[str] | Mapping[str, Any], prefix: str) -> int:
    """How many blocks `prefix.{i}.` there are among tensor names."""
    rest = [n.removeprefix(prefix + ".") for n in names if n.startswith(prefix + ".")]
    return len({n.split(".")[0] for n in rest})


def to_ours(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our nested parameters from their tensors, all of which must be used."""
    unused, flat, missing = set(tensors), {}, []
    for rule in rules:
        names = [rule.theirs]
        if "{i}" in rule.theirs:
            layers = depth(tensors, rule.theirs.split(".{i}")[0])
            names = [rule.theirs.replace("{i}", str(i)) for i in range(layers)]
        missing += [name for name in names if name not in tensors]
        if missing:
            continue
        unused -= set(names)
        parts = [rule.layout.into(np.asarray(tensors[name])) for name in names]
        flat[rule.ours] = np.stack(parts) if "{i}" in rule.theirs else parts[0]
    if missing or unused:
        raise UserError(
            f"tensor names do not fit: missing {sorted(missing) or 'none'}, "
            f"unexpected {sorted(unused) or 'none'}"
        )
    return traverse_util.unflatten_dict(flat, sep="/")


def to_theirs(rules: Sequence[Rule], params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Their tensors from our nested parameters (or gradients), all of which must be used."""
    flat, tensors = tree.flatten(params), {}
    if odd := sorted(set(flat) ^ {rule.ours for rule in rules}):
        raise UserError(f"parameter names do not fit the rules: {', '.join(odd)}")
    for rule in rules:
        array = np.asarray(flat[rule.ours])
        if "{i}" in rule.theirs:
            for i, layer in enumerate(array):
                tensors[rule.theirs.replace("{i}", str(i))] = rule.layout.out(layer)
        else:
            tensors[rule.theirs] = rule.layout.out(array)
    return tensors
