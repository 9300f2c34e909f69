"""The file formats: which tensors a net of each has, and how a conversion of it is proved.

A conversion is proved by running both sides on the same inputs in fp64: our net on the converted
parameters, and `reference`, which knows nothing of ours, on the tensors under their own names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from jaxtyping import Num

from vtp_jax import tree
from vtp_jax.convert import hf, nets, reference, rules
from vtp_jax.convert.nets import Arrays, Heads
from vtp_jax.nn import sizes
from vtp_jax.nn.transformer import CLIP
from vtp_jax.types import Params, UserError

Tensors = Mapping[str, Num[np.ndarray, "..."]]

KNOWN = {s.width: s.heads for table in (sizes.ENCODERS, sizes.DECODERS) for s in table.values()}


class Format(NamedTuple):
    """about:  for people
    stacks: of blocks: what its number of heads is called -> a norm's weight, as wide as the stack
    rules:  numbers of heads, one for each stack -> names and layouts
    draw:   (tensors, random numbers) -> inputs, such as `reference` takes
    ours:   (our parameters in fp64, inputs, heads) -> our net on them
    theirs: (tensors, inputs, heads) -> outputs of the reference, by the same names
    unused: regexes of tensors that files may hold and no net reads
    optional: what the names of parameters begin with that a net may be without
    tidy:   the tensors under the one set of names that `rules` and `theirs` know
    untidy: what is written: the tensors under every name that readers look for
    tolerance: of a difference, in units of the output's root mean square
    """

    about: str
    stacks: Mapping[str, str]
    rules: Callable[..., list[rules.Rule]]
    draw: Callable[[Tensors, np.random.Generator], dict[str, np.ndarray]]
    ours: Callable[[Any, Arrays, Heads], nets.Net]
    theirs: Callable[[Tensors, Arrays, Heads], Mapping[str, Any]]
    unused: Sequence[str] = ()
    optional: tuple[str, ...] = ()
    tidy: Callable[[Tensors], Tensors] = dict
    untidy: Callable[[Tensors], Tensors] = dict
    tolerance: float = 1e-9


def heads_of(form: Format, tensors: Tensors, given: Mapping[str, int | None]) -> dict[str, int]:
    """The numbers of heads, which no tensor shows: as given, or as the published net of that width
    has them. CLIP's text towers have heads of 64 at any width."""
    found = {}
    for name, norm in form.stacks.items():
        if norm not in tensors:
            raise UserError(f"there is no tensor '{norm}': the file is of another format")
        width = tensors[norm].shape[-1]
        usual = width // 64 if name == "text-heads" else KNOWN.get(width, 0)
        heads = given.get(name) or usual
        if not heads or width % heads:
            raise UserError(f"no published net is {width} wide with {heads} heads; say --{name} N")
        found[name] = heads
    return found


def table(form: Format, heads: Heads, present: Set[str]) -> list[rules.Rule]:
    """The rules of a net with these heads; optional ones where `present` has the tensor or the
    parameter."""
    found = form.rules(*heads.values())
    return [
        rule
        for rule in found
        if not rule.ours.startswith(form.optional)
        or not present.isdisjoint({rule.ours, *rule.names()})
    ]


def sort_out(form: Format, tensors: Tensors) -> tuple[dict[str, Any], list[str]]:
    """The tensors of the net under the names that `rules` know, and the names of the others."""
    tidy = form.tidy(tensors)
    kept = {n: x for n, x in tidy.items() if not any(re.fullmatch(u, n) for u in form.unused)}
    used, known = {id(x) for x in kept.values()}, form.untidy(kept)
    return kept, [n for n, x in tensors.items() if id(x) not in used and n not in known]


def check(form: Format, params: Params, tensors: Tensors, heads: Heads) -> dict[str, float]:
    """{output: largest difference between our net and the reference, in units of its RMS}, fp64.

    Raises UserError, naming every one, where a tensor's shape contradicts the others.
    """
    inputs = form.draw(tensors, np.random.default_rng(0))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), dict(params))
        try:
            net = form.ours(wide, inputs, heads)
            wanted = tree.flatten(jax.eval_shape(net.init, jax.random.key(0)))
        except (ValueError, TypeError, IndexError, KeyError, FlaxError) as error:
            told = " ".join(str(error).split())[:300]
            raise UserError(f"the tensors do not make one net: {told}") from error
        given = tree.flatten(params)
        wrong = [n for n, x in given.items() if n in wanted and wanted[n].shape != x.shape]
        if wrong:
            told = (f"{n} is {given[n].shape}, not {wanted[n].shape}" for n in wrong)
            raise UserError(f"wrong shapes ({len(wrong)}): {'; '.join(told)}")
        ours = jax.device_get(dict(net.run()))
    theirs = form.theirs(tensors, inputs, heads)
    return {name: difference(mine, theirs[name]) for name, mine in ours.items()}


def difference(ours: Num[np.ndarray, "..."], theirs: Num[np.ndarray, "..."]) -> float:
    """The largest difference in units of theirs' root mean square; inf for unlike shapes or NaN."""
    if ours.shape != theirs.shape:
        return math.inf
    scale = float(np.sqrt(np.mean(np.float64(theirs) ** 2))) or 1.0
    worst = float(np.max(np.abs(ours - theirs))) / scale
    return worst if math.isfinite(worst) else math.inf


# Inputs: the smallest that use every tensor.


def draw_video(kernel: str, cubes: int = 2) -> Callable[..., dict[str, np.ndarray]]:
    """Normalised pixels, `cubes` cubes along each axis, and a mask of half of them."""

    def draw(tensors: Tensors, rng: np.random.Generator) -> dict[str, np.ndarray]:
        _, c, t, h, w = tensors[kernel].shape
        video = rng.standard_normal((nets.ROWS, c, cubes * t, cubes * h, cubes * w))
        mask = np.argsort(rng.random((nets.ROWS, cubes**3)), axis=1) < cubes**3 // 2
        return dict(video=video.astype(np.float32), mask=mask)

    return draw


def draw_words(table: str) -> Callable[..., dict[str, np.ndarray]]:
    def draw(tensors: Tensors, rng: np.random.Generator) -> dict[str, np.ndarray]:
        ids = rng.integers(1, len(tensors[table]), (nets.ROWS, nets.WORDS))
        attention = np.arange(nets.WORDS) < np.array([[nets.WORDS], [nets.WORDS - 2]])
        return dict(ids=np.where(attention, ids, 0), attention_mask=attention)

    return draw


def draw_image(kernel: str, table: str) -> Callable[..., dict[str, np.ndarray]]:
    """An image as large as the position table says."""

    def draw(tensors: Tensors, rng: np.random.Generator) -> dict[str, np.ndarray]:
        _, c, h, w = tensors[kernel].shape
        side = math.isqrt(tensors[table].shape[-2])  # the class token's row is lost in rounding
        image = rng.standard_normal((nets.ROWS, c, side * h, side * w)).astype(np.float32)
        keep = np.argsort(rng.random((nets.ROWS, side * side)), axis=1)[:, : side * side // 2]
        return dict(image=image, keep=np.sort(keep, axis=1))

    return draw


def draw_sorting(tensors: Tensors, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two frames as large as the position table says, half of their places, and a text a turn."""
    _, c, h, w = tensors["video_model.conv1.weight"].shape
    side = math.isqrt(len(tensors["video_model.positional_embedding"]) - 1)
    video = rng.standard_normal((nets.ROWS, c, 2, side * h, side * w)).astype(np.float32)
    keep = np.argsort(rng.random((nets.ROWS, side * side)), axis=1) < side * side // 2
    texts = (nets.ROWS, len(tensors["pred_model.head.bias"]), nets.WORDS)
    ids = rng.integers(1, len(tensors["text_token_embedding.weight"]), texts)
    return dict(video=video, keep=keep, ids=ids)


def together(*draws: Callable[..., dict[str, np.ndarray]]) -> Callable[..., dict[str, np.ndarray]]:
    return lambda tensors, rng: {k: v for draw in draws for k, v in draw(tensors, rng).items()}


# The references, on the same inputs.


def mae_theirs(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
    """The reference predicts every patch; ours the hidden ones, in order."""
    found = reference.mae(tensors, inputs["image"], inputs["keep"], **named(heads))
    n = found["pixels"].shape[1]
    drop = np.stack([np.setdiff1d(np.arange(n), kept) for kept in inputs["keep"]])
    return {**found, "pixels": np.take_along_axis(found["pixels"], drop[..., None], 1)}


def clip_theirs(act: reference.Act) -> Callable[..., dict[str, Any]]:
    def run(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
        image = reference.clip_image(tensors, inputs["image"], heads["heads"], act)
        text = reference.clip_text(tensors, inputs["ids"], heads["text-heads"], act)
        return dict(image=image["embedding"], text=text["embedding"])

    return run


def tvtsv2_theirs(act: reference.Act, normed: bool) -> Callable[..., dict[str, Any]]:
    def run(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
        args = (inputs[n] for n in ("video", "keep", "ids"))
        return reference.tvtsv2(tensors, *args, **named(heads), act=act, normed=normed)

    return run


def named(heads: Heads) -> dict[str, int]:
    return {name.replace("-", "_"): n for name, n in heads.items()}


# The table.

ENCODER = {"heads": "encoder.blocks.0.norm1.weight"}
DECODER = {"decoder-heads": "decoder.blocks.0.norm1.weight"}
CLIP_STACKS = {
    "heads": "visual.transformer.resblocks.0.ln_1.weight",
    "text-heads": "transformer.resblocks.0.ln_1.weight",
}
TVTSV2_STACKS = {
    "heads": "video_model.transformer.resblocks.0.ln_1.weight",
    "decoder-heads": "pred_model.norm.weight",  # the sorter's
    "text-heads": "text_model.resblocks.0.ln_1.weight",
}
DRAW_CLIP = together(
    draw_image("visual.conv1.weight", "visual.positional_embedding"),
    draw_words("token_embedding.weight"),
)
HF_ENCODER = {"heads": "videomae.encoder.layer.0.layernorm_before.weight"}
HF_DECODER = {"decoder-heads": "decoder.decoder_layers.0.layernorm_before.weight"}


def videomae_theirs(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
    args = inputs["video"], inputs["mask"]
    return reference.videomae_pretrain(tensors, *args, **named(heads))


def hf_theirs(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
    """As transformers runs a folder of ours: its own eps after `decoder` and before the head."""
    args = inputs["video"].swapaxes(1, 2), inputs["mask"]
    return reference.hf_videomae_pretrain(tensors, *args, **named(heads), eps=hf.EPS)


def hf_classify_theirs(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
    video = inputs["video"].swapaxes(1, 2)
    return reference.hf_videomae_classify(tensors, video, **named(heads), eps=hf.EPS)


def simvtp_theirs(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
    args = (inputs[n] for n in ("video", "mask", "ids", "attention_mask"))
    negatives = np.roll(np.arange(nets.ROWS), 1)
    return reference.simvtp(tensors, *args, **named(heads), negatives=negatives, pool_padding=False)


def simvtp_finetune_theirs(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
    args = (inputs[n] for n in ("video", "ids", "attention_mask"))
    return reference.simvtp_finetune(tensors, *args, **named(heads), pool_padding=False)


def vit_theirs(tensors: Tensors, inputs: Arrays, heads: Heads) -> dict[str, Any]:
    return reference.vit(tensors, inputs["image"], **heads)


def clip_tidy(tensors: Tensors) -> Tensors:
    """OpenCLIP's newer files put the text tower under "text."."""
    return {name.removeprefix("text."): x for name, x in tensors.items()}


def bert_tidy(tensors: Tensors) -> Tensors:
    """The embeddings' tensors alone; old files call scale and bias gamma and beta."""
    ends = {".gamma": ".weight", ".beta": ".bias"}
    found = {}
    for name, x in tensors.items():
        if inner := re.fullmatch(r"(?:.*[._])?(embeddings\.\w+\.\w+)", name):
            found[re.sub(r"\.(gamma|beta)$", lambda m: ends[m[0]], inner[1])] = x
    return found


FORMATS: dict[str, Format] = {
    "simvtp": Format(
        "the authors' SimVTP as pretrained",
        ENCODER | DECODER,
        rules.simvtp,
        together(
            draw_video("encoder.patch_embed.proj.weight"),
            draw_words("text_embeddings.word_embeddings.weight"),
        ),
        nets.simvtp,
        simvtp_theirs,
        rules.UNUSED["simvtp"],
    ),
    "simvtp_finetune": Format(
        "the authors' SimVTP as fine-tuned for retrieval: two towers",
        {"heads": "video_encoder.blocks.0.norm1.weight"},
        rules.simvtp_finetune,
        together(
            draw_video("video_encoder.patch_embed.proj.weight"),
            draw_words("text_encoder.text_embeddings.word_embeddings.weight"),
        ),
        nets.simvtp_finetune,
        simvtp_finetune_theirs,
        rules.UNUSED["simvtp_finetune"],
    ),
    "videomae": Format(
        "VideoMAE and VideoMAE V2 as pretrained",
        ENCODER | DECODER,
        rules.videomae,
        draw_video("encoder.patch_embed.proj.weight"),
        nets.videomae,
        videomae_theirs,
    ),
    "videomae_finetune": Format(
        "VideoMAE and VideoMAE V2 as fine-tuned to classify",
        {"heads": "blocks.0.norm1.weight"},
        rules.videomae_finetune,
        draw_video("patch_embed.proj.weight"),
        nets.videomae_finetune,
        lambda t, inputs, heads: reference.videomae_classify(t, inputs["video"], **heads),
    ),
    # Hugging Face's nets have an eps of 1e-5 where the original, and ours, have 1e-6.
    "hf_videomae": Format(
        "Hugging Face's VideoMAEForPreTraining, transformers 4 and 5",
        HF_ENCODER | HF_DECODER,
        partial(rules.hf_videomae, names=rules.HF_V4),
        draw_video("videomae.embeddings.patch_embeddings.projection.weight"),
        nets.videomae,
        hf_theirs,
        tidy=hf.one_name,
        untidy=hf.add_names,
        tolerance=1e-4,
    ),
    "hf_videomae_finetune": Format(
        "Hugging Face's VideoMAEForVideoClassification, transformers 4 and 5",
        HF_ENCODER,
        partial(rules.hf_videomae_classifier, names=rules.HF_V4),
        draw_video("videomae.embeddings.patch_embeddings.projection.weight"),
        nets.videomae_finetune,
        hf_classify_theirs,
        tidy=hf.one_name,
        untidy=hf.add_names,
        tolerance=1e-4,
    ),
    "bert_embeddings": Format(
        "the embedding tables of a BERT",
        {},
        lambda: rules.bert_embeddings("text_embed", "embeddings"),
        draw_words("embeddings.word_embeddings.weight"),
        nets.word,
        lambda t, inputs, heads: dict(tokens=reference.bert_embeddings(t, inputs["ids"])),
        tidy=bert_tidy,
    ),
    "vit": Format(
        "timm's ViT, DeiT without distillation, MAE's released encoders",
        {"heads": "blocks.0.norm1.weight"},
        rules.timm_vit,
        draw_image("patch_embed.proj.weight", "pos_embed"),
        nets.vit("class"),
        vit_theirs,
        optional=("head/",),
    ),
    "vit_mean": Format(
        "timm's ViT whose tokens are averaged before `fc_norm`, as fine-tuned MAE",
        {"heads": "blocks.0.norm1.weight"},
        partial(rules.timm_vit, last="fc_norm"),
        draw_image("patch_embed.proj.weight", "pos_embed"),
        nets.vit("mean"),
        vit_theirs,
        optional=("head/",),
    ),
    "mae": Format(
        "MAE as pretrained, with its decoder",
        {"heads": "blocks.0.norm1.weight", "decoder-heads": "decoder_blocks.0.norm1.weight"},
        rules.mae,
        draw_image("patch_embed.proj.weight", "pos_embed"),
        nets.mae,
        mae_theirs,
    ),
    "clip": Format(
        "OpenAI's CLIP with a ViT, and OpenCLIP's where they have the quick GELU",
        CLIP_STACKS,
        rules.clip,
        DRAW_CLIP,
        nets.clip(CLIP),
        clip_theirs("quick_gelu"),
        rules.UNUSED["clip"],
        tidy=clip_tidy,
    ),
    "open_clip": Format(
        "OpenCLIP with a ViT and the exact GELU",
        CLIP_STACKS,
        rules.clip,
        DRAW_CLIP,
        nets.clip(CLIP._replace(act="gelu")),
        clip_theirs("gelu"),
        rules.UNUSED["clip"],
        tidy=clip_tidy,
    ),
    "tvtsv2": Format(
        "the authors' TVTSv2 B/16 and B/32, with the sorter",
        TVTSV2_STACKS,
        rules.tvtsv2,
        draw_sorting,
        nets.tvtsv2("quick_gelu", "tokens"),
        tvtsv2_theirs("quick_gelu", True),
    ),
    "tvtsv2_h14": Format(
        "the authors' TVTSv2 H/14, with the sorter",
        TVTSV2_STACKS,
        rules.tvtsv2,
        draw_sorting,
        nets.tvtsv2("gelu", "patches"),
        tvtsv2_theirs("gelu", False),
    ),
}
