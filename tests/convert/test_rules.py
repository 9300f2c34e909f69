"""Every table of names maps all tensors, and maps them back bit for bit.

The published names and shapes are restated here by hand, at full depth and small width.
"""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest

from vtp_jax import tree
from vtp_jax.convert import rules
from vtp_jax.convert.families import FORMATS, bert, clip, huggingface, simvtp, timm, videomae
from vtp_jax.types import UserError

D, E, HEADS = 12, 8, 2  # widths of encoders and decoders
WORDS, PLACES = 11, 5
CUBE, PATCH = (3, 2, 4, 4), (3, 4, 4)  # channels, (frames,) rows, columns

Shapes = dict[str, tuple[int, ...]]


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, d: int) -> Shapes:
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


def conv(name: str, patch: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": (D, *patch), f"{name}.bias": (D,)}


def blocks(prefix: str, depth: int, block: Shapes) -> Shapes:
    return {f"{prefix}.{i}.{name}": s for i in range(depth) for name, s in block.items()}


def mlp(fc1: str, fc2: str, d: int) -> Shapes:
    return {**linear(fc1, 4 * d, d), **linear(fc2, d, 4 * d)}


def beit(d: int) -> Shapes:
    return {
        **norm("norm1", d), "attn.q_bias": (d,), "attn.v_bias": (d,),
        "attn.qkv.weight": (3 * d, d), **linear("attn.proj", d, d),
        **norm("norm2", d), **mlp("mlp.fc1", "mlp.fc2", d),
    }  # fmt: skip


def hf(d: int, bias: tuple[str, str]) -> Shapes:
    inner = "attention.attention"
    return {
        **{f"{inner}.{x}.weight": (d, d) for x in ("query", "key", "value")},
        **{f"{inner}.{x}": (d,) for x in bias},
        **linear("attention.output.dense", d, d),
        **mlp("intermediate.dense", "output.dense", d),
        **norm("layernorm_before", d), **norm("layernorm_after", d),
    }  # fmt: skip


V4, V5 = ("q_bias", "v_bias"), ("query.bias", "value.bias")
WORD_EMBED = {
    "word_embeddings.weight": (WORDS, D), "position_embeddings.weight": (PLACES, D),
    "token_type_embeddings.weight": (2, D), **norm("LayerNorm", D),
}  # fmt: skip


def videomae_shapes() -> Shapes:
    return {
        "mask_token": (1, 1, E),
        **conv("encoder.patch_embed.proj", CUBE),
        **blocks("encoder.blocks", 12, beit(D)),
        **norm("encoder.norm", D),
        **blocks("decoder.blocks", 4, beit(E)),
        **norm("decoder.norm", E),
        **linear("decoder.head", math.prod(CUBE), E),
        "encoder_to_decoder.weight": (E, D),
    }


def simvtp_shapes() -> Shapes:
    return {
        **videomae_shapes(),
        **under("text_embeddings.", WORD_EMBED),
        **linear("text_cls", WORDS, D),
        **linear("vtm_head", 2, D),
    }


def videomae_finetune_shapes() -> Shapes:
    return {
        **conv("patch_embed.proj", CUBE),
        **blocks("blocks", 12, beit(D)),
        **norm("fc_norm", D),
        **linear("head", 7, D),
    }


def simvtp_finetune_shapes() -> Shapes:
    towers = {**blocks("blocks", 12, beit(D)), **norm("fc_norm", D)}
    return {
        **under("video_encoder.", {**conv("patch_embed.proj", CUBE), **towers}),
        **under("text_encoder.", {**under("text_embeddings.", WORD_EMBED), **towers}),
    }


def hf_videomae_shapes(bias: tuple[str, str]) -> Shapes:
    return {
        "mask_token": (1, 1, E),
        **conv("videomae.embeddings.patch_embeddings.projection", CUBE),
        **blocks("videomae.encoder.layer", 12, hf(D, bias)),
        **norm("videomae.layernorm", D),
        "encoder_to_decoder.weight": (E, D),
        **blocks("decoder.decoder_layers", 4, hf(E, bias)),
        **norm("decoder.norm", E),
        **linear("decoder.head", math.prod(CUBE), E),
    }


def hf_videomae_classifier_shapes(bias: tuple[str, str]) -> Shapes:
    return {
        **conv("videomae.embeddings.patch_embeddings.projection", CUBE),
        **blocks("videomae.encoder.layer", 12, hf(D, bias)),
        **norm("fc_norm", D),
        **linear("classifier", 7, D),
    }


def timm_block(d: int) -> Shapes:
    return {
        **norm("norm1", d), **linear("attn.qkv", 3 * d, d), **linear("attn.proj", d, d),
        **norm("norm2", d), **mlp("mlp.fc1", "mlp.fc2", d),
    }  # fmt: skip


def clip_block(d: int) -> Shapes:
    return {
        **norm("ln_1", d), "attn.in_proj_weight": (3 * d, d), "attn.in_proj_bias": (3 * d,),
        **linear("attn.out_proj", d, d),
        **norm("ln_2", d), **mlp("mlp.c_fc", "mlp.c_proj", d),
    }  # fmt: skip


def vit_shapes() -> Shapes:
    return {
        "cls_token": (1, 1, D),
        "pos_embed": (1, PLACES, D),
        **conv("patch_embed.proj", PATCH),
        **blocks("blocks", 12, timm_block(D)),
    }


def mae_shapes() -> Shapes:
    return {
        **vit_shapes(),
        **norm("norm", D),
        **linear("decoder_embed", E, D),
        "mask_token": (1, 1, E),
        "decoder_pos_embed": (1, PLACES, E),
        **blocks("decoder_blocks", 8, timm_block(E)),
        **norm("decoder_norm", E),
        **linear("decoder_pred", math.prod(PATCH), E),
    }


def clip_shapes(text: str) -> Shapes:
    visual = {
        "conv1.weight": (D, *PATCH),
        "class_embedding": (D,),
        "positional_embedding": (PLACES, D),
        **norm("ln_pre", D),
        **blocks("transformer.resblocks", 12, clip_block(D)),
        **norm("ln_post", D),
        "proj": (D, 6),
    }
    words = {
        "token_embedding.weight": (WORDS, E),
        "positional_embedding": (7, E),
        **blocks("transformer.resblocks", 12, clip_block(E)),
        **norm("ln_final", E),
        "text_projection": (E, 6),
    }
    return {**under("visual.", visual), **under(text, words), "logit_scale": ()}


def bert_block(d: int) -> Shapes:
    attention = {}
    for x in ("query", "key", "value"):
        attention |= linear(f"attention.self.{x}", d, d)
    return {
        **attention, **linear("attention.output.dense", d, d),
        **norm("attention.output.LayerNorm", d),
        **mlp("intermediate.dense", "output.dense", d), **norm("output.LayerNorm", d),
    }  # fmt: skip


def cross_block(d: int, e: int) -> Shapes:
    attention = linear("crossattention.self.query", d, d)
    for x in ("key", "value"):
        attention |= linear(f"crossattention.self.{x}", d, e)
    return {
        **attention, **linear("crossattention.output.dense", d, d),
        **norm("crossattention.output.LayerNorm", d),
    }  # fmt: skip


def bert_shapes() -> Shapes:
    return {
        **under("embeddings.", WORD_EMBED),
        **blocks("encoder.layer", 12, bert_block(D)),
        **linear("pooler.dense", D, D),
    }


# name -> (its rules, their tensors, the number of tensors in the published file)
TABLES: dict[str, Callable[[], tuple[list[rules.Rule], Shapes, int]]] = {
    "videomae": lambda: (videomae.pretrain_rules(HEADS, HEADS), videomae_shapes(), 218),
    "simvtp": lambda: (simvtp.pretrain_rules(HEADS, HEADS), simvtp_shapes(), 227),
    "videomae_finetune": lambda: (
        videomae.finetune_rules(HEADS),
        videomae_finetune_shapes(),
        162,
    ),
    # The file's 330 less the video tower's text table and the text tower's cubes.
    "simvtp_finetune": lambda: (
        simvtp.finetune_rules(HEADS),
        simvtp_finetune_shapes(),
        330 - 5 - 2,
    ),
    "hf_videomae_v4": lambda: (
        huggingface.pretrain_rules(HEADS, HEADS, huggingface.V4),
        hf_videomae_shapes(V4),
        250,
    ),
    "hf_videomae_v5": lambda: (
        huggingface.pretrain_rules(HEADS, HEADS),
        hf_videomae_shapes(V5),
        250,
    ),
    "hf_classifier_v4": lambda: (
        huggingface.finetune_rules(HEADS, huggingface.V4),
        hf_videomae_classifier_shapes(V4),
        186,
    ),
    "hf_classifier_v5": lambda: (
        huggingface.finetune_rules(HEADS),
        hf_videomae_classifier_shapes(V5),
        186,
    ),
    "timm": lambda: (timm.vit_rules(HEADS), {**vit_shapes(), **ENDS, **norm("norm", D)}, 152),
    "timm_mean": lambda: (
        timm.vit_rules(HEADS, "fc_norm"),
        {**vit_shapes(), **ENDS, **norm("fc_norm", D)},
        152,
    ),
    "mae_encoder": lambda: (
        timm.vit_rules(HEADS, head=None),
        {**vit_shapes(), **norm("norm", D)},
        150,
    ),
    "mae": lambda: (timm.mae_rules(HEADS, HEADS), mae_shapes(), 254),
    "bert": lambda: (bert.bert_rules(HEADS), bert_shapes(), 199),
    "bert_cross": lambda: (
        bert.bert_rules(HEADS) + bert.cross_rules("encoder", "encoder.layer", HEADS),
        {**bert_shapes(), **blocks("encoder.layer", 12, cross_block(D, E))},
        199 + 12 * 10,
    ),
    "clip": lambda: (clip.clip_rules(HEADS, HEADS), clip_shapes(""), 302),
    "open_clip": lambda: (clip.clip_rules(HEADS, HEADS, "text."), clip_shapes("text."), 302),
}
ENDS = linear("head", 7, D)


def draw(shapes: Shapes, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(s).astype(dtype) for name, s in shapes.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", TABLES)
def test_import_then_export_is_the_identity_bit_for_bit(name, dtype):
    table, shapes, count = TABLES[name]()
    theirs = draw(shapes, dtype)
    ours = rules.to_params(table, theirs)
    back = rules.to_tensors(table, ours)
    assert len(shapes) == count and back.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert back[key].dtype == tensor.dtype and back[key].shape == tensor.shape, key
        assert back[key].tobytes() == tensor.tobytes(), key
    assert tree.size(ours) == sum(t.size for t in theirs.values())


@pytest.mark.parametrize("name", TABLES)
def test_gradients_convert_by_the_same_rules(name):
    """Layouts only move numbers: they commute with sums, and lose and invent none."""
    table, shapes, _ = TABLES[name]()
    a = draw(shapes)
    b = {key: np.asarray(np.flip(tensor) * 3) for key, tensor in a.items()}
    both = tree.flatten(rules.to_params(table, {key: np.asarray(a[key] + b[key]) for key in a}))
    x, y = (tree.flatten(rules.to_params(table, t)) for t in (a, b))
    for key, array in both.items():
        assert (array == x[key] + y[key]).all(), key
    assert (
        np.sort(np.concatenate([v.ravel() for v in x.values()]))
        == np.sort(np.concatenate([v.ravel() for v in a.values()]))
    ).all()


@pytest.mark.parametrize("name", TABLES)
def test_all_missing_and_unexpected_tensors_are_reported(name):
    table, shapes, _ = TABLES[name]()
    theirs, gone = draw(shapes), list(shapes)[:: max(1, len(shapes) // 5)]
    for key in gone:
        theirs[f"strange.{key}"] = theirs.pop(key)
    with pytest.raises(UserError) as error:
        rules.to_params(table, theirs)
    missing, unexpected = str(error.value).split("unexpected")
    assert all(f"'{key}'" in missing and f"'strange.{key}'" in unexpected for key in gone)
    assert "\n" not in str(error.value)


def test_another_net_and_a_wrong_shape_are_rejected():
    table, shapes, _ = TABLES["videomae_finetune"]()
    with pytest.raises(UserError, match=r"missing .*'blocks.0.attn.qkv.weight'.* unexpected .*'x'"):
        rules.to_params(table, {"x": np.zeros(1)})
    theirs = draw(shapes)
    theirs["blocks.3.mlp.fc1.weight"] = np.zeros((5, 7), np.float32)
    with pytest.raises(UserError, match=r"missing none, .*'blocks.3.mlp.fc1.weight \(5, 7\)"):
        rules.to_params(table, theirs)


def test_parameters_that_no_rule_matches_are_rejected():
    table, shapes, _ = TABLES["videomae_finetune"]()
    ours = rules.to_params(table, draw(shapes))
    with pytest.raises(UserError, match="extra/kernel"):
        rules.to_tensors(table, {**ours, "extra": {"kernel": np.zeros(1)}})


def test_unused_tensors_are_listed_and_read_by_no_rule():
    theirs = under("video_encoder.text_embeddings.", WORD_EMBED)
    theirs |= under("text_encoder.", conv("patch_embed.proj", CUBE))
    theirs["text_encoder.text_embeddings.position_ids"] = (1, PLACES)
    assert len(theirs) == 330 - 323 + 1
    unused = FORMATS["simvtp_finetune"].unused
    assert all(any(re.fullmatch(u, name) for u in unused) for name in theirs)
    unused = {name: FORMATS[name].unused for name in ("simvtp", "simvtp_finetune", "clip")}
    for name, patterns in {**unused, "bert": bert.UNUSED}.items():
        assert patterns
        wanted = [n for n in TABLES[name]()[1] if any(re.fullmatch(u, n) for u in patterns)]
        assert not wanted, name


def test_a_table_can_be_put_under_prefixes():
    table, shapes, _ = TABLES["hf_videomae_v5"]()
    theirs = draw(under("module.", shapes))
    moved = rules.to_params(rules.under(table, "net/", "module."), theirs)
    plain = rules.to_params(table, {k.removeprefix("module."): v for k, v in theirs.items()})
    assert tree.flatten(moved).keys() == {f"net/{k}" for k in tree.flatten(plain)}
    assert (moved["net"]["mask_token"] == plain["mask_token"]).all()
