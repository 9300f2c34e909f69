"""A run is whole: without its training set and its tokenizer's file, and moved to another folder,
it is evaluated as far as its sets are there, drawn, exported and restored."""

import json
import shutil

import jaxtyping
import numpy as np
import pytest

from tests import whole
from tests.films import TEXT
from vtp_jax import evaluate, visualize
from vtp_jax.convert import __main__ as convert
from vtp_jax.data import kept, pipeline, shapes, text
from vtp_jax.setup import build
from vtp_jax.types import UserError


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    return whole.make(tmp_path_factory.mktemp("whole"))


def test_it_is_restored_and_reads_words_as_it_was_trained_to(moved):
    workdir, films, captions, wanted, read = moved
    run = build.restore(workdir)
    streams = pipeline.given(run.config.data, [films / "0.mp4", films / "1.mp4"], captions)
    (batch,) = streams["given/captions"].batches()
    np.testing.assert_array_equal(batch["text"], wanted)
    assert run.data.decode(wanted) == read
    assert sorted(run.data.streams) == ["val", "val/captions"]


def test_given_videos_are_drawn(moved, tmp_path):
    workdir, films, *_ = moved
    argv = ["--workdir", str(workdir), "--videos", str(films), "--out", str(tmp_path)]
    visualize.main(argv)
    assert len(json.loads((tmp_path / "index.json").read_text())["reconstructions"]) == 3


def test_only_what_needs_an_absent_set_fails_in_one_line(moved, tmp_path, monkeypatch):
    # As for users: beartype opens a set to look at its type.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    workdir, films, captions, *_ = moved
    check = ["--config.evals.r.type=retrieval", "--config.evals.r.stream=val"]
    with pytest.raises(UserError, match="^no folder '.*corpus'; `root` must be"):
        evaluate.main(["--workdir", str(workdir), *check])
    with pytest.raises(UserError, match="^no folder '.*corpus'"):
        visualize.main(["--workdir", str(workdir)])
    with pytest.raises(UserError, match="has no training batches"):
        next(build.restore(workdir).data.batches(0))
    (films / "two.csv").write_text(
        "path,caption\n" + "".join(f"{n}.mp4,{caption}\n" for n, caption in enumerate(captions))
    )
    own = [f"--config.data.evals.mine.root={films}"]
    own += [f"--config.data.evals.mine.list={films}/two.csv", "--config.evals.r.stream=mine"]
    evaluate.main(["--workdir", str(workdir), *check, *own])


def test_it_is_exported_with_its_tokenizer(moved, tmp_path):
    workdir = moved[0]
    argv = ["export", "--checkpoint", str(workdir), "--format", "safetensors"]
    convert.main([*argv, "--out", str(tmp_path / "out")])
    (file,) = (tmp_path / "out").glob("*.model")
    assert file.read_bytes() == (workdir / "tokenizer.model").read_bytes()


def test_a_lost_or_damaged_file_is_named(moved, tmp_path):
    shutil.copytree(moved[0], tmp_path / "run")
    (tmp_path / "run/tokenizer.model").unlink()
    with pytest.raises(UserError, match="no tokenizer '.*/run/tokenizer.model'"):
        build.restore(tmp_path / "run")
    (tmp_path / "run/data.json").write_text("{")
    with pytest.raises(UserError, match="data.json is damaged"):
        build.restore(tmp_path / "run")


def test_a_resumed_run_keeps_its_words(tmp_path):
    """Captions that were added since would train another tokenizer, in which tokens mean something
    else."""
    pieces = [text.train([f"a {word} dog"], None, 40) for word in ("brown", "green", "green")]
    files = [{"tokenizer.model": one.file, "data.json": b"{}"} for one in pieces]
    kept.save(tmp_path, files[0], resumed=False)
    kept.save(tmp_path, files[1], resumed=False)  # nothing was trained on the first
    kept.save(tmp_path, files[2], resumed=True)
    with pytest.raises(UserError, match="not the tokenizer that the run began with; go on with"):
        kept.save(tmp_path, files[0], resumed=True)
    assert (tmp_path / "tokenizer.model").read_bytes() == files[2]["tokenizer.model"]


@pytest.mark.parametrize("given", ["shapes", "answers", "file", "both"])
def test_names_of_classes_are_kept(given, tmp_path, corpus_of_labels):
    """Of the sets that know them, or of a file; an export names its classes by them."""
    data, wanted = corpus_of_labels(given)
    made = pipeline.make(**data, batch=4, seed=0)
    assert made.labels[: len(wanted)] == wanted
    kept.save(tmp_path, made.keep, resumed=False)
    known = kept.read(tmp_path)
    again = pipeline.reopen(kept.with_own_words(data, known), known, batch=4)
    assert again.labels == made.labels and again.facts == made.facts and again.spec == made.spec


@pytest.fixture
def corpus_of_labels(tmp_path):
    drawn = dict(clips=40, side=32, frames=10, label="shape")
    names = tuple(shapes.ATTRIBUTES["shape"])
    video = dict(frames=2, stride=2, size=16)
    (tmp_path / "v.mp4").write_bytes(b"no video")
    (tmp_path / "list.txt").write_text("v.mp4 1\n")
    (tmp_path / "qa.csv").write_text("path,question,answer\nv.mp4,what,two\nv.mp4,who,one\n")
    (tmp_path / "names.txt").write_text("walk\nto run\n")
    (tmp_path / "answers.txt").write_text("one\ntwo\n")
    root = str(tmp_path)

    def make(given):
        if given == "shapes":
            return dict(kind="shapes", train=drawn, video=video), names
        if given == "answers":
            train = dict(root=root, list=f"{root}/qa.csv", answers=f"{root}/answers.txt")
            train |= dict(caption_column="question", label_column="answer")
            text = dict(TEXT, vocab_size=40)
            return dict(kind="files", train=train, video=video, text=text), ("one", "two")
        plain = dict(list=f"{root}/list.txt", caption_column=None, label_column="label")
        if given == "file":
            train = dict(plain, root=root)
            names_ = ("walk", "to run")
            return dict(kind="files", train=train, video=video, labels=f"{root}/names.txt"), names_
        also = dict(more=dict(train=dict(drawn, kind="shapes"), batch=4))
        train = dict(plain, root=root)
        both = dict(kind="files", train=train, video=video, also=also)
        return both, ("class 0", "class 1", *names)

    return make


def test_a_file_of_too_few_names_is_refused(corpus_of_labels, tmp_path):
    data, _ = corpus_of_labels("file")
    (tmp_path / "names.txt").write_text("walk\n")
    with pytest.raises(UserError, match="names 1 of 2 classes"):
        pipeline.make(**data, batch=4, seed=0)


@pytest.mark.parametrize("decided", [None, True, False])
def test_words_keep_their_spelling(decided, tmp_path):
    """A vocabulary decides whether its words are lower-cased, or a file beside it does."""
    pieces = [*text.SPECIAL, "a", "Dog", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    if decided is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": decided}))
    section = dict(kind="wordpiece", path=str(tmp_path / "vocab.txt"), length=6)
    words = pipeline.words_of(dict(text=section))
    made = dict(pieces=1, labelled=False, classes={"data.train": 0}, labels=())
    (tmp_path / "run").mkdir()
    files = kept.write(words=words, kind="wordpiece", **made)
    kept.save(tmp_path / "run", files, resumed=False)
    known = kept.read(tmp_path / "run")
    again = pipeline.words_of(kept.with_own_words(dict(text=section), known))
    (ids,), _, _ = words.tokenizer.encode(["a Dog"], 6)
    np.testing.assert_array_equal(again.tokenizer.encode(["a Dog"], 6)[0][0], ids)
    assert ids[2] == (pieces.index("dog") if decided else pieces.index("Dog"))
    assert kept.files(tmp_path / "run", known) == files
