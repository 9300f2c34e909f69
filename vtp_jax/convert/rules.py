"""Names and layouts between vtp_jax and PyTorch, per part of `nn`, written once, used both ways.

A rule says: our parameter `ours` is their tensor `theirs`, in layout `layout`. Where `theirs` has
`{i}`, ours stacks the layers along axis 0; where it is several names, their rows joined are one
tensor of ours. All layouts are linear, so that gradients convert by the same rules as weights.
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
    theirs: str | tuple[str, ...]
    layout: Layout

    def names(self, layer: int | None = None) -> list[str]:
        """Their names; of one layer where there are layers."""
        names = [self.theirs] if isinstance(self.theirs, str) else list(self.theirs)
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
    """(3 h k, d), rows q | k | v and head-major inside <-> (d, h, 3, k); k | v alone: 2 parts."""

    def into(x: np.ndarray) -> np.ndarray:
        return x.reshape(parts, heads, -1, x.shape[-1]).transpose(3, 1, 0, 2)

    def out(x: np.ndarray) -> np.ndarray:
        return x.transpose(2, 1, 3, 0).reshape(-1, x.shape[0])

    return Layout(into, out)


def fused_bias(heads: int, parts: int = 3) -> Layout:
    """(3 h k), q | k | v and head-major inside <-> (h, 3, k); k | v alone: 2 parts."""
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


# What the parts of a block are called. qkv: one name, or three.
class BlockNames(NamedTuple):
    norm1: str
    qkv: str | tuple[str, ...]
    bias: tuple[str, ...]  # of q and v, or of q, k and v in one or in three tensors
    proj: str
    norm2: str
    fc1: str
    fc2: str


BEIT = BlockNames(
    "norm1", "attn.qkv.weight", ("attn.q_bias", "attn.v_bias"), "attn.proj",
    "norm2", "mlp.fc1", "mlp.fc2",
)  # fmt: skip
TIMM = BEIT._replace(bias=("attn.qkv.bias",))
CLIP = BlockNames(
    "ln_1", "attn.in_proj_weight", ("attn.in_proj_bias",), "attn.out_proj",
    "ln_2", "mlp.c_fc", "mlp.c_proj",
)  # fmt: skip
TVTS = CLIP._replace(qkv="attn.qkv.weight", bias=("attn.qkv.bias",), proj="attn.proj")
HF = "attention.attention"
HF_V4 = BlockNames(
    "layernorm_before", tuple(f"{HF}.{x}.weight" for x in ("query", "key", "value")),
    (f"{HF}.q_bias", f"{HF}.v_bias"), "attention.output.dense",
    "layernorm_after", "intermediate.dense", "output.dense",
)  # fmt: skip
HF_V5 = HF_V4._replace(bias=(f"{HF}.query.bias", f"{HF}.value.bias"))
BERT = BlockNames(
    "attention.output.LayerNorm",
    tuple(f"attention.self.{x}.weight" for x in ("query", "key", "value")),
    tuple(f"attention.self.{x}.bias" for x in ("query", "key", "value")),
    "attention.output.dense",
    "output.LayerNorm", "intermediate.dense", "output.dense",
)  # fmt: skip


def stack(ours: str, theirs: str, heads: int, names: BlockNames = BEIT) -> list[Rule]:
    """`nn.transformer.Stack` and their blocks, which are called `theirs.{i}`."""
    mine, other = f"{ours}/blocks", theirs + ".{i}."
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


def bert_embeddings(ours: str, theirs: str) -> list[Rule]:
    """`nn.embed.WordEmbed` and BERT's embedding module."""
    tables = dict(word="word", position="position", type="token_type")
    return [
        *(Rule(f"{ours}/{a}", f"{theirs}.{b}_embeddings.weight", SAME) for a, b in tables.items()),
        *norm(f"{ours}/norm", f"{theirs}.LayerNorm"),
    ]


def under(rules: Sequence[Rule], ours: str = "", theirs: str = "") -> list[Rule]:
    """The same rules with these prefixes: `ours` as in "text/", `theirs` as in "bert."."""

    def prefixed(rule: Rule) -> Rule:
        names = tuple(theirs + name for name in rule.names())
        return Rule(ours + rule.ours, _one(names), rule.layout)

    return [prefixed(rule) for rule in rules]


def cube_embed(ours: str, theirs: str) -> list[Rule]:
    """`nn.embed.CubeEmbed` and a 3-D convolution with stride = kernel."""
    return [
        Rule(f"{ours}/kernel", f"{theirs}.weight", CONV),
        Rule(f"{ours}/bias", f"{theirs}.bias", SAME),
    ]


def videomae(encoder_heads: int, decoder_heads: int) -> list[Rule]:
    """The official VideoMAE pretraining model: 218 tensors at depth 12 + 4."""
    return [
        *cube_embed("patch_embed", "encoder.patch_embed.proj"),
        *stack("encoder", "encoder.blocks", encoder_heads),
        *norm("encoder_norm", "encoder.norm"),
        *_videomae_decoder("decoder.blocks", decoder_heads, BEIT),
    ]


def _videomae_decoder(theirs: str, heads: int, names: BlockNames) -> list[Rule]:
    return [
        Rule("encoder_to_decoder/kernel", "encoder_to_decoder.weight", LINEAR),
        Rule("mask_token", "mask_token", ROW),
        *stack("decoder", theirs, heads, names),
        *norm("decoder_norm", "decoder.norm"),
        *linear("decoder_head", "decoder.head"),
    ]


def simvtp(encoder_heads: int, decoder_heads: int) -> list[Rule]:
    """The official SimVTP pretraining model: VideoMAE and nine tensors more, 227."""
    return [
        *videomae(encoder_heads, decoder_heads),
        *bert_embeddings("text_embed", "text_embeddings"),
        *linear("text_cls", "text_cls"),
        *linear("vtm_head", "vtm_head"),
    ]


def videomae_finetune(heads: int) -> list[Rule]:
    """The official VideoMAE classifier: 162 tensors at depth 12. Its norm follows the mean."""
    return [
        *cube_embed("base/patch_embed", "patch_embed.proj"),
        *stack("base/encoder", "blocks", heads),
        *norm("fc_norm", "fc_norm"),
        *linear("head", "head"),
    ]


def simvtp_finetune(heads: int) -> list[Rule]:
    """The official SimVTP retrieval model, two towers: 323 of its file's 330 tensors."""
    video, text = "video_encoder", "text_encoder"
    return [
        *cube_embed("video/patch_embed", f"{video}.patch_embed.proj"),
        *stack("video/encoder", f"{video}.blocks", heads),
        *norm("video_norm", f"{video}.fc_norm"),
        *bert_embeddings("text/text_embed", f"{text}.text_embeddings"),
        *stack("text/encoder", f"{text}.blocks", heads),
        *norm("text_norm", f"{text}.fc_norm"),
    ]


def hf_videomae(encoder_heads: int, decoder_heads: int, names: BlockNames = HF_V5) -> list[Rule]:
    """transformers' VideoMAEForPreTraining: 250 tensors at depth 12 + 4; ours as `videomae`'s."""
    return [
        *_hf_videomae_encoder("", encoder_heads, names),
        *norm("encoder_norm", "videomae.layernorm"),
        *_videomae_decoder("decoder.decoder_layers", decoder_heads, names),
    ]


def hf_videomae_classifier(heads: int, names: BlockNames = HF_V5) -> list[Rule]:
    """transformers' VideoMAEForVideoClassification; ours as `videomae_finetune`'s."""
    return [
        *_hf_videomae_encoder("base/", heads, names),
        *norm("fc_norm", "fc_norm"),
        *linear("head", "classifier"),
    ]


def _hf_videomae_encoder(ours: str, heads: int, names: BlockNames) -> list[Rule]:
    return [
        *cube_embed(f"{ours}patch_embed", "videomae.embeddings.patch_embeddings.projection"),
        *stack(f"{ours}encoder", "videomae.encoder.layer", heads, names),
    ]


def timm_vit(heads: int, last: str = "norm", head: str | None = "head") -> list[Rule]:
    """timm's VisionTransformer with a class token, and MAE's released encoders (without a head).

    last: the last norm, "norm", or "fc_norm" where it follows a mean; head: the classifier, None
    where the file has none. 152 tensors at depth 12 with a head.
    """
    return [
        Rule("class_token", "cls_token", ROW),
        Rule("position", "pos_embed", TABLE),
        Rule("patch_embed/kernel", "patch_embed.proj.weight", CONV2),
        Rule("patch_embed/bias", "patch_embed.proj.bias", SAME),
        *stack("encoder", "blocks", heads, TIMM),
        *norm("norm", last),
        *(linear("head", head) if head else []),
    ]


def mae(heads: int, decoder_heads: int) -> list[Rule]:
    """The official MAE pretraining model, `nn.vit`'s ViT and Decoder: 254 tensors at depth
    12 + 8. Its released encoders are `timm_vit(heads, head=None)`."""
    decoder = [
        *linear("embed", "decoder_embed"),
        Rule("mask_token", "mask_token", ROW),
        Rule("position", "decoder_pos_embed", TABLE),
        *stack("stack", "decoder_blocks", decoder_heads, TIMM),
        *norm("norm", "decoder_norm"),
        *linear("head", "decoder_pred"),
    ]
    return [*under(timm_vit(heads, head=None), "encoder/"), *under(decoder, "decoder/")]


def bert(heads: int) -> list[Rule]:
    """BERT as `transformers.BertModel` saves it, `nn.text.Bert`: 199 tensors at depth 12. Its
    pretraining files call them "bert.": `under(bert(12), theirs="bert.")`."""
    return [
        *bert_embeddings("text_embed", "embeddings"),
        *stack("encoder", "encoder.layer", heads, BERT),
        *linear("pooler", "pooler.dense"),
    ]


def bert_cross(ours: str, theirs: str, heads: int) -> list[Rule]:
    """What blocks `theirs.{i}` of BERT have besides, where they attend to other tokens
    (`transformers`; ALBEF's and BLIP's fusion encoders and decoders)."""
    mine, other = f"{ours}/blocks", theirs + ".{i}.crossattention."
    kv = [tuple(f"{other}self.{x}.{y}" for x in ("key", "value")) for y in ("weight", "bias")]
    return [
        Rule(f"{mine}/cross/q", f"{other}self.query.weight", head_kernel(heads)),
        Rule(f"{mine}/cross/q_bias", f"{other}self.query.bias", per_head(heads)),
        Rule(f"{mine}/cross/kv", kv[0], fused_qkv(heads, 2)),
        Rule(f"{mine}/cross/kv_bias", kv[1], fused_bias(heads, 2)),
        *linear(f"{mine}/cross/proj", f"{other}output.dense"),
        *norm(f"{mine}/norm_cross", f"{other}output.LayerNorm"),
    ]


def clip(heads: int, text_heads: int, text: str = "") -> list[Rule]:
    """OpenAI's CLIP and OpenCLIP's with ViT towers, 302 tensors at depth 12 + 12: `nn.vit.ViT`
    under visual, `nn.text.CausalText` under text. OpenCLIP's CustomTextCLIP calls its text tower's
    tensors "text.", which is the prefix to give then."""
    visual = [
        Rule("class_token", "class_embedding", SAME),
        Rule("position", "positional_embedding", SAME),
        Rule("patch_embed/kernel", "conv1.weight", CONV2),
        *norm("norm_pre", "ln_pre"),
        *stack("encoder", "transformer.resblocks", heads, CLIP),
        *norm("norm", "ln_post"),
        Rule("proj/kernel", "proj", SAME),
    ]
    words = [
        Rule("word", "token_embedding.weight", SAME),
        Rule("position", "positional_embedding", SAME),
        *stack("encoder", "transformer.resblocks", text_heads, CLIP),
        *norm("norm", "ln_final"),
        Rule("proj/kernel", "text_projection", SAME),
    ]
    return [
        *under(visual, "visual/", "visual."),
        *under(words, "text/", text),
        Rule("logit_scale", "logit_scale", SAME),
    ]


def tvtsv2(heads: int, sorter_heads: int, text_heads: int) -> list[Rule]:
    """The released TVTSv2 with its sorter: `methods.tvtsv2`, all of it."""
    blocks, time = "video_model.transformer.resblocks", "encoder/blocks/time_attn"
    new = blocks + ".{i}.timeattn"
    visual = [
        Rule("class_token", "video_model.class_embedding", SAME),
        Rule("position", "video_model.positional_embedding", SAME),
        Rule("time_position", "video_model.temporal_embedding", SAME),
        Rule("patch_embed/kernel", "video_model.conv1.weight", CONV2),
        *norm("norm_pre", "video_model.ln_pre"),
        *stack("encoder", blocks, heads, TVTS),
        Rule(f"{time}/qkv", f"{new}.qkv.weight", fused_qkv(heads)),
        Rule(f"{time}/qkv_bias", f"{new}.qkv.bias", fused_bias(heads)),
        *linear(f"{time}/proj", f"{new}.proj"),
        *norm("encoder/blocks/norm_time", blocks + ".{i}.ln_3"),
        *norm("norm", "video_model.ln_post"),
        Rule("proj/kernel", "video_model.proj", SAME),
    ]
    words = [
        Rule("word", "text_token_embedding.weight", SAME),
        Rule("position", "text_positional_embedding", SAME),
        *stack("encoder", "text_model.resblocks", text_heads, CLIP),
        *norm("norm", "text_ln_final"),
        Rule("proj/kernel", "text_projection", SAME),
    ]
    sorter = [
        Rule("type", "pred_model.type_embed", TABLE),
        *stack("encoder", "pred_model.blocks", sorter_heads, TIMM),
        *norm("norm", "pred_model.norm"),
        *linear("head", "pred_model.head"),
    ]
    return [*under(visual, "visual/"), *under(words, "text/"), *under(sorter, "sorter/")]


# Tensors that files of these tables may hold and that no net reads: regexes on whole names.
POSITION_IDS = r"(.*\.)?position_ids"  # 0, 1, 2, ...: a buffer of BERT's up to 2022
UNUSED: Mapping[str, tuple[str, ...]] = {
    "simvtp": (POSITION_IDS,),
    "simvtp_finetune": (
        POSITION_IDS,
        r"video_encoder\.text_embeddings\..*",
        r"text_encoder\.patch_embed\..*",
    ),
    "bert": (POSITION_IDS, r"cls\..*"),  # and the heads of pretraining
    "clip": ("input_resolution", "context_length", "vocab_size"),  # of OpenAI's archives
}


def depth(names: Sequence[str] | Mapping[str, Any], prefix: str) -> int:
    """How many blocks `prefix.{i}.` there are among tensor names."""
    rest = [n.removeprefix(prefix + ".") for n in names if n.startswith(prefix + ".")]
    return len({n.split(".")[0] for n in rest})


def to_ours(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our nested parameters from their tensors, all of which must be used. UserError names all
    that are missing, unexpected, or of a shape that cannot be theirs."""
    unused, flat, missing, wrong = set(tensors), {}, [], []
    for rule in rules:
        layers = [None]
        if rule.stacked:  # where there is no layer at all, the first one's tensors are missing
            layers = range(max(1, depth(tensors, rule.names()[0].split(".{i}")[0])))
        names = [rule.names(i) for i in layers]
        lacking = [n for part in names for n in part if n not in tensors]
        missing += lacking
        unused -= {n for part in names for n in part}
        if lacking:
            continue
        try:
            parts = [rule.layout.into(_join([np.asarray(tensors[n]) for n in p])) for p in names]
            flat[rule.ours] = np.stack(parts) if rule.stacked else parts[0]
        except ValueError:
            wrong += [f"{n} {np.shape(tensors[n])}" for part in names for n in part]
    if missing or unused or wrong:
        raise UserError(
            f"tensor names do not fit: missing {sorted(missing) or 'none'}, "
            f"unexpected {sorted(unused) or 'none'}, wrong shape {sorted(wrong) or 'none'}"
        )
    return traverse_util.unflatten_dict(flat, sep="/")


def to_theirs(rules: Sequence[Rule], params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Their tensors from our nested parameters (or gradients), all of which must be used."""
    flat, tensors = tree.flatten(params), {}
    if odd := sorted(set(flat) ^ {rule.ours for rule in rules}):
        raise UserError(f"parameter names do not fit the rules: {', '.join(odd)}")
    for rule in rules:
        array = np.asarray(flat[rule.ours])
        for i, layer in enumerate(array) if rule.stacked else [(None, array)]:
            names = rule.names(i)
            out = rule.layout.out(layer)
            parts = [out] if len(names) == 1 else np.split(out, len(names))
            tensors.update(zip(names, parts, strict=True))
    return tensors


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
