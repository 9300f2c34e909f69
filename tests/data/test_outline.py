"""What `describe` returns without reading a file is what the opened pipeline has."""

import json
import sys

import pytest
from absl import logging

from tests.configs import ROOT, tiny_configs
from vtp_jax.data import inputs, outline, pipeline, shapes, shards, sources, text
from vtp_jax.setup import config
from vtp_jax.types import UserError

VIDEO = dict(frames=4, stride=2, size=24)
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "disc"]


def check(data, batch=4, **unknown):
    """The opened pipeline is as described; what only files have is `unknown`."""
    spec, facts = outline.describe(data, batch)
    opened = pipeline.make(**data, batch=batch, seed=0)
    assert spec == opened.spec
    assert dict(facts, **unknown) == dict(opened.facts)
    assert not facts.keys() & unknown.keys()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six videos, their captions and labels, questions with answers, and shards of them."""
    root = tmp_path_factory.mktemp("corpus")
    shapes.write(root, shapes.Plan(train=6, val=2, side=32, frames=10), workers=1)
    lines = [f"train/{i:05d}.mp4,{'what is it' if i % 2 else 'who'},{i % 3},{'red' if i else 'no'}"
             for i in range(6)]  # fmt: skip
    (root / "list.csv").write_text("\n".join(["path,caption,label,answer", *lines]))
    (root / "answers.txt").write_text("no\nred\nblue\n")
    said = {f"train/{i:05d}.mp4": ["first", "then"] for i in range(4)}
    (root / "long.json").write_text(json.dumps(said))
    source = sources.load(root, root / "list.csv", label_column="label")
    (task,), form = inputs.plan_files(source, 9), shards.Form(every=1)
    shards.begin(root / "shards", [task], form)
    shards.make_shard(task, root / "shards", form)
    shards.finish(root / "shards")
    text.train(["what is it", "who"] * 3, root / "spm.model", 30)
    (root / "vocab.txt").write_text("\n".join(BERT))
    return root


@pytest.mark.parametrize("path", tiny_configs())
def test_the_outline_of_every_tiny_config_is_what_it_opens(path):
    cfg = config.load(str(ROOT / path))
    check(cfg.data, cfg.batch)


def files(root, **more):
    return dict(root=str(root), list=str(root / "list.csv"), **more)


def test_the_outline_of_files_is_what_they_open(root):
    data = dict(kind="files", video=VIDEO, train=files(root))
    check(data)
    check(dict(data, train=files(root, label_column="label")), labels=3)
    asked = files(root, label_column="answer", answers=str(root / "answers.txt"))
    check(dict(data, train=asked), labels=2)
    check(dict(data, video=dict(VIDEO, repeats=3)))
    long = dict(root=str(root), list=str(root / "long.json"), pieces=2)
    size = text.load_sentencepiece(root / "spm.model").facts["vocab_size"]
    words = dict(kind="sentencepiece", length=8, path=str(root / "spm.model"), vocab_size=size)
    check(dict(data, train=long, text=words))
    check(dict(data, text=words))


def test_the_outline_of_shards_and_mixtures_is_what_they_open(root):
    own = dict(root=str(root / "shards"), label_column="label")
    check(dict(kind="shards", video=VIDEO, train=own), labels=3)
    drawn = dict(kind="shapes", clips=5, side=32, frames=10)
    for more, unknown in ((dict(), dict()), (dict(label_column="label"), dict(labels=3))):
        train = dict(mix=dict(a=files(root, weight=2.0, **more), b=drawn))
        check(dict(kind="files", video=VIDEO, train=train), **unknown)


def test_labels_that_the_config_does_not_name_are_reported(root, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    data = dict(kind="shards", video=VIDEO, train=dict(root=str(root / "shards")))
    assert "label" in pipeline.make(**data, batch=4, seed=0).spec
    assert len(lines) == 1 and "data.train has labels that it does not name" in lines[0]


def test_the_outline_of_alternating_sources_is_what_they_open(root):
    """The spec is that of `train`; classes are those of all, known only if they are of all."""
    drawn = dict(kind="shapes", clips=30, side=32, frames=10, label="shape")
    also = dict(images=dict(train=drawn, video=dict(frames=1), batch=8))
    check(dict(kind="files", video=VIDEO, train=files(root), also=also))
    labelled = files(root, label_column="label")
    check(dict(kind="files", video=VIDEO, train=labelled, also=also), labels=7)


def test_the_outline_of_a_named_set_is_what_it_opens(tmp_path):
    shapes.write(tmp_path, shapes.Plan(train=2, val=1, side=32, frames=10), workers=1)
    (tmp_path / "Disc").mkdir()
    (tmp_path / "train/00000.mp4").rename(tmp_path / "Disc/00000.mp4")
    (tmp_path / "classInd.txt").write_text("1 Disc\n")
    (tmp_path / "trainlist01.txt").write_text("Disc/00000.mp4 1\n")
    given = dict(set="ucf101", split="train_1", root=str(tmp_path))
    check(dict(kind="sets", video=VIDEO, train=given), labels=1)


def test_published_vocabularies_have_known_sizes_and_ids():
    """Nothing is read: their files are not here. The ids are those of BERT's and CLIP's files."""
    data = dict(kind="files", train=dict(root="no", list="no"), video=VIDEO)
    ids = dict(pad_id=0, unk_id=100, cls_id=101, sep_id=102, mask_id=103)
    for kind, wanted in (
        ("wordpiece", dict(ids, vocab_size=30522)),
        ("clip", dict(pad_id=0, cls_id=49406, sep_id=49407, vocab_size=49408)),
    ):
        _, facts = outline.describe(dict(data, text=dict(kind=kind, length=9, path="no")), 4)
        pixels = dict(mean=outline.MEAN, std=outline.STD, labels=0)
        assert facts == dict(wanted, **pixels)
    words = dict(kind="sentencepiece", length=9, path="no", vocab_size=64_000)
    assert outline.describe(dict(data, text=words), 4).facts["vocab_size"] == 64_000
    del words["vocab_size"]
    with pytest.raises(UserError, match="only no defines the number of pieces; set data.text"):
        outline.describe(dict(data, text=words), 4)


def test_a_vocabulary_of_another_size_is_reported_and_its_own_numbers_are_used(root, monkeypatch):
    words = dict(kind="wordpiece", length=8, path=str(root / "vocab.txt"))
    data = dict(kind="shapes", train=dict(clips=4), video=VIDEO, text=words)
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    facts = pipeline.make(**data, batch=4, seed=0).facts
    assert (facts["vocab_size"], facts["mask_id"]) == (len(BERT), 4)
    (line,) = [line for line in lines if "vocab_size" in line]  # others are of the captions
    assert "vocab_size=7 (not 30522)" in line and "mask_id=4 (not 103)" in line and "\n" not in line


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(text=dict(length=9)), "config.data.text: the key 'kind' is missing"),
        (dict(text=dict(kind="bpe", length=9, path="no")), "'bpe' is not a tokenizer"),
        (dict(kind="sets", train=dict(set="msrvtt")), "the key 'split' is missing"),
        (dict(kind="sets", train=dict(set="msrvt", split="x")), "did you mean 'msrvtt'"),
        (dict(video=dict(VIDEO, crop="random")), "crop='random' is not known"),
        (dict(also=dict(images=dict(rows=3))), "data.also.images: .*it takes train, video"),
    ],
)
def test_mistakes_are_one_line_errors(changes, told):
    data = dict(kind="files", train=dict(root="no", list="no"), video=VIDEO)
    with pytest.raises(UserError, match=told) as error:
        outline.describe(data | changes, 4)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="config.data: the key 'video' is missing"):
        outline.describe(dict(kind="files", train={}), 4)


def test_an_outline_needs_no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    data = dict(kind="files", train=dict(root="no", list="no"), video=VIDEO)
    assert outline.describe(data, 4).facts["labels"] == 0
