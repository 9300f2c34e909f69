"""Import and export: the identity in both directions for every format, proofs that can fail, and
nothing written if anything is wrong."""

import json
from functools import partial

import ml_dtypes
import numpy as np
import pytest

from tests.convert import small
from vtp_jax import tree
from vtp_jax.convert import __main__ as convert
from vtp_jax.convert import export, files, formats, rules
from vtp_jax.convert.families import FORMATS
from vtp_jax.run import checkpoint
from vtp_jax.types import UserError


def put(path, name, tensors, heads):
    """A file as it is published; Hugging Face's are folders."""
    if not name.startswith("hf_"):
        files.write(path / "given.safetensors", tensors)
        return path / "given.safetensors"
    (path / "given").mkdir()
    files.write(path / "given" / "model.safetensors", tensors)
    source = export.Source(
        rules.to_params(formats.table(FORMATS[name], heads, tensors.keys()), tensors),
        name, heads, (4, 16, 16), export.DEFAULTS, (), "a test",
    )  # fmt: skip
    export.write_json(path / "given" / "config.json", export.hf_config(source, name))
    return path / "given"


def flags(heads):
    return [f"--{n}={h}" for n, h in heads.items()]


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("name", FORMATS)
def test_import_export_and_import_is_the_identity(name, tmp_path, capsys):
    tensors, params, heads = small.tensors_of(name)
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


# What is inferred from shapes, or drawn for the proof, where a table has a single row.
SMALLEST = {
    "vit": partial(small.make_vit, classes=1, places=2),  # an image that is not square
    "mae": partial(small.make_mae, places=1),
    "clip": partial(small.make_clip, places=1, length=1),
    "tvtsv2": partial(small.make_tvtsv2, side=8, frames=1, text_length=1, turns=1),
    "tvtsv2_h14": partial(small.make_tvtsv2, turns=1),
    "videomae_finetune": partial(small.make_classifier, classes=1),
}


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_nets_are_proved_too(name):
    tensors, params, heads = small.tensors_of(name, make=SMALLEST[name])
    worst = formats.check(FORMATS[name], params, tensors, heads)
    assert worst and max(worst.values()) < 1e-9


def test_half_of_an_optional_part_is_an_error():
    tensors, _, heads = small.tensors_of("vit")
    del tensors["head.bias"]
    with pytest.raises(UserError, match=r"missing \['head.bias'\], unexpected none"):
        rules.to_params(formats.table(FORMATS["vit"], heads, tensors.keys()), tensors)


def test_a_norm_without_a_width_is_rejected():
    tensors, *_ = small.tensors_of("bert_embeddings")
    odd = {"blocks.0.norm1.weight": np.zeros(()), **tensors}
    with pytest.raises(UserError, match="'blocks.0.norm1.weight' is 1 wide: no published net"):
        formats.heads_of(FORMATS["vit"], odd, {})


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
def test_half_precision_is_kept(dtype, tmp_path):
    tensors, _, heads = small.tensors_of("videomae", dtype)
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


def test_mistakes_are_listed_and_nothing_is_written(tmp_path):
    tensors, *_ = small.tensors_of("videomae")
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


def test_a_wrong_conversion_is_rejected(tmp_path, monkeypatch):
    """As Hugging Face's once was: two biases were silently zero."""
    tensors, *_ = small.tensors_of("videomae")
    forget = rules.Layout(lambda x: 0 * x.reshape(2, -1), lambda x: x.reshape(-1))
    right = FORMATS["videomae"].rules

    def wrong(*heads):
        return [
            r._replace(layout=forget) if r.param == "encoder/blocks/attn/q_bias" else r
            for r in right(*heads)
        ]

    monkeypatch.setitem(FORMATS, "videomae", FORMATS["videomae"]._replace(rules=wrong))
    refuse(tmp_path, "videomae", tensors, "differs from the reference")


def test_a_folder_that_is_not_empty_is_not_written_to(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="not empty"):
        convert.main(["import", "--from", "x", "--format", "vit", "--out", str(tmp_path / "out")])


def test_only_the_embeddings_of_a_bert_are_read(tmp_path, capsys):
    tensors, params, _ = small.tensors_of("bert_embeddings")
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
