"""Weights in and out: the identity both ways for every format, proofs that can fail, and nothing
written where anything is wrong."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.arrays import fill
from vtp_jax import tree
from vtp_jax.convert import __main__ as convert
from vtp_jax.convert import files, folder, rules
from vtp_jax.convert.formats import FORMATS
from vtp_jax.methods import simvtp, tvtsv2, videomae
from vtp_jax.nn import text, vit
from vtp_jax.nn.sizes import Size
from vtp_jax.nn.transformer import CLIP
from vtp_jax.run import checkpoint
from vtp_jax.tasks import classify, retrieve
from vtp_jax.types import UserError

TINY = Size(128, 2, 2, 256)
SPEC = dict(
    valid=jax.ShapeDtypeStruct((2,), bool),
    video=jax.ShapeDtypeStruct((2, 4, 16, 16, 3), np.uint8),
    text=jax.ShapeDtypeStruct((2, 6), np.int32),
    text_mask=jax.ShapeDtypeStruct((2, 6), bool),
    label=jax.ShapeDtypeStruct((2,), np.int32),
)
NET = dict(size=TINY, decoder="tiny", cube=(2, 8, 8), dtype="float32")


def words():
    return simvtp.make(**NET, vocab_size=40, text_length=16)


def image(**more):
    return vit.ViT(TINY, 9, cube=(1, 8, 8), **more)


def cubes(n=9):
    return jnp.zeros((1, n, 192))


def make_mae(key):
    encoder = image().init(key, cubes())["params"]
    mask = simvtp.masking.tokens(key, 1, 9, 0.5)
    decoder = vit.Decoder(Size(64, 1, 1, 128), 9, 192)
    return dict(
        encoder=encoder,
        decoder=decoder.init(key, jnp.zeros((1, 6, 128)), mask)["params"],
    )


def make_clip(key):
    visual = image(style=CLIP, first_norm=True, features=32).init(key, cubes())["params"]
    tower = text.CausalText(TINY, 32, 40, 8)
    ids = jnp.zeros((1, 6), jnp.int32)
    words = tower.init(key, ids)["params"]
    return dict(visual=visual, text=words, logit_scale=np.float32(2.6))


def make_tvtsv2(key):
    method = tvtsv2.make(
        size=TINY, text_size=TINY, features=64, side=16, patch=8, frames=5, vocab_size=40,
        text_length=8,
    )  # fmt: skip
    return method.init(key, SPEC)


def make_vit(pooling, head):
    def make(key):
        params = dict(image(pooling=pooling).init(key, cubes())["params"])
        if head:
            params["head"] = dict(kernel=np.zeros((128, 5)), bias=np.zeros(5))
        return params

    return make


DROP = r"decoder.*|encoder_norm.*|mask_token|encoder_to_decoder.*"
TOWERS = dict(
    video=[DROP, "text_embed/.*", "text_cls/.*", "vtm_head/.*"],
    text=[DROP, "patch_embed/.*", "text_cls/.*", "vtm_head/.*"],
)
# format -> key -> parameters
CASES = {
    "simvtp": lambda key: words().init(key, SPEC),
    "simvtp_finetune": lambda key: retrieve.make(base=words(), drop=TOWERS).init(key, SPEC),
    "videomae": lambda key: videomae.make(**NET).init(key, SPEC),
    "videomae_finetune": lambda key: classify.make(
        base=videomae.make(**NET), classes=7, drop=[DROP]
    ).init(key, SPEC),
    "bert_embeddings": lambda key: {"text_embed": words().init(key, SPEC)["text_embed"]},
    "vit": make_vit("class", True),
    "vit_mean": make_vit("mean", False),
    "mae": make_mae,
    "clip": make_clip,
    "open_clip": make_clip,
    "tvtsv2": make_tvtsv2,
    "tvtsv2_h14": make_tvtsv2,
}
CASES["hf_videomae"] = CASES["videomae"]
CASES["hf_videomae_finetune"] = CASES["videomae_finetune"]
HEADS = {"heads": 2, "decoder-heads": 1, "text-heads": 2}


def tensors_of(name, dtype="float32"):
    """Tensors under the format's names, none of which is zero."""
    params = fill(CASES[name], jax.random.key(0), seed=1)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    form = FORMATS[name]
    heads = {n: HEADS[n] for n in form.stacks}
    flat = tree.flatten(params)
    table = convert.formats.table(form, heads, flat.keys())
    return rules.to_theirs(table, params), params, heads


def put(path, name, tensors, heads):
    """A file as it comes from others; Hugging Face's stand in folders."""
    if not name.startswith("hf_"):
        files.write(path / "given.safetensors", tensors)
        return path / "given.safetensors"
    (path / "given").mkdir()
    files.write(path / "given" / "model.safetensors", tensors)
    source = folder.Source(
        rules.to_ours(convert.formats.table(FORMATS[name], heads, tensors.keys()), tensors),
        name, heads, (4, 16, 16), folder.DEFAULTS, (), None, "a test",
    )  # fmt: skip
    folder.write_json(path / "given" / "config.json", folder.hf_config(source, name))
    return path / "given"


def flags(heads):
    return [f"--{n}={h}" for n, h in heads.items()]


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("name", FORMATS)
def test_in_out_and_in_again_is_the_identity(name, tmp_path, capsys):
    tensors, params, heads = tensors_of(name)
    given = put(tmp_path, name, tensors, heads)
    convert.main(
        [
            "import",
            "--from",
            str(given),
            "--format",
            name,
            "--out",
            str(tmp_path / "a"),
            *flags(heads),
        ]
    )
    first = tree.flatten(checkpoint.restore_params(tmp_path / "a"))
    equal(first, {k: np.asarray(v) for k, v in tree.flatten(params).items()})
    kind = "hf" if name.startswith("hf_") else "safetensors"
    convert.main(
        [
            "export",
            "--checkpoint",
            str(tmp_path / "a"),
            "--format",
            kind,
            "--out",
            str(tmp_path / "b"),
        ]
    )
    back = files.read(tmp_path / "b").tensors
    equal({k: v for k, v in back.items() if k in tensors}, tensors)
    again = ["--from", str(tmp_path / "b"), "--format", name, "--out", str(tmp_path / "c")]
    convert.main(["import", *again, *flags(heads)])
    equal(tree.flatten(checkpoint.restore_params(tmp_path / "c")), first)
    assert "difference" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
def test_half_precision_stays_what_it_is(dtype, tmp_path):
    tensors, _, heads = tensors_of("videomae", dtype)
    given = put(tmp_path, "videomae", tensors, heads)
    out = tmp_path / "a"
    convert.main(["import", "--from", str(given), "--format", "videomae", "--out", str(out)])
    facts = json.loads((out / "convert.json").read_text())
    assert facts["dtypes"] == {np.dtype(dtype).name: len(tensors)}
    export = ["--checkpoint", str(out), "--format", "safetensors", "--out", str(tmp_path / "b")]
    convert.main(["export", *export])
    equal(files.read(tmp_path / "b").tensors, tensors)


def refuse(tmp_path, name, tensors, match, *more):
    files.write(tmp_path / "bad.safetensors", tensors)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=match):
        convert.main(
            [
                "import",
                "--from",
                str(tmp_path / "bad.safetensors"),
                "--format",
                name,
                "--out",
                str(out),
                *more,
            ]
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.safetensors"]


def test_what_is_wrong_is_listed_and_nothing_is_written(tmp_path):
    tensors, *_ = tensors_of("videomae")
    lacking = {k: v for k, v in tensors.items() if k not in ("mask_token", "decoder.norm.bias")}
    refuse(tmp_path, "videomae", lacking, "missing .*decoder.norm.bias.*mask_token")
    more = {**tensors, "head.extra": tensors["mask_token"], "other": tensors["mask_token"]}
    refuse(tmp_path, "videomae", more, "unexpected .*head.extra.*other")
    wrong = dict(tensors)
    wrong["encoder.norm.bias"] = np.zeros(64, np.float32)
    wrong["decoder.head.bias"] = np.zeros(7, np.float32)
    refuse(
        tmp_path, "videomae", wrong, r"encoder_norm/bias is \(64,\).*|decoder_head/bias is \(7,\)"
    )
    odd = {**tensors, "encoder.blocks.1.norm1.bias": np.zeros(3, np.float32)}
    refuse(tmp_path, "videomae", odd, "encoder.blocks.1.norm1.bias")
    refuse(tmp_path, "vit", tensors, "of another format")
    nan = {**tensors, "encoder.norm.bias": np.full(128, np.nan, np.float32)}
    refuse(tmp_path, "videomae", nan, "encoder.norm.bias")
    refuse(tmp_path, "videomae", tensors, "do not divide|no published", "--heads", "5")


def test_a_conversion_that_is_not_right_is_refused(tmp_path, monkeypatch):
    """As Hugging Face's once was: two biases silently zero."""
    tensors, *_ = tensors_of("videomae")
    forget = rules.Layout(lambda x: 0 * x.reshape(2, -1), lambda x: x.reshape(-1))
    right = FORMATS["videomae"].rules

    def wrong(*heads):
        return [
            r._replace(layout=forget) if r.ours == "encoder/blocks/attn/q_bias" else r
            for r in right(*heads)
        ]

    monkeypatch.setitem(FORMATS, "videomae", FORMATS["videomae"]._replace(rules=wrong))
    refuse(tmp_path, "videomae", tensors, "differs from the reference")


def test_a_full_folder_is_not_written_into(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="not empty"):
        convert.main(["import", "--from", "x", "--format", "vit", "--out", str(tmp_path / "out")])


def test_a_bert_is_read_for_its_embeddings_alone(tmp_path, capsys):
    tensors, params, _ = tensors_of("bert_embeddings")
    old = {
        f"bert.{k}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
        for k, v in tensors.items()
    }
    old |= {
        "bert.pooler.dense.bias": np.ones(3, np.float32),
        "bert.embeddings.position_ids": np.arange(4),
    }
    files.write(tmp_path / "bert.npz", old)
    convert.main(
        [
            "import",
            "--from",
            str(tmp_path / "bert.npz"),
            "--format",
            "bert_embeddings",
            "--out",
            str(tmp_path / "o"),
        ]
    )
    equal(tree.flatten(checkpoint.restore_params(tmp_path / "o")), tree.flatten(params))
    assert "bert.pooler.dense.bias" in capsys.readouterr().out
