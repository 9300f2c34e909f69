"""The JSON files in folders of Hugging Face's VideoMAE: written for exports, read for imports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vtp_jax.types import UserError

Size = tuple[int, int, int, int]  # width, depth, heads, mlp: a `nn.sizes.Size`

EPS = 1e-6  # VideoMAE's. transformers' own default is 1e-12
METADATA = {"format": "pt"}  # of the safetensors file; transformers asks for it
PRETRAINING, CLASSIFICATION = "VideoMAEForPreTraining", "VideoMAEForVideoClassification"
# The defaults of a config.json (transformers' VideoMAEConfig).
COUNTS: Mapping[str, int] = dict(
    hidden_size=768, num_attention_heads=12, decoder_num_attention_heads=6, num_frames=16,
    image_size=224,
)  # fmt: skip
DEFAULTS: Mapping[str, Any] = dict(
    COUNTS, layer_norm_eps=1e-12, num_channels=3, hidden_act="gelu", use_mean_pooling=True,
    qkv_bias=True, qv_bias=True,
)  # fmt: skip


def pretraining_config(
    *,
    encoder: Size,
    decoder: Size,
    frames: int,
    side: int,
    cube: Sequence[int],
    normalised: bool = True,
) -> dict[str, Any]:
    """config.json of `VideoMAEForPreTraining`. side: of a frame, in pixels; cube: t, h, w;
    normalised: whether its targets are, cube by cube."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(
        _config(PRETRAINING, encoder, frames, side, cube),
        use_mean_pooling=False,  # there is a norm after the encoder
        norm_pix_loss=normalised,
        **{f"decoder_{name}": n for name, n in zip(names, decoder, strict=True)},
    )


def classification_config(
    *, encoder: Size, labels: Sequence[str], frames: int, side: int, cube: Sequence[int]
) -> dict[str, Any]:
    """config.json of `VideoMAEForVideoClassification`. labels: the names of the classes."""
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
        raise UserError(
            f"cubes of {patch} x {across} pixels; transformers supports square ones only"
        )
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
    """preprocessor_config.json: the largest centred square, `side` pixels wide, normalised by
    `mean` and `std`. `VideoMAEImageProcessor` of transformers 4 and 5 reads it."""
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


class Config(NamedTuple):
    """The fields of a folder's config.json that cannot be inferred from its tensors.

    heads, decoder_heads: of the attention layers; decoder_heads matters in pretraining only
    eps:    of the norms in blocks and after the encoder; `fc_norm` and `decoder.norm` have 1e-5 in
            transformers, 1e-6 in the original
    frames, side: of a clip; side in pixels
    labels: the names of the classes, if any
    doubt:  a warning to check the config, in one line, or ""
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
    """The config.json of a folder that `save_pretrained` or `convert export` wrote.

    Raises UserError if there is none, or if it describes a net other than `methods.videomae`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"no '{path}', which has the number of heads of a Hugging Face folder")
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"'{path}' is not JSON") from None
    if not isinstance(written, dict) or written.get("model_type") != "videomae":
        raise UserError(f"'{path}' does not describe a VideoMAE: its model_type is not 'videomae'")
    config = {**DEFAULTS, **written}
    architecture = (written.get("architectures") or ["none"])[0]
    if architecture not in (PRETRAINING, CLASSIFICATION):
        raise UserError(
            f"'{path}' is of architecture {architecture}; known: {PRETRAINING}, {CLASSIFICATION}. "
            "Save the net, not its configuration alone: net.save_pretrained(FOLDER) writes it"
        )
    supported = dict(use_mean_pooling=architecture == CLASSIFICATION, qkv_bias=True, qv_bias=True)
    for key, value in dict(supported, hidden_act="gelu", num_channels=3).items():
        if config[key] != value:
            raise UserError(
                f"'{path}': {key} is {config[key]!r}{'' if key in written else ' by default'}; "
                f"vtp_jax supports {value!r}{ADVICE.get((key, architecture), '')}"
            )
    for key in COUNTS:
        if not (isinstance(config[key], int) and config[key] > 0):
            raise UserError(f"'{path}': {key} is {config[key]!r}, not a positive whole number")
    return Config(
        architecture,
        config["num_attention_heads"],
        config["decoder_num_attention_heads"],
        float(config["layer_norm_eps"]),
        config["num_frames"],
        config["image_size"],
        read_labels(path, written.get("id2label")),
        DOUBT.format(path)
        if (config["hidden_size"], config["num_attention_heads"]) == SMALL
        else "",
    )


# The default of use_mean_pooling suits classification. In pretraining it leaves out the last norm.
ADVICE = {
    (
        "use_mean_pooling",
        PRETRAINING,
    ): ", the net of the paper, which has a norm after the encoder; "
    "pretrain with VideoMAEConfig(use_mean_pooling=False), as in the authors' folders",
    ("use_mean_pooling", CLASSIFICATION): ", as in the authors' folders; fine-tune with "
    "VideoMAEConfig(use_mean_pooling=True)",
}


def read_labels(path: Path, written: Any) -> tuple[str, ...]:
    """The names of the classes in `id2label` of a config.json, in their order; those that it lacks
    are called LABEL_i, as transformers calls them. Numbers and names may be exchanged (label2id).
    Raises UserError if they are neither."""
    if written is None:
        return ()
    names: dict[int, str] = {}
    if isinstance(written, dict):
        pairs = list(written.items())
        if not all(str(key).isdecimal() for key, _ in pairs):
            pairs = [(value, key) for key, value in pairs]
        names = {int(key): str(name) for key, name in pairs if str(key).isdecimal()}
    if not isinstance(written, dict) or len(names) < len(written) or max(names, default=0) > MOST:
        raise UserError(f"'{path}': id2label must be {{number: name}}, each number from 0 once")
    return tuple(names.get(i, f"LABEL_{i}") for i in range(max(names, default=-1) + 1))


def fit_labels(labels: Sequence[str], classes: int) -> tuple[str, ...]:
    """A name for each of the head's classes, LABEL_i for those without. Raises UserError if there
    are more names than classes."""
    if len(labels) > classes:
        raise UserError(
            f"{len(labels)} names of classes, but the head has {classes}; remove the rest"
        )
    return (*labels, *(f"LABEL_{i}" for i in range(len(labels), classes)))


MOST = 1 << 20  # classes
SMALL = 384, 16
DOUBT = (
    "'{}' has 16 heads at width 384: the original ViT-S has 6, and Hugging Face's folders of it "
    "have 16 by mistake"
)
