"""Folders of Hugging Face's VideoMAE: what stands beside the weights, and how versions name them.

Two biases have changed names twice: q and v of every block are `attention.attention.q_bias` in
transformers 4.22 to 5.5.0, `attention.attention.query.bias` from 5.5.1 on; until 5.18.0 taught it
the old names, a version that did not find its own left zeros there with no more than a warning.
Folders of ours hold both (`add_names`), which every version reads rightly; docs/convert.md has the
table of what was tried.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Num

from vtp_jax.types import UserError

Size = tuple[int, int, int, int]  # width, depth, heads, mlp: a `nn.sizes.Size`
Tensors = Mapping[str, Num[np.ndarray, "..."]]

EPS = 1e-6  # VideoMAE's. transformers' own default is 1e-12
METADATA = {"format": "pt"}  # of the safetensors file; transformers asks for it
PRETRAINING, CLASSIFICATION = "VideoMAEForPreTraining", "VideoMAEForVideoClassification"
# What a config that does not say takes for granted (transformers' VideoMAEConfig).
COUNTS: Mapping[str, int] = dict(
    hidden_size=768, num_attention_heads=12, decoder_num_attention_heads=6, num_frames=16,
    image_size=224,
)  # fmt: skip
DEFAULTS: Mapping[str, Any] = dict(
    COUNTS, layer_norm_eps=1e-12, num_channels=3, hidden_act="gelu", use_mean_pooling=True,
    qkv_bias=True, qv_bias=True,
)  # fmt: skip

ATTENTION = "attention.attention."
NEW = {f"{ATTENTION}{a}_bias": f"{ATTENTION}{b}.bias" for a, b in (("q", "query"), ("v", "value"))}
OLD = {new: old for old, new in NEW.items()}


def pretraining_config(
    *, encoder: Size, decoder: Size, frames: int, side: int, cube: Sequence[int]
) -> dict[str, Any]:
    """config.json of `VideoMAEForPreTraining`. side: of a frame, in pixels; cube: t, h, w."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(
        _config(PRETRAINING, encoder, frames, side, cube),
        use_mean_pooling=False,  # there is a norm after the encoder
        norm_pix_loss=True,
        **{f"decoder_{name}": n for name, n in zip(names, decoder, strict=True)},
    )


def classification_config(
    *, encoder: Size, labels: Sequence[str], frames: int, side: int, cube: Sequence[int]
) -> dict[str, Any]:
    """config.json of `VideoMAEForVideoClassification`. labels: what each class is called."""
    return dict(
        _config(CLASSIFICATION, encoder, frames, side, cube),
        use_mean_pooling=True,  # tokens are averaged, then normed
        id2label={str(i): label for i, label in enumerate(labels)},
        label2id={label: i for i, label in enumerate(labels)},
    )


def _config(
    architecture: str, encoder: Size, frames: int, side: int, cube: Sequence[int]
) -> dict[str, Any]:
    width, depth, heads, mlp = encoder
    tubelet, patch, across = cube
    if patch != across:
        raise UserError(f"cubes of {patch} x {across} pixels; transformers has square ones only")
    return dict(
        architectures=[architecture],
        model_type="videomae",
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp,
        hidden_act="gelu",
        layer_norm_eps=EPS,
        initializer_range=0.02,
        qkv_bias=True,  # read by transformers up to 5.17, and later ones
        qv_bias=True,  # as they write it since 5.18
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        image_size=side,
        patch_size=patch,
        num_channels=3,
        num_frames=frames,
        tubelet_size=tubelet,
    )


def preprocessor_config(
    *, side: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """preprocessor_config.json: the largest square in the middle, `side` pixels wide, in units of
    `std` from `mean`. `VideoMAEImageProcessor` of transformers 4 and 5 reads it."""
    return dict(
        image_processor_type="VideoMAEImageProcessor",
        do_resize=True,
        size={"shortest_edge": side},
        resample=2,  # bilinear
        do_center_crop=True,
        crop_size={"height": side, "width": side},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(mean),
        image_std=list(std),
    )


def add_names(tensors: Tensors) -> dict[str, Num[np.ndarray, "..."]]:
    """The tensors, with biases of q and v under both of their names."""
    return {**tensors, **{_swap(name, NEW): x for name, x in tensors.items()}}


def one_name(tensors: Tensors) -> dict[str, Num[np.ndarray, "..."]]:
    """The tensors, with biases of q and v under their old names (`rules.HF_V4`), from any version.

    Biases of k, which versions 5.5.1 to 5.17 have and train, are left out: they add the same to
    all of a query's scores, so that no output depends on them. UserError where the two names of a
    bias hold different numbers, and where a block has no bias of q or of v under either.
    """
    found: dict[str, Num[np.ndarray, "..."]] = {}
    for name, x in tensors.items():
        if name.endswith(f"{ATTENTION}key.bias"):
            continue
        known = found.setdefault(old := _swap(name, OLD), x)
        if not np.array_equal(known, x):
            raise UserError(f"{old} and {name} are two names of one tensor, and differ")
    query = f"{ATTENTION}query.weight"
    blocks = [name.removesuffix(query) for name in found if name.endswith(query)]
    if lacking := [b + bias for b in blocks for bias in NEW if b + bias not in found]:
        raise UserError(f"biases are missing, under either name: {', '.join(lacking)}")
    return found


def _swap(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


class Config(NamedTuple):
    """What a folder's config.json says and its tensors do not.

    heads, decoder_heads: of the attention layers; decoder_heads counts in pretraining only
    eps:    of the norms in blocks and after the encoder; `fc_norm` and `decoder.norm` have 1e-5 in
            transformers, 1e-6 in the original
    frames, side: of a clip; side in pixels
    labels: the classes' names, where it names them
    doubt:  what a person should look at, in one line, or ""
    """

    architecture: str
    heads: int
    decoder_heads: int
    eps: float
    frames: int
    side: int
    labels: tuple[str, ...]
    doubt: str


def read_config(folder: Path) -> Config:
    """The config.json of a folder that `save_pretrained` wrote, or of one of ours. UserError where
    there is none, or where it is of a net that ours is not."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"no '{path}', in which a Hugging Face folder has the number of its heads")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"'{path}' is not JSON") from None
    if not isinstance(said, dict) or said.get("model_type") != "videomae":
        raise UserError(f"'{path}' is not of a VideoMAE: its model_type is not 'videomae'")
    config = {**DEFAULTS, **said}
    architecture = (said.get("architectures") or ["none"])[0]
    if architecture not in (PRETRAINING, CLASSIFICATION):
        raise UserError(
            f"'{path}' is of architecture {architecture}; known: {PRETRAINING}, {CLASSIFICATION}"
        )
    ours = dict(use_mean_pooling=architecture == CLASSIFICATION, qkv_bias=True, qv_bias=True)
    for key, value in dict(ours, hidden_act="gelu", num_channels=3).items():
        if config[key] != value:
            raise UserError(f"'{path}': {key} is {config[key]!r}; a net of ours has {value!r}")
    for key in COUNTS:
        if not (isinstance(config[key], int) and config[key] > 0):
            raise UserError(f"'{path}': {key} is {config[key]!r}, not a positive whole number")
    labels = said.get("id2label", {})
    return Config(
        architecture,
        config["num_attention_heads"],
        config["decoder_num_attention_heads"],
        float(config["layer_norm_eps"]),
        config["num_frames"],
        config["image_size"],
        tuple(labels[i] for i in sorted(labels, key=int)),
        DOUBT.format(path)
        if (config["hidden_size"], config["num_attention_heads"]) == SMALL
        else "",
    )


SMALL = 384, 16
DOUBT = (
    "'{}' says 16 heads at width 384: the original ViT-S has 6, and Hugging Face's folders of it "
    "say 16 by mistake"
)
