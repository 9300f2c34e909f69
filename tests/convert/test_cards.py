"""What an exported folder tells a stranger, and folders and files as strangers have them."""

import json
import re

import numpy as np
import pytest
import yaml

import vtp_jax
from tests.convert import small
from tests.convert.test_convert import flags, put
from vtp_jax.convert import __main__ as convert
from vtp_jax.convert import export, files, formats, hf_folder, rules
from vtp_jax.convert.families import FORMATS
from vtp_jax.data import kept, pipeline, text
from vtp_jax.types import UserError


def source_of(name, **changes):
    tensors, _, heads = small.tensors_of(name)
    params = rules.to_params(formats.table(FORMATS[name], heads, tensors.keys()), tensors)
    given = dict(labels=(), origin="step 7 of a run")
    return export.Source(
        params, name, heads, video=(4, 16, 16), settings=export.DEFAULTS, **(given | changes)
    )


def written(folder, kind, words, length=8):
    """A folder as `export` furnishes it, of a run with a tokenizer; returns its card."""
    keep = kept.write(
        pieces=1, labelled=False, classes={"data.train": 0}, words=words, kind=kind, labels=()
    )
    sections = dict(method={}, task=None, video={}, text=dict(kind=kind, length=length))
    export.furnish(folder, source_of("simvtp", sections=sections, files=keep), "simvtp", {})
    return (folder / "README.md").read_text()


def snippets(card):
    return re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)


@pytest.fixture
def pieces(tmp_path):
    captions = ["a red dog runs", "a blue dog sits here"]
    text.train(captions, tmp_path / "words.model", 60)
    vocabulary = [*text.SPECIAL, "a", "red", "blue", "dog", "run", "##s", "sit", "here"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    return dict(sentencepiece=tmp_path / "words.model", wordpiece=tmp_path / "vocab.txt")


@pytest.mark.parametrize("kind", ["sentencepiece", "wordpiece"])
@pytest.mark.parametrize("told", ["A red dog", "a blue dog runs here and a red dog sits there"])
def test_the_card_makes_the_ids_that_the_net_was_trained_on(
    kind, told, pieces, tmp_path, monkeypatch
):
    """Its own lines are run in the folder."""
    words = pipeline.words_of(dict(text=dict(kind=kind, path=str(pieces[kind]), length=8)))
    folder = tmp_path / "out"
    folder.mkdir()
    (lines,) = (one for one in snippets(written(folder, kind, words)) if "ids, mask)" not in one)
    monkeypatch.chdir(folder)
    found = dict(text=told)
    exec(lines, found)
    ids, mask, _ = words.tokenizer.encode([told], 8)
    np.testing.assert_array_equal(found["ids"], ids[0])
    np.testing.assert_array_equal(np.asarray(found["mask"], bool), mask[0])


def test_a_users_net_is_the_users(tmp_path):
    """A run's net is not the authors', and an import is what it was imported as."""
    own = source_of("videomae_finetune", sections=dict(text=None), labels=("walk", "run"))
    card = export.card(own, "hf_videomae_finetune", {})
    front, body = card.split("---\n")[1:]
    assert body.startswith("# VideoMAE fine-tuned to classify, trained with vtp_jax\n")
    assert "0 walk; 1 run" in body and "hf upload" in body and "## Words" not in body
    assert yaml.safe_load(front) == {
        "license": "other",
        "library_name": "transformers",
        "pipeline_tag": "video-classification",
        "tags": ["video", "videomae", "vtp_jax", "arxiv:2203.12602"],
    }
    (imported,) = re.findall("^# (.*)", export.card(source_of("simvtp"), "simvtp", {}), re.M)
    assert imported == FORMATS["simvtp"].about
    assert set(export.ABOUTS) >= {*export.RUNS.values(), *export.NAMES.values()}


@pytest.mark.parametrize(
    "given, labels",
    [
        (None, ()),
        ({"0": "walk", "1": "run"}, ("walk", "run")),
        ({"1": "run", "0": "walk"}, ("walk", "run")),
        ({"3": "d", "1": "b"}, ("LABEL_0", "b", "LABEL_2", "d")),
        ({"walk": "0", "run": 1}, ("walk", "run")),
        ({"0": 7, "1": None}, ("7", "None")),
    ],
)
def test_names_of_classes_are_read_as_they_are_written(given, labels, tmp_path):
    assert hf_folder.read_labels(tmp_path, given) == labels


@pytest.mark.parametrize(
    "given", [["walk"], "walk", {"walk": "run"}, {"0": "a", "00": "b"}, {"9" * 9: "a"}, 3]
)
def test_other_names_of_classes_are_one_line(given, tmp_path):
    with pytest.raises(UserError, match=r"id2label must be \{number: name\}"):
        hf_folder.read_labels(tmp_path, given)


def test_a_head_has_a_name_for_each_class(tmp_path, capsys):
    """Fewer than its classes are filled up, so that transformers finds a head of the right size."""
    tensors, _, heads = small.tensors_of("hf_videomae_finetune")
    folder = put(tmp_path, "hf_videomae_finetune", tensors, heads)
    config = json.loads((folder / "config.json").read_text())
    classes = len(config["id2label"])
    argv = ["import", "--from", str(folder), "--format", "hf_videomae_finetune", "--out"]
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {"0": "walk"}}))
    convert.main([*argv, str(tmp_path / "a")])
    assert f"1 of {classes} classes have a name" in capsys.readouterr().out
    convert.main(["export", "--checkpoint", str(tmp_path / "a"), "--format", "hf",
                  "--out", str(tmp_path / "b")])  # fmt: skip
    again = json.loads((tmp_path / "b" / "config.json").read_text())["id2label"]
    assert list(again.values()) == ["walk", *(f"LABEL_{i}" for i in range(1, classes))]
    assert vtp_jax.load(folder).labels == tuple(again.values())
    many = {str(i): f"c{i}" for i in range(classes + 1)}
    (folder / "config.json").write_text(json.dumps({**config, "id2label": many}))
    with pytest.raises(UserError, match=f"{classes + 1} names of classes, but the head has"):
        convert.main([*argv, str(tmp_path / "c")])


# Nets that are a part of what a file holds.


def imported(tmp_path, tensors, heads, *more):
    files.write(tmp_path / "given.safetensors", tensors)
    argv = ["import", "--from", str(tmp_path / "given.safetensors"), "--format", "videomae"]
    convert.main([*argv, "--out", str(tmp_path / "out"), *flags(heads), *more])
    return json.loads((tmp_path / "out" / export.FACTS).read_text())


def test_a_net_in_a_lightning_module_is_found(tmp_path):
    tensors, _, heads = small.tensors_of("videomae")
    held = {f"model.{n}": x for n, x in tensors.items()} | {"criterion.scale": np.ones(1, "f4")}
    facts = imported(tmp_path, held, heads)
    assert facts["wrappers"] == ["model."] and facts["left_aside"] == ["criterion.scale"]


@pytest.mark.parametrize("part, wrapper", [("encoder.", "module."), ("blocks.", "_orig_mod.")])
def test_wrapped_parts_lose_their_wrapper(part, wrapper):
    tensors, _, _ = small.tensors_of("videomae")
    wrapped = {n.replace(part, part + wrapper, 1): x for n, x in tensors.items()}
    assert wrapped.keys() != tensors.keys()
    found, prefix = formats.below(FORMATS["videomae"], wrapped)
    assert found.keys() == tensors.keys() and prefix == ""


def test_of_two_nets_one_is_chosen():
    tensors, _, _ = small.tensors_of("videomae")
    both = {f"{part}.{n}": x for part in ("model", "model_ema") for n, x in tensors.items()}
    with pytest.raises(UserError, match="2 such nets, below 'model.', 'model_ema.'; choose: --pre"):
        formats.below(FORMATS["videomae"], both)
    found, prefix = formats.below(FORMATS["videomae"], both, "model_ema.")
    assert found.keys() == tensors.keys() and prefix == "model_ema."
    with pytest.raises(UserError, match="no name begins with 'ema.'; the first is 'model."):
        formats.below(FORMATS["videomae"], both, "ema.")


@pytest.mark.parametrize("name", FORMATS)
def test_a_plain_file_is_as_it_is(name):
    tensors, _, _ = small.tensors_of(name)
    found, prefix = formats.below(FORMATS[name], tensors)
    assert found.keys() == tensors.keys() and prefix == ""


@pytest.mark.parametrize("target", ["normalised", "pixels", None])
def test_a_hugging_face_folder_has_the_targets_of_its_run(target):
    """Or transformers would compute another loss."""
    sections = {} if target is None else dict(method=dict(target=target))
    config = export.hf_config(source_of("videomae", sections=sections), "hf_videomae")
    assert config["norm_pix_loss"] == (target != "pixels")
