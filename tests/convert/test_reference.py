"""The reference forward passes against numbers of the released models, 1e-12 in fp64; and laws.

tests/goldens.py explains the numbers. `transformers` is compared in tests/torch.
"""

import functools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests import goldens
from tests.goldens import Golden, load, make_tensors
from vtp_jax.convert.reference import bert, simvtp, timm
from vtp_jax.convert.reference import videomae as videomaes
from vtp_jax.types import UserError

RTOL = 1e-12


def check(x: np.ndarray, golden: dict[str, Any]) -> None:
    assert x.dtype == np.float64 and list(x.shape) == golden["shape"]
    found = [x.mean(), x.std(), *x.ravel()[:4], *x.ravel()[-4:]]
    wanted = [golden["mean"], golden["std"], *golden["first"], *golden["last"]]
    np.testing.assert_allclose(found, wanted, rtol=RTOL, atol=RTOL * golden["std"])


# --- SimVTP, pretraining


@functools.lru_cache(1)  # the larger one takes 250 MB
def pretrained(name: str) -> Golden:
    return goldens.simvtp(name)


def run_simvtp(name: str, **changes: Any) -> dict[str, np.ndarray]:
    t, x = pretrained(name).weights, pretrained(name).inputs
    heads = [len(t[f"{part}.norm.weight"]) // 64 for part in ("encoder", "decoder")]
    given = ("video", "mask", "ids", "attention_mask")
    return simvtp.pretrain(t, *(changes.pop(k, x[k]) for k in given), *heads, **changes)


@pytest.mark.parametrize("name", ["simvtp_tiny", "simvtp_small"])
def test_simvtp_has_the_released_models_numbers(name):
    golden = pretrained(name)
    out = run_simvtp(name, negatives=golden.inputs["negatives"])
    check(out["pixels"], golden.case["pixel_pred"])
    check(out["words"], golden.case["mlm_logits"])
    check(out["video"], golden.case["video_feat"])
    check(out["text"], golden.case["text_feat"])
    np.testing.assert_allclose(out["match"], golden.case["vtm_logits"], rtol=RTOL, atol=RTOL)


def test_with_negatives_the_pairs_come_first():
    pairs = run_simvtp("simvtp_small")["match"]
    both = run_simvtp("simvtp_small", negatives=np.array([2, 0, 3, 1]))["match"]
    assert both.shape == (8, 2)
    assert np.array_equal(both[:4], pairs)


def test_padding_changes_nothing_where_it_is_not_pooled():
    """The other rows of the batch determine the length of the padding."""
    x = pretrained("simvtp_small").inputs
    wider = {k: np.pad(x[k], ((0, 0), (0, 5))) for k in ("ids", "attention_mask")}
    for pool_padding in (True, False):
        out = run_simvtp("simvtp_small", pool_padding=pool_padding)
        far = run_simvtp("simvtp_small", pool_padding=pool_padding, **wider)
        moved = {k: np.abs(out[k] - far[k]).max() for k in ("text", "match")}
        assert all((moved[k] > 1e-3) == pool_padding for k in moved), moved
        if not pool_padding:
            assert max(moved.values()) < RTOL


def test_a_video_may_be_fully_visible():
    x = pretrained("simvtp_small").inputs
    out = run_simvtp("simvtp_small", mask=np.zeros_like(x["mask"]))
    assert out["pixels"].shape == (4, 0, 1536)


# --- SimVTP, fine-tuned


@pytest.mark.parametrize("name", ["released", "small"])
def test_finetuned_simvtp_has_the_released_models_numbers(name):
    golden = goldens.simvtp_finetune(name)
    case, x = golden.case, golden.inputs
    assert set(golden.weights) == set(case["grad_norms"])
    out = simvtp.finetune(golden.weights, x["video"], x["ids"], x["attention_mask"], case["heads"])
    check(out["video"], case["video"])
    check(out["text"], case["text"])
    unit = {k: v / np.linalg.norm(v, axis=1, keepdims=True) for k, v in out.items()}
    sim = unit["text"] @ unit["video"].T
    np.testing.assert_allclose(sim, case["sim"], rtol=0, atol=RTOL)


# --- VideoMAE


@functools.cache
def videomae() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tensors of the pretraining net, of the classifier, and inputs."""
    case = load("videomae_tiny")["case"]
    narrow = {k: case[f"dec_{k}"] for k in ("width", "depth", "mlp")}
    case = dict(case, encoder=case, decoder=narrow)
    inputs = dict(video=goldens.normal_video(case), mask=goldens.tubes(case))
    nets = (make_tensors(shapes(case)) for shapes in (goldens.autoencoder, goldens.classifier))
    return *nets, inputs


def reconstruct(**changes: Any) -> dict[str, np.ndarray]:
    t, _, x = videomae()
    given = dict(t=t, video=x["video"], mask=x["mask"], heads=3, decoder_heads=4)
    return videomaes.pretrain(**given | changes)


def test_videomae_pretraining_has_the_official_numbers():
    check(reconstruct()["pixels"], load("videomae_tiny")["pixels"])


def test_videomae_classification_has_the_official_numbers():
    golden = load("videomae_tiny")
    _, t, x = videomae()
    out = videomaes.classify(t, x["video"], heads=3)
    check(out["pooled"], golden["pooled"])
    np.testing.assert_allclose(out["logits"], golden["logits"], rtol=0, atol=RTOL)


# --- Laws


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_half_precision_is_computed_in_double(dtype):
    t = {n: x.astype(dtype) for n, x in videomae()[0].items()}
    out = reconstruct(t=t)
    wide = reconstruct(t={n: x.astype(np.float64) for n, x in t.items()})
    for name, x in out.items():
        assert x.dtype == np.float64
        assert np.array_equal(x, wide[name])


def test_bert_embeddings_are_found_under_any_prefix_and_under_old_names():
    d, ids = 8, np.array([[3, 1, 0]])
    t = {f"{n}_embeddings.weight": (9, d) for n in ("word", "position", "token_type")}
    t = make_tensors({**t, "LayerNorm.weight": (d,), "LayerNorm.bias": (d,)})
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    x = bert.embeddings(t, ids)
    for prefix in ("embeddings.", "bert.embeddings."):
        renamed = {prefix + old.get(name, name): a for name, a in t.items()}
        assert np.array_equal(bert.embeddings(renamed, ids), x)
    with pytest.raises(UserError, match="one tensor .*word_embeddings.weight is needed, not 2"):
        bert.embeddings({**t, **{f"b.{n}": a for n, a in t.items()}}, ids)


def make_vit(d: int = 12, patches: int = 6) -> dict[str, np.ndarray]:
    block = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (20, d), "mlp.fc2": (d, 20)}
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + patches, d)}
    shapes |= {"patch_embed.proj.weight": (d, 3, 4, 4), "patch_embed.proj.bias": (d,)}
    for name, shape in block.items():
        shapes |= {f"blocks.0.{name}.weight": shape, f"blocks.0.{name}.bias": shape[:1]}
    for name in ("blocks.0.norm1", "blocks.0.norm2", "norm"):
        shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    return make_tensors(shapes)


IMAGE = np.random.default_rng(0).standard_normal((2, 3, 8, 12))


def test_vit_positions_may_leave_out_the_class_token():
    with_zero, t = make_vit(), make_vit()
    with_zero["pos_embed"][:, 0] = 0
    t["pos_embed"] = t["pos_embed"][:, 1:]
    whole, less = (timm.vit(x, IMAGE, heads=3) for x in (with_zero, t))
    assert np.array_equal(whole["tokens"], less["tokens"])
    assert set(less) == {"raw", "tokens", "pooled"}  # no head, no logits


def test_vit_with_fc_norm_averages_the_patches():
    t = make_vit()
    first = timm.vit(t, IMAGE, heads=3)
    t = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: x
        for name, x in t.items()
    }
    out = timm.vit(t, IMAGE, heads=3)
    assert np.array_equal(out["raw"], first["raw"])
    x = first["raw"][:, 1:].mean(1)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        out["pooled"], x * t["fc_norm.weight"] + t["fc_norm.bias"], rtol=0, atol=RTOL
    )


def test_vit_with_a_norm_before_the_blocks_has_cubes_without_bias():
    t = make_vit()
    t |= {"norm_pre.weight": np.full(12, 2.0), "norm_pre.bias": np.ones(12)}
    t = {
        name: x for name, x in t.items() if not name.startswith("blocks.")
    }  # none: raw is its input
    del t["patch_embed.proj.bias"]
    cube = IMAGE[0, :, :4, 8:].reshape(-1)
    x = t["patch_embed.proj.weight"].reshape(12, -1) @ cube + t["pos_embed"][0, 3]
    x = 2 * (x - x.mean()) / np.sqrt(x.var() + 1e-6) + 1
    np.testing.assert_allclose(timm.vit(t, IMAGE, heads=3)["raw"][0, 3], x, atol=RTOL)


def test_mistakes_are_reported():
    t, _, x = videomae()
    lacking = {n: a for n, a in t.items() if n != "encoder.blocks.1.attn.v_bias"}
    with pytest.raises(UserError, match=r"tensor encoder\.blocks\.1\.attn\.v_bias is missing"):
        reconstruct(t=lacking)
    with pytest.raises(UserError, match="5 heads do not divide a width of 96"):
        reconstruct(heads=5)
    mask = x["mask"].copy()
    mask[0, np.flatnonzero(mask[0])[:1]] = False
    with pytest.raises(
        UserError, match=r"hides a different number of tokens in each row: \[43 44\]"
    ):
        reconstruct(mask=mask)
    with pytest.raises(UserError, match=r"cuts cubes of \(3, 2, 16, 16\)"):
        reconstruct(video=x["video"][..., :40])
