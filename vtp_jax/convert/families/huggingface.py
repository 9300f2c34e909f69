"""Hugging Face's VideoMAE: the nets of `videomae` under other names.

Two biases, those of q and v in every block, have had two names: `attention.attention.q_bias` in
transformers 4.22 to 5.5.0, `attention.attention.query.bias` from 5.5.1 on. Before 5.18.0, which
accepts the old names, a version that did not find its own names used zeros, with only a warning.
Exported folders contain both (`add_names`), which every version reads correctly; docs/convert.md
has a table of the versions that were tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Num

from vtp_jax.convert import nets, rules
from vtp_jax.convert.families import videomae
from vtp_jax.convert.formats import Format, Proof, Tensors
from vtp_jax.convert.hf_folder import EPS
from vtp_jax.convert.nets import Arrays, Heads
from vtp_jax.convert.reference import huggingface as reference
from vtp_jax.convert.rules import BlockNames, Rule
from vtp_jax.types import UserError

INNER = "attention.attention"
V4 = BlockNames(
    "layernorm_before", tuple(f"{INNER}.{x}.weight" for x in ("query", "key", "value")),
    (f"{INNER}.q_bias", f"{INNER}.v_bias"), "attention.output.dense",
    "layernorm_after", "intermediate.dense", "output.dense",
)  # fmt: skip
V5 = V4._replace(bias=(f"{INNER}.query.bias", f"{INNER}.value.bias"))
EMBED = "videomae.embeddings.patch_embeddings.projection"
NEW = {f"{INNER}.{a}_bias": f"{INNER}.{b}.bias" for a, b in (("q", "query"), ("v", "value"))}
OLD = {new: old for old, new in NEW.items()}


def pretrain_rules(encoder_heads: int, decoder_heads: int, names: BlockNames = V5) -> list[Rule]:
    """transformers' VideoMAEForPreTraining: 250 tensors at depth 12 + 4."""
    return [
        *_encoder("", encoder_heads, names),
        *rules.norm("encoder_norm", "videomae.layernorm"),
        *videomae.decoder_rules("decoder.decoder_layers", decoder_heads, names),
    ]


def finetune_rules(heads: int, names: BlockNames = V5) -> list[Rule]:
    """transformers' VideoMAEForVideoClassification."""
    return [
        *_encoder("base/", heads, names),
        *rules.norm("fc_norm", "fc_norm"),
        *rules.linear("head", "classifier"),
    ]


def _encoder(param: str, heads: int, names: BlockNames) -> list[Rule]:
    return [
        *rules.cube_embed(f"{param}patch_embed", EMBED),
        *rules.stack(f"{param}encoder", "videomae.encoder.layer", heads, names),
    ]


def add_names(tensors: Tensors) -> dict[str, Num[np.ndarray, "..."]]:
    """The tensors, with biases of q and v under both of their names."""
    return {**tensors, **{_swap(name, NEW): x for name, x in tensors.items()}}


def one_name(tensors: Tensors) -> dict[str, Num[np.ndarray, "..."]]:
    """The tensors of any version, with biases of q and v under their old names (`V4`).

    Biases of k, which versions 5.5.1 to 5.17 have and train, are left out: they add the same number
    to all of a query's scores, so no output depends on them. Raises UserError if the two names of a
    bias have different values, or if a block has no bias of q or of v under either name.
    """
    found: dict[str, Num[np.ndarray, "..."]] = {}
    for name, x in tensors.items():
        if name.endswith(f"{INNER}.key.bias"):
            continue
        known = found.setdefault(old := _swap(name, OLD), x)
        if not np.array_equal(known, x):
            raise UserError(f"{old} and {name} are two names of one tensor, but differ")
    query = f"{INNER}.query.weight"
    blocks = [name.removesuffix(query) for name in found if name.endswith(query)]
    if lacking := [b + bias for b in blocks for bias in NEW if b + bias not in found]:
        raise UserError(f"biases are missing, under either name: {', '.join(lacking)}")
    return found


def _swap(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def pretrain_reference(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
    """As transformers runs an exported folder: with its own eps in the norm before the head."""
    args = inputs["video"].swapaxes(1, 2), inputs["mask"]
    return reference.pretrain(tensors, *args, **nets.named(heads), eps=EPS)


def finetune_reference(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
    video = inputs["video"].swapaxes(1, 2)
    return reference.classify(tensors, video, **nets.named(heads), eps=EPS)


ENCODER = {"heads": "videomae.encoder.layer.0.layernorm_before.weight"}
DECODER = {"decoder-heads": "decoder.decoder_layers.0.layernorm_before.weight"}
TOLERANCE = 1e-4  # two norms have an eps of 1e-5 where the original has 1e-6
FORMATS = {
    "hf_videomae": Format(
        "Hugging Face's VideoMAEForPreTraining, transformers 4 and 5",
        ENCODER | DECODER,
        partial(pretrain_rules, names=V4),
        videomae.pretrain,
        tidy=one_name,
        untidy=add_names,
        proof=Proof(nets.draw_video(f"{EMBED}.weight"), pretrain_reference, TOLERANCE),
    ),
    "hf_videomae_finetune": Format(
        "Hugging Face's VideoMAEForVideoClassification, transformers 4 and 5",
        ENCODER,
        partial(finetune_rules, names=V4),
        videomae.finetune,
        tidy=one_name,
        untidy=add_names,
        proof=Proof(nets.draw_video(f"{EMBED}.weight"), finetune_reference, TOLERANCE),
    ),
}
