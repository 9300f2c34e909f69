"""The reference forward passes against `transformers`, random weights, fp64.

Where `transformers` has names of its own, its tensors are given the names of the release.
"""

import re

import numpy as np
import pytest

from vtp_jax.convert.reference import bert, clip, huggingface, timm, videomae

torch = pytest.importorskip("torch", reason="torch is installed by `make test`")
transformers = pytest.importorskip("transformers", reason="installed by `make test`")

# Of values around 1: fp64 rounds at 2e-16 and the sums are short.
ATOL = 1e-12
SIZE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80)
DECODER = dict(
    decoder_hidden_size=24,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=3,
    decoder_intermediate_size=56,
)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def randomise(model, seed: int = 0):
    """fp64, nothing dropped out, and no bias or norm left at the value that hides it."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = bool(re.search(r"norm[^.]*\.weight|Norm\.weight", name))
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(scale + 0.3 * noise)
    return model


def tensors(model) -> dict[str, np.ndarray]:
    return {n: x.numpy() for n, x in model.state_dict().items()}


def rename(t: dict[str, np.ndarray], table: dict[str, str]) -> dict[str, np.ndarray]:
    """Names by regular expressions, all that match, in turn."""
    out = {}
    for name, x in t.items():
        for old, new in table.items():
            name = re.sub(old, new, name)
        out[name] = x
    return out


def fuse(t: dict[str, np.ndarray], parts: tuple[str, ...], whole: str) -> dict[str, np.ndarray]:
    """Joins the rows of q, k and v: names that hold `parts[i]` become one that holds `whole`."""
    out = {n: x for n, x in t.items() if not any(p in n for p in parts)}
    for name in t:
        if parts[0] in name:
            out[name.replace(parts[0], whole)] = np.concatenate(
                [t[name.replace(parts[0], p)] for p in parts]
            )
    return out


def call(model, *args, **kwargs):
    def tensor(x):
        return torch.from_numpy(x) if isinstance(x, np.ndarray) else x

    with torch.no_grad():
        return model(*map(tensor, args), **{k: tensor(v) for k, v in kwargs.items()})


def check(ours: np.ndarray, theirs) -> None:
    assert ours.dtype == np.float64 and tuple(theirs.shape) == ours.shape
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=ATOL)


# --- VideoMAE

VIDEO = dict(image_size=(32, 48), patch_size=16, num_frames=6, tubelet_size=2, **SIZE, **DECODER)
V4 = {r"(query|value)\.bias$": lambda m: f"{m[1][0]}_bias"}


def hide(rows: int, tokens: int, hidden: int) -> np.ndarray:
    order = draw(3, rows, tokens).argsort(1)
    return order < hidden


@pytest.fixture(params=[{}, V4], ids=["v5", "v4"])
def naming(request):
    return request.param


@pytest.mark.parametrize("averaged", [True, False])
def test_videomae_pretraining_agrees_with_transformers(naming, averaged):
    config = transformers.VideoMAEConfig(**VIDEO, use_mean_pooling=averaged)
    model = randomise(transformers.VideoMAEForPreTraining(config))
    video, mask = draw(1, 2, 6, 3, 32, 48), hide(2, 18, 11)
    theirs = call(model, video, mask)
    t = rename(tensors(model), naming)
    ours = huggingface.pretrain(t, video, mask, heads=4, decoder_heads=3)
    check(ours["pixels"], theirs.logits)
    check(ours["tokens"], call(model.videomae, video, mask).last_hidden_state)


@pytest.mark.parametrize("averaged", [True, False])
def test_videomae_classification_agrees_with_transformers(naming, averaged):
    config = transformers.VideoMAEConfig(**VIDEO, use_mean_pooling=averaged, num_labels=7)
    model = randomise(transformers.VideoMAEForVideoClassification(config))
    video = draw(1, 2, 6, 3, 32, 48)
    t = rename(tensors(model), naming)
    check(huggingface.classify(t, video, heads=4)["logits"], call(model, video).logits)


def test_the_epsilon_of_the_config_is_used():
    """Small activations make it matter."""
    config = transformers.VideoMAEConfig(**VIDEO, layer_norm_eps=1e-3)
    model = randomise(transformers.VideoMAEForPreTraining(config))
    video, mask = 1e-2 * draw(1, 2, 6, 3, 32, 48), hide(2, 18, 11)
    ours = huggingface.pretrain(tensors(model), video, mask, 4, 3, eps=1e-3)
    check(ours["pixels"], call(model, video, mask).logits)


def test_official_names_differ_by_epsilons_alone():
    """The official net under its own names, and the port of it with the official epsilons."""
    config = transformers.VideoMAEConfig(**VIDEO, use_mean_pooling=False, layer_norm_eps=1e-6)
    model = randomise(transformers.VideoMAEForPreTraining(config))
    model.decoder.norm.eps = 1e-6
    names = {
        r"^videomae\.embeddings\.patch_embeddings\.projection": "encoder.patch_embed.proj",
        r"^videomae\.encoder\.layer": "encoder.blocks",
        r"^videomae\.layernorm": "encoder.norm",
        r"^decoder\.decoder_layers": "decoder.blocks",
        r"layernorm_before": "norm1",
        r"layernorm_after": "norm2",
        r"attention\.attention\.(query|value)\.bias": lambda m: f"attn.{m[1][0]}_bias",
        r"attention\.output\.dense": "attn.proj",
        r"intermediate\.dense": "mlp.fc1",
        r"output\.dense": "mlp.fc2",
    }
    parts = tuple(f"attention.attention.{x}.weight" for x in ("query", "key", "value"))
    t = fuse(rename(tensors(model), names), parts, "attn.qkv.weight")
    video, mask = draw(1, 2, 6, 3, 32, 48), hide(2, 18, 11)
    ours = videomae.pretrain(t, video.swapaxes(1, 2), mask, 4, 3)
    check(ours["pixels"], call(model, video, mask).logits)


# --- BERT


def test_bert_embeddings_agree_with_transformers():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = randomise(transformers.BertModel(config))
    ids = np.random.default_rng(2).integers(0, 50, (3, 7))
    t = {n: x for n, x in tensors(model).items() if n.startswith("embeddings.")}
    check(bert.embeddings(t, ids), call(model.embeddings, ids))


# --- Images

TIMM = {
    r"^vit\.embeddings\.": "",
    r"^vit\.layers": "blocks",
    r"^vit\.layernorm": "norm",
    r"^classifier": "head",
    r"^position_embeddings": "pos_embed",
    r"patch_embeddings\.projection": "patch_embed.proj",
    r"^decoder\.decoder_layers": "decoder_blocks",
    r"^decoder\.": "",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"attention\.o_proj": "attn.proj",
    r"attention\.([qkv])_proj": r"attn.\1",
}
IMAGE = dict(image_size=(32, 48), patch_size=16, **SIZE)


def to_timm(model) -> dict[str, np.ndarray]:
    return fuse(rename(tensors(model), TIMM), ("attn.q.", "attn.k.", "attn.v."), "attn.qkv.")


def test_vit_agrees_with_transformers():
    config = transformers.ViTConfig(**IMAGE, num_labels=5, layer_norm_eps=1e-6)
    model = randomise(transformers.ViTForImageClassification(config))
    image = draw(1, 2, 3, 32, 48)
    ours = timm.vit(to_timm(model), image, heads=4)
    theirs = call(model.vit, image).last_hidden_state
    check(ours["tokens"], theirs)
    check(ours["pooled"], theirs[:, 0])
    check(ours["logits"], call(model, image).logits)


def test_mae_agrees_with_transformers():
    size = dict(IMAGE, image_size=48, mask_ratio=0.6, layer_norm_eps=1e-6)
    model = randomise(
        transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**size, **DECODER))
    )
    image, noise = draw(1, 2, 3, 48, 48), np.random.default_rng(5).uniform(size=(2, 9))
    keep = noise.argsort(1)[:, :3]  # 0.4 of 9, rounded down
    ours = timm.mae(to_timm(model), image, keep, heads=4, decoder_heads=3)
    check(ours["tokens"], call(model.vit, image, noise=noise).last_hidden_state)
    check(ours["pixels"], call(model, image, noise=noise).logits)


# --- CLIP

OPENAI = {
    r"^vision_model\.": "visual.",
    r"^text_model\.": "",
    r"embeddings\.class_embedding": "class_embedding",
    r"embeddings\.patch_embedding": "conv1",
    r"embeddings\.position_embedding\.weight": "positional_embedding",
    r"embeddings\.token_embedding": "token_embedding",
    r"pre_layrnorm": "ln_pre",
    r"post_layernorm": "ln_post",
    r"final_layer_norm": "ln_final",
    r"encoder\.layers": "transformer.resblocks",
    r"layer_norm": "ln_",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
    r"self_attn\.out_proj": "attn.out_proj",
    r"self_attn\.(.)_proj\.": r"attn.\1_",
}


def to_openai(model) -> dict[str, np.ndarray]:
    t = fuse(rename(tensors(model), OPENAI), ("attn.q_", "attn.k_", "attn.v_"), "attn.in_proj_")
    t["visual.proj"] = t.pop("visual_projection.weight").T
    t["text_projection"] = t.pop("text_projection.weight").T
    return t


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_agrees_with_transformers(act):
    text = dict(SIZE, hidden_size=24, num_attention_heads=3, vocab_size=50, hidden_act=act)
    config = transformers.CLIPConfig(
        text_config=dict(text, max_position_embeddings=9, eos_token_id=49),
        vision_config=dict(IMAGE, image_size=48, hidden_act=act),
        projection_dim=20,
    )
    model = randomise(transformers.CLIPModel(config))
    t = to_openai(model)

    image = draw(1, 2, 3, 48, 48)
    ours = clip.image(t, image, 4, act)
    theirs = call(model.vision_model, image)
    check(ours["raw"], theirs.last_hidden_state)
    check(ours["tokens"][:, 0], theirs.pooler_output)
    check(ours["embedding"], call(model.get_image_features, image).pooler_output)

    ids = np.random.default_rng(2).integers(1, 48, (3, 7))
    ids[np.arange(3), [6, 4, 2]] = 49  # the end of the text; what follows is never seen
    ours = clip.text(t, ids, 3, act)
    check(ours["tokens"], call(model.text_model, ids).last_hidden_state)
    check(ours["embedding"], call(model.get_text_features, ids).pooler_output)

    custom = {f"text.{n}": x for n, x in t.items() if not n.startswith("visual.")}
    assert np.array_equal(clip.text(custom, ids, 3, act)["tokens"], ours["tokens"])
