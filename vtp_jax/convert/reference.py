"""Forward passes of other people's nets in numpy, fp64: what every conversion is held against.

They run on tensors under the names that their authors published, in any float type, and take all
sizes but the number of heads, which no tensor shows, from the arrays. They are written from the
papers and from what the released code was seen to compute, and share nothing with `vtp_jax.nn`:
were both wrong in the same way, no check would see it. Slow and plain on purpose; nothing is
dropped out. A tensor that is missing is an error and never zeros; tensors that a pass does not
name are not looked at, so whoever converts checks the names first.

`b` rows, `n` tokens (slot by slot, row by row), `k` kept tokens, `l` words, `p` numbers of a patch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Num
from scipy import special

from vtp_jax.types import UserError

Tensors = Mapping[str, Num[np.ndarray, "..."]]
Rows = Float64[np.ndarray, "b n d"]
Outputs = dict[str, Float64[np.ndarray, "..."]]
Mask = Bool[np.ndarray, "b l"] | Int[np.ndarray, "b l"]


def gelu(x: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    return x * special.ndtr(x)


def quick_gelu(x: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    return x * special.expit(1.702 * x)


ACTS = {"gelu": gelu, "quick_gelu": quick_gelu}


class Names(NamedTuple):
    """What a block calls its tensors. Several are joined to the rows q, k and v; None is zeros."""

    norm1: str
    qkv: tuple[str, ...]
    bias: tuple[str | None, ...]
    proj: str
    norm2: str
    fc1: str
    fc2: str


class Stack(NamedTuple):
    """The pre-norm blocks `prefix.{i}.` of a transformer."""

    prefix: str
    names: Names
    eps: float
    act: Callable[[np.ndarray], np.ndarray] = gelu


BEIT = Names(
    "norm1", ("attn.qkv.weight",), ("attn.q_bias", None, "attn.v_bias"), "attn.proj",
    "norm2", "mlp.fc1", "mlp.fc2",
)  # fmt: skip
TIMM = BEIT._replace(bias=("attn.qkv.bias",))
CLIP = Names(
    "ln_1", ("attn.in_proj_weight",), ("attn.in_proj_bias",), "attn.out_proj",
    "ln_2", "mlp.c_fc", "mlp.c_proj",
)  # fmt: skip
TVTS = CLIP._replace(qkv=("attn.qkv.weight",), bias=("attn.qkv.bias",), proj="attn.proj")
TVTS_TIME = TVTS._replace(
    qkv=("timeattn.qkv.weight",), bias=("timeattn.qkv.bias",), proj="timeattn.proj"
)
HF = "attention.attention."
HF_V5 = Names(
    "layernorm_before", (f"{HF}query.weight", f"{HF}key.weight", f"{HF}value.weight"),
    (f"{HF}query.bias", None, f"{HF}value.bias"), "attention.output.dense",
    "layernorm_after", "intermediate.dense", "output.dense",
)  # fmt: skip
HF_V4 = HF_V5._replace(bias=(f"{HF}q_bias", None, f"{HF}v_bias"))


def read(t: Tensors, name: str) -> Float64[np.ndarray, "..."]:
    if name not in t:
        raise UserError(f"tensor {name} is missing; is it a file of another model?")
    return np.asarray(t[name], np.float64)


def linear(t: Tensors, name: str, x: Float64[np.ndarray, "*b i"]) -> Float64[np.ndarray, "*b o"]:
    return x @ read(t, f"{name}.weight").T + read(t, f"{name}.bias")


def norm(
    t: Tensors, name: str, x: Float64[np.ndarray, "*b d"], eps: float
) -> Float64[np.ndarray, "*b d"]:
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * read(t, f"{name}.weight") + read(t, f"{name}.bias")


def attend(
    t: Tensors, prefix: str, names: Names, x: Rows, heads: int, mask: Float64[np.ndarray, "..."]
) -> Rows:
    """Self-attention; `mask` is added to the scores "b h n n"."""
    weight = np.concatenate([read(t, prefix + name) for name in names.qkv])
    if len(weight) % (3 * heads):
        raise UserError(f"{heads} heads do not divide a width of {len(weight) // 3} in {prefix}*")
    zeros = np.zeros(len(weight) // 3)
    bias = np.concatenate([zeros if n is None else read(t, prefix + n) for n in names.bias])
    qkv = (x @ weight.T + bias).reshape(*x.shape[:2], 3, heads, -1)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    scores = special.softmax(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]) + mask, -1)
    out = (scores @ v).swapaxes(1, 2).reshape(*x.shape[:2], -1)
    return linear(t, prefix + names.proj, out)


NOTHING = np.zeros(())  # is added to the scores where nothing is masked


def run_blocks(
    t: Tensors, stack: Stack, x: Rows, heads: int, mask: Float64[np.ndarray, "..."] = NOTHING
) -> Rows:
    """The blocks of a stack, without the norm that follows; as many as there are names of."""
    names, eps = stack.names, stack.eps
    start = stack.prefix + "."
    for i in range(len({n[len(start) :].split(".")[0] for n in t if n.startswith(start)})):
        block = f"{start}{i}."
        x = x + attend(t, block, names, norm(t, block + names.norm1, x, eps), heads, mask)
        hidden = stack.act(linear(t, block + names.fc1, norm(t, block + names.norm2, x, eps)))
        x = x + linear(t, block + names.fc2, hidden)
    return x


def embed_cubes(t: Tensors, name: str, video: Float[np.ndarray, "b c t h w"]) -> Rows:
    """A convolution whose stride is its kernel, `name.weight` (d, c, [t], h, w), without bias."""
    kernel = read(t, f"{name}.weight")
    kernel = kernel if kernel.ndim == 5 else kernel[:, :, None]
    d, c, *cube = kernel.shape
    if video.shape[1] != c or any(a % s for a, s in zip(video.shape[2:], cube, strict=True)):
        raise UserError(f"{name} cuts cubes of {(c, *cube)}, which {video.shape[1:]} does not give")
    slots, rows, columns = (a // s for a, s in zip(video.shape[2:], cube, strict=True))
    x = np.asarray(video, np.float64)
    x = x.reshape(len(x), c, slots, cube[0], rows, cube[1], columns, cube[2])
    x = x.transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(len(x), slots * rows * columns, -1)
    return x @ kernel.reshape(d, -1).T


def sinusoids(n: int, d: int) -> Float64[np.ndarray, "n d"]:
    """VideoMAE's table of places: sines in even columns, cosines in odd ones, rounded to fp32."""
    column = np.arange(d)
    angle = np.arange(n)[:, None] / np.power(10000, 2 * (column // 2) / d)
    return np.where(column % 2, np.cos(angle), np.sin(angle)).astype(np.float32).astype(np.float64)


def take(x: Rows, keep: Bool[np.ndarray, "b n"]) -> Float64[np.ndarray, "b k d"]:
    """The kept tokens in ascending order, as many in every row."""
    if len(set(keep.sum(1).tolist())) > 1:
        raise UserError(f"the mask hides unlike numbers of tokens: {keep.shape[1] - keep.sum(1)}")
    return x[keep].reshape(len(x), -1, x.shape[2])


def hide(keys: Bool[np.ndarray, "b n"]) -> Float64[np.ndarray, "b 1 1 n"]:
    """What keeps queries from seeing the keys that are False, as SimVTP and BERT do it."""
    return np.where(keys, 0.0, -10000.0)[:, None, None]


def mean(x: Rows, where: Bool[np.ndarray, "b n"]) -> Float64[np.ndarray, "b d"]:
    return (x * where[..., None]).sum(1) / where.sum(1)[:, None]


# --- VideoMAE


class Autoencoder(NamedTuple):
    """VideoMAE's pretraining net under some naming, with the epsilons that go with it."""

    embed: str
    encoder: Stack
    encoder_norm: str | None
    decoder: Stack
    decoder_norm_eps: float


VIDEOMAE = Autoencoder(
    "encoder.patch_embed.proj",
    Stack("encoder.blocks", BEIT, 1e-6),
    "encoder.norm",
    Stack("decoder.blocks", BEIT, 1e-6),
    1e-6,
)


def embed_video(t: Tensors, name: str, video: Float[np.ndarray, "b c t h w"]) -> Rows:
    """Cubes, with VideoMAE's places."""
    x = embed_cubes(t, name, video) + read(t, f"{name}.bias")
    return x + sinusoids(*x.shape[1:])


def decode(
    t: Tensors, net: Autoencoder, seen: Rows, hidden: Bool[np.ndarray, "b m"], heads: int
) -> Float64[np.ndarray, "b drop p"]:
    """Pixels of the hidden cubes from the encoder's tokens of the visible ones."""
    x = seen @ read(t, "encoder_to_decoder.weight").T
    table = np.broadcast_to(sinusoids(hidden.shape[1], x.shape[2]), (*hidden.shape, x.shape[2]))
    fill = read(t, "mask_token").reshape(-1) + take(table, hidden)
    x = run_blocks(t, net.decoder, np.concatenate([x + take(table, ~hidden), fill], 1), heads)
    return linear(
        t, "decoder.head", norm(t, "decoder.norm", x[:, seen.shape[1] :], net.decoder_norm_eps)
    )


def reconstruct(
    t: Tensors,
    net: Autoencoder,
    video: Float[np.ndarray, "b c t h w"],
    mask: Bool[np.ndarray, "b n"],
    heads: int,
    decoder_heads: int,
) -> Outputs:
    x = run_blocks(t, net.encoder, take(embed_video(t, net.embed, video), ~mask), heads)
    if net.encoder_norm:
        x = norm(t, net.encoder_norm, x, net.encoder.eps)
    return {"tokens": x, "pixels": decode(t, net, x, mask, decoder_heads)}


def videomae_pretrain(
    t: Tensors,
    video: Float[np.ndarray, "b 3 t h w"],
    mask: Bool[np.ndarray, "b n"],
    heads: int,
    decoder_heads: int,
) -> Outputs:
    """The official VideoMAE's pretraining net (MCG-NJU/VideoMAE @14ef8d8), names of its `model`.

    video: normalised pixels, t h w multiples of the cube. mask: True = hidden, equally many a row.
    -> tokens "b k d" after the encoder's norm; pixels "b n-k p", p = (t h w c) of a hidden cube.
    """
    return reconstruct(t, VIDEOMAE, video, mask, heads, decoder_heads)


def videomae_classify(t: Tensors, video: Float[np.ndarray, "b 3 t h w"], heads: int) -> Outputs:
    """The official fine-tuned VideoMAE (same commit): blocks, mean, `fc_norm`, `head`.

    -> raw "b n d", the last block's output; pooled "b d"; logits "b classes".
    """
    x = embed_video(t, "patch_embed.proj", video)
    x = run_blocks(t, Stack("blocks", BEIT, 1e-6), x, heads)
    pooled = norm(t, "fc_norm", x.mean(1), 1e-6)
    return {"raw": x, "pooled": pooled, "logits": linear(t, "head", pooled)}


def _hugging_face(t: Tensors, prefix: str, eps: float) -> Stack:
    """Either naming of the two biases: parameters of their own (v4), or biases of layers (v5)."""
    names = HF_V4 if f"{prefix}.0.{HF_V4.bias[0]}" in t else HF_V5
    return Stack(prefix, names, eps)


def hf_videomae_pretrain(
    t: Tensors,
    video: Float[np.ndarray, "b t 3 h w"],
    mask: Bool[np.ndarray, "b n"],
    heads: int,
    decoder_heads: int,
    eps: float = 1e-12,
) -> Outputs:
    """`transformers.VideoMAEForPreTraining`, seen to agree at 5.23.0; tensor names of v4 or v5.

    Takes frames first. eps: `layer_norm_eps` of its config; the decoder's last norm has 1e-5
    whatever that says. A net whose config averages tokens has no norm after the encoder.
    -> as `videomae_pretrain`.
    """
    last = "videomae.layernorm"
    net = Autoencoder(
        "videomae.embeddings.patch_embeddings.projection",
        _hugging_face(t, "videomae.encoder.layer", eps),
        last if f"{last}.weight" in t else None,
        _hugging_face(t, "decoder.decoder_layers", eps),
        1e-5,
    )
    return reconstruct(t, net, video.swapaxes(1, 2), mask, heads, decoder_heads)


def hf_videomae_classify(
    t: Tensors, video: Float[np.ndarray, "b t 3 h w"], heads: int, eps: float = 1e-12
) -> Outputs:
    """`transformers.VideoMAEForVideoClassification`, seen to agree at 5.23.0; names of v4 or v5.

    With `fc_norm` (epsilon 1e-5 whatever the config says) tokens are averaged; without it there is
    `videomae.layernorm` and the first token is taken. -> as `videomae_classify`.
    """
    x = embed_video(t, "videomae.embeddings.patch_embeddings.projection", video.swapaxes(1, 2))
    x = run_blocks(t, _hugging_face(t, "videomae.encoder.layer", eps), x, heads)
    if "fc_norm.weight" in t:
        pooled = norm(t, "fc_norm", x.mean(1), 1e-5)
    else:
        pooled = norm(t, "videomae.layernorm", x[:, 0], eps)
    return {"raw": x, "pooled": pooled, "logits": linear(t, "classifier", pooled)}


# --- BERT's embeddings and SimVTP


def bert_embeddings(t: Tensors, ids: Int[np.ndarray, "b l"]) -> Rows:
    """BERT's embedding module (google-research/bert; `transformers` @5.23.0), no layer above it.

    Names with any prefix, say `bert.embeddings.`; `LayerNorm.gamma` and `.beta` in files of 2018.
    All words are of segment 0. eps 1e-12. The row of [PAD] is added like any other.
    """
    table = "word_embeddings.weight"
    prefixes = [name.removesuffix(table) for name in t if name.endswith(table)]
    if len(prefixes) != 1:
        raise UserError(f"one tensor *{table} is needed, not {len(prefixes)}")
    new = {".gamma": ".weight", ".beta": ".bias"}
    t = {re.sub(r"\.(gamma|beta)$", lambda m: new[m[0]], name): x for name, x in t.items()}
    return _embed_words(t, prefixes[0], ids)


def _embed_words(t: Tensors, prefix: str, ids: Int[np.ndarray, "b l"]) -> Rows:
    words, places, segments = (
        read(t, f"{prefix}{table}_embeddings.weight")
        for table in ("word", "position", "token_type")
    )
    x = words[ids] + places[: ids.shape[1]] + segments[0]
    return norm(t, f"{prefix}LayerNorm", x, 1e-12)


def simvtp(
    t: Tensors,
    video: Float[np.ndarray, "b 3 t h w"],
    mask: Bool[np.ndarray, "b n"],
    ids: Int[np.ndarray, "b l"],
    attention_mask: Mask,
    heads: int,
    decoder_heads: int,
    negatives: Int[np.ndarray, "b"] | None = None,
    pool_padding: bool = True,
) -> Outputs:
    """The official SimVTP pretraining net (wufeim/SimVTP @558d24e), names of its `model`.

    All four passes get `ids` as they are: the released code masks words beforehand, for all passes.
    attention_mask: true where there is a word. negatives: for each row, the row whose video (and
    its mask) takes the place of its own. pool_padding: text and pairs are averaged over padding
    too, as the released code does; otherwise over words (and visible cubes) only.
    -> pixels "b n-k p" and words "b l vocabulary" of the joint pass, after the heads; video "b d"
    and text "b d" of the passes apart; match "b 2", logits (no, yes) of the pairs, and with
    `negatives` "2b 2", the pairs first.
    """
    words = attention_mask.astype(bool)
    cubes = take(embed_video(t, VIDEOMAE.embed, video), ~mask)
    text = _embed_words(t, "text_embeddings.", ids)
    every = np.ones(cubes.shape[:2], bool)
    pooled = words | pool_padding

    def encode(x: Rows, keys: Bool[np.ndarray, "b n"]) -> Rows:
        return norm(t, "encoder.norm", run_blocks(t, VIDEOMAE.encoder, x, heads, hide(keys)), 1e-6)

    def fuse(cubes: Rows) -> Float64[np.ndarray, "b all d"]:
        return encode(np.concatenate([cubes, text], 1), np.concatenate([every, words], 1))

    joint = fuse(cubes)
    pairs = [joint] if negatives is None else [joint, fuse(cubes[negatives])]
    everywhere = np.concatenate([every, pooled], 1)
    k = cubes.shape[1]
    return {
        "pixels": decode(t, VIDEOMAE, joint[:, :k], mask, decoder_heads),
        "words": linear(t, "text_cls", joint[:, k:]),
        "video": encode(cubes, every).mean(1),
        "text": mean(encode(text, words), pooled),
        "match": linear(t, "vtm_head", np.concatenate([mean(x, everywhere) for x in pairs])),
    }


def simvtp_finetune(
    t: Tensors,
    video: Float[np.ndarray, "b 3 t h w"],
    ids: Int[np.ndarray, "b l"],
    attention_mask: Mask,
    heads: int,
    pool_padding: bool = True,
) -> Outputs:
    """The official fine-tuned SimVTP (same commit): two towers, names of its `module`.

    Every cube is seen. pool_padding: as in `simvtp`.
    -> video "b d" and text "b d", as they go into the cosine.
    """
    words = attention_mask.astype(bool)
    x = embed_video(t, "video_encoder.patch_embed.proj", video)
    x = run_blocks(t, Stack("video_encoder.blocks", BEIT, 1e-6), x, heads)
    y = _embed_words(t, "text_encoder.text_embeddings.", ids)
    y = run_blocks(t, Stack("text_encoder.blocks", BEIT, 1e-6), y, heads, hide(words))
    return {
        "video": norm(t, "video_encoder.fc_norm", x.mean(1), 1e-6),
        "text": norm(t, "text_encoder.fc_norm", mean(y, words | pool_padding), 1e-6),
    }


# --- Images: timm's ViT, MAE, CLIP


def vit(
    t: Tensors,
    image: Float[np.ndarray, "b c h w"],
    heads: int,
    eps: float = 1e-6,
) -> Outputs:
    """A ViT with a class token in timm's names (timm 1.0; fine-tuned MAE and DeiT have them too).

    With `fc_norm`, the patches' mean goes through it to the head; else the class token does, after
    `norm`. `pos_embed` covers the class token or leaves it out. With `norm_pre` the cubes have no
    bias. `head` may be there.
    No layer scale, distillation token, register or attention pooling.
    -> raw "b 1+n d", the last block's output; tokens, the same after `norm` where there is one;
    pooled "b d"; logits "b classes" with a head.
    """
    x = embed_cubes(t, "patch_embed.proj", image[:, :, None])
    normed = "norm_pre.weight" in t
    if not normed:
        x = x + read(t, "patch_embed.proj.bias")
    first = np.broadcast_to(read(t, "cls_token"), (len(x), 1, x.shape[2]))
    places = read(t, "pos_embed")
    if places.shape[1] == x.shape[1]:
        x = np.concatenate([first, x + places], 1)
    else:
        x = np.concatenate([first, x], 1) + places
    if normed:
        x = norm(t, "norm_pre", x, eps)
    out = {"raw": run_blocks(t, Stack("blocks", TIMM, eps), x, heads)}
    if "fc_norm.weight" in t:
        out["tokens"] = out["raw"]
        out["pooled"] = norm(t, "fc_norm", out["raw"][:, 1:].mean(1), eps)
    else:
        out["tokens"] = norm(t, "norm", out["raw"], eps)
        out["pooled"] = out["tokens"][:, 0]
    if "head.weight" in t:
        out["logits"] = linear(t, "head", out["pooled"])
    return out


def mae(
    t: Tensors,
    image: Float[np.ndarray, "b 3 h w"],
    keep: Int[np.ndarray, "b k"],
    heads: int,
    decoder_heads: int,
    eps: float = 1e-6,
) -> Outputs:
    """MAE's pretraining net (facebookresearch/mae), names of its `model`.

    keep: indices of the visible patches, in the order in which the encoder gets them.
    -> tokens "b 1+k d", class token first, after the encoder's norm; pixels "b n p" of all patches
    in the order of the image, p = (h w c).
    """
    rows = np.arange(len(keep))[:, None]
    places = read(t, "pos_embed")
    x = embed_cubes(t, "patch_embed.proj", image[:, :, None]) + read(t, "patch_embed.proj.bias")
    b, n, d = x.shape
    x = (x + places[:, 1:])[rows, keep]
    x = np.concatenate([np.broadcast_to(read(t, "cls_token") + places[:, :1], (b, 1, d)), x], 1)
    tokens = norm(t, "norm", run_blocks(t, Stack("blocks", TIMM, eps), x, heads), eps)

    x = linear(t, "decoder_embed", tokens)
    full = np.tile(read(t, "mask_token"), (b, 1 + n, 1))
    full[:, 0] = x[:, 0]
    full[rows, 1 + keep] = x[:, 1:]
    full = full + read(t, "decoder_pos_embed")
    full = run_blocks(t, Stack("decoder_blocks", TIMM, eps), full, decoder_heads)
    full = norm(t, "decoder_norm", full[:, 1:], eps)
    return {"tokens": tokens, "pixels": linear(t, "decoder_pred", full)}


Act = Literal["gelu", "quick_gelu"]


def clip_image(t: Tensors, image: Float[np.ndarray, "b 3 h w"], heads: int, act: Act) -> Outputs:
    """CLIP's ViT (openai/CLIP, names of its state dict; OpenCLIP's with a class token).

    act: "quick_gelu" for OpenAI's weights and those that OpenCLIP calls so, else "gelu".
    -> raw "b 1+n d", the last block's output; tokens "b 1+n d" after `ln_post`; embedding "b e" of
    the class token, not normalised.
    """
    x = embed_cubes(t, "visual.conv1", image[:, :, None])
    first = np.broadcast_to(read(t, "visual.class_embedding"), (len(x), 1, x.shape[2]))
    x = np.concatenate([first, x], 1) + read(t, "visual.positional_embedding")
    stack = Stack("visual.transformer.resblocks", CLIP, 1e-5, ACTS[act])
    raw = run_blocks(t, stack, norm(t, "visual.ln_pre", x, 1e-5), heads)
    tokens = norm(t, "visual.ln_post", raw, 1e-5)
    return {"raw": raw, "tokens": tokens, "embedding": tokens[:, 0] @ read(t, "visual.proj")}


def clip_text(t: Tensors, ids: Int[np.ndarray, "b l"], heads: int, act: Act) -> Outputs:
    """CLIP's text tower (openai/CLIP; OpenCLIP, where names may begin with `text.`).

    A word sees itself and those before it. The embedding is taken where the id is greatest, which
    is the end of the text. act: as in `clip_image`.
    -> raw "b l d"; tokens "b l d" after `ln_final`; embedding "b e", not normalised.
    """
    p = "text." if "text.token_embedding.weight" in t else ""
    length = ids.shape[1]
    x = read(t, f"{p}token_embedding.weight")[ids] + read(t, f"{p}positional_embedding")[:length]
    future = np.triu(np.full((length, length), -np.inf), 1)
    stack = Stack(f"{p}transformer.resblocks", CLIP, 1e-5, ACTS[act])
    raw = run_blocks(t, stack, x, heads, future)
    tokens = norm(t, f"{p}ln_final", raw, 1e-5)
    last = tokens[np.arange(len(ids)), ids.argmax(1)]
    return {"raw": raw, "tokens": tokens, "embedding": last @ read(t, f"{p}text_projection")}


# --- TVTSv2


def apart(group: Int[np.ndarray, "n"]) -> Float64[np.ndarray, "m m"]:
    """What lets a token see the first one and those of its group alone; the first sees all."""
    seen = np.pad(group[:, None] == group, ((1, 0), (1, 0)), constant_values=True)
    return np.where(seen, 0.0, -np.inf)


def tvtsv2(
    t: Tensors,
    video: Float[np.ndarray, "b 3 t h w"],
    keep: Bool[np.ndarray, "b s"],
    ids: Int[np.ndarray, "b k l"],
    heads: int,
    decoder_heads: int,
    text_heads: int,
    act: Act,
    normed: bool,
) -> Outputs:
    """TVTSv2 (TencentARC/TVTS, v2). keep: places of a frame, the same in all; decoder_heads: of
    the sorter. normed: B/16 and B/32; H/14 projects all but the class token without `ln_post`, and
    sorts without it.
    -> video "b n e", class token first; texts "b k e"; turns "b k c".
    """
    b, frames = len(video), video.shape[2]
    x = embed_cubes(t, "video_model.conv1", video)
    place = read(t, "video_model.positional_embedding")
    time = read(t, "video_model.temporal_embedding")[:frames].repeat(keep.shape[1], 0)
    x = take(x + np.tile(place[1:], (frames, 1)) + time, np.tile(keep, (1, frames)))
    first = np.broadcast_to(read(t, "video_model.class_embedding") + place[0], (b, 1, x.shape[2]))
    x = norm(t, "video_model.ln_pre", np.concatenate([first, x], 1), 1e-5)
    frame, spot = np.divmod(np.arange(x.shape[1] - 1), (x.shape[1] - 1) // frames)
    prefix = "video_model.transformer.resblocks."
    for i in range(len({n.removeprefix(prefix).split(".")[0] for n in t if n.startswith(prefix)})):
        block = f"{prefix}{i}."
        past = norm(t, f"{block}ln_3", x, 1e-5)
        past = norm(
            t, f"{block}ln_1", x + attend(t, block, TVTS_TIME, past, heads, apart(spot)), 1e-5
        )
        x = x + attend(t, block, TVTS, past, heads, apart(frame))
        hidden = ACTS[act](linear(t, f"{block}mlp.c_fc", norm(t, f"{block}ln_2", x, 1e-5)))
        x = x + linear(t, f"{block}mlp.c_proj", hidden)
    end = norm(t, "video_model.ln_post", x, 1e-5)
    tokens = end if normed else np.concatenate([end[:, :1], x[:, 1:]], 1)
    tokens = tokens @ read(t, "video_model.proj")

    # Without these beginnings the text tower's names are CLIP's.
    ours = re.compile("text_(?=token|positional|ln_final)")
    renamed = {ours.sub("", n).replace("text_model.", "transformer."): x for n, x in t.items()}
    texts = clip_text(renamed, ids.reshape(-1, ids.shape[-1]), text_heads, act)["embedding"]
    texts = texts.reshape(*ids.shape[:2], -1)

    kind = read(t, "pred_model.type_embed")[0]
    x = np.concatenate([(tokens if normed else tokens[:, 1:]) + kind[0], texts + kind[1]], 1)
    x = run_blocks(t, Stack("pred_model.blocks", TIMM, 1e-6), x, decoder_heads)
    x = norm(t, "pred_model.norm", x[:, -ids.shape[1] :], 1e-6)
    return {"video": tokens, "texts": texts, "turns": linear(t, "pred_model.head", x)}
