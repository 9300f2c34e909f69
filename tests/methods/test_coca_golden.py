"""CoCa held to OpenCLIP's parts, where their maths is the paper's: features, pooled tokens, logits,
losses, every gradient, and a caption written without a cache. 1e-9 relative in fp64.

The numbers come from mlfoundations/open_clip @89fb801; `about` in the golden says what was set so
that both compute the same, `rule` how names and seeds make weights and inputs.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.convert import rules
from vtp_jax.convert.rules import Rule, linear, norm
from vtp_jax.methods import coca
from vtp_jax.objectives import contrastive

GOLDEN = Path(__file__).parents[1] / "golden" / "coca_tiny.json"


def cross(ours: str, theirs: str, heads: int) -> list[Rule]:
    return [
        Rule(f"{ours}/q", f"{theirs}.q.weight", rules.head_kernel(heads)),
        Rule(f"{ours}/q_bias", f"{theirs}.q.bias", rules.per_head(heads)),
        Rule(f"{ours}/kv", f"{theirs}.kv.weight", rules.fused_qkv(heads, 2)),
        Rule(f"{ours}/kv_bias", f"{theirs}.kv.bias", rules.fused_bias(heads, 2)),
        *linear(f"{ours}/proj", f"{theirs}.out_proj"),
    ]


def pooler(ours: str, theirs: str, heads: int) -> list[Rule]:
    return [
        Rule(f"{ours}/query", f"{theirs}.query", rules.SAME),
        *norm(f"{ours}/norm_query", f"{theirs}.ln_q"),
        *norm(f"{ours}/norm", f"{theirs}.ln_k"),
        *cross(f"{ours}/cross", f"{theirs}.attn", heads),
    ]


def table(heads: int) -> list[Rule]:
    upper = "text/upper/blocks"
    own, other = "text_decoder.resblocks.{i}", "text_decoder.cross_attn.{i}"
    return [
        Rule("visual/patch_embed/kernel", "visual.conv1.weight", rules.CONV2),
        Rule("visual/position", "visual.positional_embedding", rules.SAME),
        *rules.stack("visual/encoder", "visual.transformer.resblocks", heads, rules.CLIP),
        *norm("visual/norm", "visual.ln_post"),
        *pooler("caption_pool", "visual.attn_pool", heads),
        *pooler("contrast_pool", "visual.attn_pool_contrastive", heads),
        Rule("video_proj/kernel", "visual.proj", rules.SAME),
        Rule("text/word", "text.token_embedding.weight", rules.SAME),
        Rule("text/position", "text.positional_embedding", rules.SAME),
        Rule("text/class_token", "text.cls_emb", rules.SAME),
        *rules.stack("text/lower", "text.transformer.resblocks", heads, rules.CLIP),
        *norm("text/class_norm", "text.ln_final"),
        Rule("text/proj/kernel", "text.text_projection", rules.SAME),
        *norm("text/memory_norm", "text_decoder.cross_attn.0.ln_1_kv"),
        *norm(f"{upper}/norm1", f"{own}.ln_1"),
        Rule(f"{upper}/attn/qkv", f"{own}.attn.in_proj_weight", rules.fused_qkv(heads)),
        Rule(f"{upper}/attn/qkv_bias", f"{own}.attn.in_proj_bias", rules.fused_bias(heads)),
        *linear(f"{upper}/attn/proj", f"{own}.attn.out_proj"),
        *norm(f"{upper}/norm_cross", f"{other}.ln_1"),
        *cross(f"{upper}/cross", f"{other}.attn", heads),
        *norm(f"{upper}/norm2", f"{other}.ln_2"),
        *linear(f"{upper}/mlp/fc1", f"{other}.mlp.c_fc"),
        *linear(f"{upper}/mlp/fc2", f"{other}.mlp.c_proj"),
        *norm("text/norm", "text_decoder.ln_final"),
        Rule("text/head/kernel", "text_decoder.text_projection", rules.SAME),
        Rule("logit_scale", "logit_scale", rules.SAME),
    ]


def make_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name == "logit_scale":
        return np.array(math.log(1 / 0.07))
    draw = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if name.endswith(".weight") and name.split(".")[-2].startswith("ln_"):
        value = 1 + 0.1 * draw
    elif len(shape) == 1:
        value = 0.05 * draw
    else:
        value = draw / np.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32).astype(np.float64)


def make_batch(golden: dict[str, Any]) -> dict[str, Any]:
    c, lengths = golden["config"], np.array(golden["lengths"])[:, None]
    b, side, length = c["batch"], c["side"], c["length"]
    video = np.random.RandomState(1).randint(0, 256, (b, side, side, 3)) / 255
    place, drawn = np.arange(length), np.random.RandomState(2).randint(3, c["vocab"], (b, length))
    text = np.where(place == 0, c["start"], np.where(place < lengths - 1, drawn, c["end"]))
    return dict(
        video=jnp.asarray(video[:, None]),
        text=jnp.asarray(np.where(place < lengths, text, 0), jnp.int32),
        text_mask=jnp.asarray(place < lengths),
        valid=jnp.ones(b, bool),
    )


def close(value: Any, scale: float = 0.0) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-9 * scale)


def check_array(told: dict[str, Any], x: Any) -> None:
    assert list(x.shape) == told["shape"] and float(x.std()) == close(told["std"])
    assert float(x.mean()) == close(told["mean"], told["std"])
    assert np.ravel(x)[:4].tolist() == close(told["first"], told["std"])
    assert np.ravel(x)[-4:].tolist() == close(told["last"], told["std"])


def test_a_step_and_a_caption():
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    c = golden["config"]
    with jax.enable_x64(True):
        batch, names = make_batch(golden), table(c["heads"])
        size = (c["width"], c["layers"], c["heads"], c["width"] * c["mlp_ratio"])
        method = coca.make(
            size=size, text_size=size, side=c["side"], patch=c["patch"], queries=c["queries"],
            length=c["length"], vocab_size=c["vocab"], cls_id=c["start"], sep_id=c["end"],
            weights=dict(contrast=0.5, caption=2.0), dtype="float64",
        )  # fmt: skip
        theirs = {k: make_tensor(k, tuple(s)) for k, s in golden["parameters"].items()}
        params = jax.tree.map(jnp.asarray, rules.to_ours(names, theirs))
        params["visual"]["patch_embed"]["bias"] = jnp.zeros(c["width"])  # theirs has none

        net, recipe = method.loss.args

        def loss(params):
            out = coca.forward(net, params, batch)
            found = {k: v.value() for k, v in coca.terms(recipe, out, batch).items()}
            value = sum(recipe.weights[k] * found[f"loss_{k}"] for k in recipe.weights)
            return value, (found, out)

        (value, (found, out)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        assert float(value) == close(golden["loss"])
        assert float(found["loss_contrast"]) == close(2 * golden["contrast"])
        assert float(found["loss_caption"]) == close(golden["caption"] / 2)
        check_array(golden["image"], contrastive.normalise(out.video))
        check_array(golden["text"], contrastive.normalise(out.text))
        check_array(golden["logits"], out.logits)
        check_array(golden["memory"], jax.jit(method.encode["video"])(params, {}, batch)["memory"])

        grads = jax.device_get(grads)
        del grads["visual"]["patch_embed"]["bias"]
        for name, x in rules.to_theirs(names, grads).items():
            size = float(np.linalg.norm(x))
            assert size == close(golden["grad_norms"][name]), name
            probe = float(np.ravel(x) @ np.random.RandomState(4).standard_normal(x.size))
            assert probe == close(golden["grad_probes"][name], size), name

        said = jax.jit(method.encode["generate"])(params, {}, batch)
        assert said["ids"].tolist() == golden["greedy"]["ids"]
        assert said["score"].tolist() == pytest.approx(golden["greedy"]["score"], rel=1e-6)
