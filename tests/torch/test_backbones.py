"""ViT, MAE, CLIP and BERT against `transformers`, random weights, fp32.

Its weights are given the names of the original releases, so that the tests cover the whole path
from a released file: its table of names, and the net.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.convert import rules
from vtp_jax.convert.families import clip, timm
from vtp_jax.convert.families.bert import bert_rules, cross_rules
from vtp_jax.nn import embed, mae, sizes, text, vit
from vtp_jax.nn.transformer import CLIP
from vtp_jax.types import TokenMask

torch = pytest.importorskip("torch", reason="torch is installed by `make test`")
transformers = pytest.importorskip("transformers", reason="installed by `make test`")

WIDTHS = dict(hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2)
IMAGE = dict(image_size=16, patch_size=4)
SIZE, DECODER, TEXT = sizes.Size(16, 3, 2, 40), sizes.Size(12, 2, 3, 20), sizes.Size(24, 2, 3, 28)
PATCH, PLACES = (1, 4, 4), 16
RNG = np.random.default_rng(0)
PIXELS = RNG.standard_normal((2, 16, 16, 3)).astype(np.float32)
IDS = np.array([[48, 5, 7, 49, 0, 0, 0], [48, 3, 11, 2, 30, 17, 49]])

# From `transformers`' names to timm's. Letters after # are joined, q first.
TIMM = [
    (r"^vit\.layers", "blocks"),
    (r"^vit\.layernorm\.", "norm."),
    (r"^vit\.embeddings\.cls_token", "cls_token"),
    (r"^vit\.embeddings\.position_embeddings", "pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^classifier", "head"),
    (r"attention\.([qkv])_proj\.(\w+)", r"attn.qkv.\2#\1"),
    (r"attention\.o_proj", "attn.proj"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
]
MAE = [(r"^decoder\.decoder_layers", "decoder_blocks"), (r"^decoder\.", ""), *TIMM]
OPENAI = [
    (r"^vision_model\.", "visual."),
    (r"^text_model\.", ""),
    (r"encoder\.layers", "transformer.resblocks"),
    (r"self_attn\.([qkv])_proj\.(\w+)", r"attn.in_proj_\2#\1"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.patch_embedding", "conv1"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"final_layer_norm", "ln_final"),
    (r"pre_layrnorm", "ln_pre"),
    (r"post_layernorm", "ln_post"),
    (r"^visual_projection\.weight", "visual.proj"),
    (r"^text_projection\.weight", "text_projection"),
]


def build(kind, config):
    """The net in eval mode, every parameter away from where it starts."""
    net, generator = kind(config).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return net


def rename(net, names):
    found = {}
    for name, tensor in net.state_dict().items():
        for pattern, target in names:
            name = re.sub(pattern, target, name)
        found[name] = tensor.numpy()
    joined = {name.split("#")[0] for name in found if "#" in name}
    rows = {name: np.concatenate([found[f"{name}#{x}"] for x in "qkv"]) for name in joined}
    return rows | {name: tensor for name, tensor in found.items() if "#" not in name}


def run_jax(module, params, method, *args):
    run = jax.jit(lambda p, *a: module.apply({"params": p}, *a, method=method))
    return run(params, *args)


def close(a, b):
    b = b.detach().numpy()
    assert np.abs(b).max() > 0.1  # zeros would agree with anything
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def cubes():
    return embed.cut(jnp.asarray(PIXELS[:, None]), PATCH)


def image():
    return torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())


def test_vit_agrees_with_transformers():
    config = transformers.ViTConfig(**WIDTHS, **IMAGE, layer_norm_eps=1e-6, num_labels=5)
    theirs = build(transformers.ViTForImageClassification, config)
    params = rules.to_params(timm.vit_rules(SIZE.heads), rename(theirs, TIMM))
    head = params.pop("head")
    pooled = run_jax(vit.ViT(SIZE, PLACES, PATCH), params, None, cubes())
    close(pooled @ head["kernel"] + head["bias"], theirs(image()).logits)


def test_mae_agrees_with_transformers():
    config = transformers.ViTMAEConfig(
        **WIDTHS,
        **IMAGE,
        layer_norm_eps=1e-6,
        decoder_hidden_size=DECODER.width,
        decoder_num_hidden_layers=DECODER.depth,
        decoder_num_attention_heads=DECODER.heads,
        decoder_intermediate_size=DECODER.mlp,
    )
    theirs = build(transformers.ViTMAEForPreTraining, config)
    params = rules.to_params(timm.mae_rules(SIZE.heads, DECODER.heads), rename(theirs, MAE))
    noise = RNG.uniform(size=(2, PLACES)).astype(np.float32)
    out = theirs(image(), noise=torch.from_numpy(noise))
    dropped = out.mask.numpy() > 0
    order = np.argsort(dropped, axis=1, kind="stable").astype(np.int32)
    mask = TokenMask(jnp.asarray(order[:, :4]), jnp.asarray(order[:, 4:]), jnp.asarray(dropped))

    encoder = vit.ViT(SIZE, PLACES, PATCH)
    seen = jnp.take_along_axis(cubes(), mask.keep[..., None], axis=1)
    tokens = run_jax(
        encoder, params["encoder"], lambda m, c, i: m.norm(m.encode(c, i)), seen, mask.keep
    )
    decoder = mae.Decoder(DECODER, PLACES, features=48)
    predicted = run_jax(decoder, params["decoder"], None, tokens, mask)
    close(
        predicted,
        torch.from_numpy(
            np.take_along_axis(out.logits.detach().numpy(), order[:, 4:, None], axis=1)
        ),
    )


@pytest.mark.parametrize("end_id", [None, 49])
def test_clip_agrees_with_transformers(end_id):
    words = dict(
        vocab_size=50, max_position_embeddings=7, hidden_size=TEXT.width,
        num_hidden_layers=TEXT.depth, num_attention_heads=TEXT.heads, intermediate_size=TEXT.mlp,
        bos_token_id=48, eos_token_id=2 if end_id is None else end_id, pad_token_id=0,
    )  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=words, vision_config=dict(**WIDTHS, **IMAGE), projection_dim=10
    )
    theirs = build(transformers.CLIPModel, config)
    tensors = rename(theirs, OPENAI)
    for name in ("visual.proj", "text_projection"):
        tensors[name] = tensors[name].T  # linear layers there, plain matrices in the release
    params = rules.to_params(clip.clip_rules(SIZE.heads, TEXT.heads), tensors)
    out = theirs(torch.from_numpy(IDS), image())

    visual = vit.ViT(SIZE, PLACES, PATCH, style=CLIP, first_norm=True, features=10)
    tower = text.CausalText(TEXT, 10, 50, 7, end_id)
    a = run_jax(visual, params["visual"], None, cubes())
    b = run_jax(tower, params["text"], None, jnp.asarray(IDS))
    a, b = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    close(a, out.image_embeds)
    close(b, out.text_embeds)
    close(jnp.exp(params["logit_scale"]) * a @ b.T, out.logits_per_image)


def test_bert_agrees_with_transformers():
    config = transformers.BertConfig(**WIDTHS, vocab_size=50, max_position_embeddings=9)
    theirs = build(transformers.BertModel, config)
    params = rules.to_params(bert_rules(SIZE.heads), rename(theirs, []))
    mask = IDS > 0
    out = theirs(torch.from_numpy(IDS), torch.from_numpy(mask.astype(np.int64)))
    bert = text.Bert(SIZE, vocab_size=50, length=9)
    tokens = run_jax(bert, params, "encode", jnp.asarray(IDS), jnp.asarray(mask))
    close(np.asarray(tokens)[mask], out.last_hidden_state[torch.from_numpy(mask)])
    close(run_jax(bert, params, "pool", tokens), out.pooler_output)


def test_bert_that_attends_to_other_tokens_agrees_with_transformers():
    """`transformers` makes such a net causal."""
    config = transformers.BertConfig(
        **WIDTHS,
        vocab_size=50,
        max_position_embeddings=9,
        is_decoder=True,
        add_cross_attention=True,
    )
    theirs = build(transformers.BertModel, config)
    names = bert_rules(SIZE.heads) + cross_rules("encoder", "encoder.layer", SIZE.heads)
    params = rules.to_params(names, rename(theirs, []))
    other = RNG.standard_normal((2, 4, 16)).astype(np.float32)
    other_mask = np.array([[True] * 4, [True, False, True, False]])
    out = theirs(
        torch.from_numpy(IDS),
        encoder_hidden_states=torch.from_numpy(other),
        encoder_attention_mask=torch.from_numpy(other_mask.astype(np.int64)),
    )
    bert, mask = text.Bert(SIZE, vocab_size=50, length=9), text.causal(IDS.shape[1])
    tokens = run_jax(bert, params, "encode", IDS, mask, other, other_mask)
    close(tokens, out.last_hidden_state)
