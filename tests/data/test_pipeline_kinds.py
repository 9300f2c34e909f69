"""Kinds of sets: shards, mixtures, files of no config, sections of older runs."""

import collections
import json

import numpy as np
import pytest
from absl import logging

from tests.configs import ROOT, config_files
from tests.films import ROWS, TEXT, VIDEO, check_equal, from_shards, make, mixed, psnr, take
from vtp_jax import evals
from vtp_jax.data import collect, inputs, pipeline, records, shapes, shards, sources, text, workers
from vtp_jax.setup import config
from vtp_jax.types import UserError, check_batch


@pytest.mark.parametrize("repeats", [1, 2])
def test_shards_and_files_give_the_same_clips(corpus, sharded, repeats):
    """The same clips, frames, parts and captions, in training and evaluation."""
    look = dict(video=dict(VIDEO, repeats=repeats, crop="centre", size=32))
    both = [
        make(corpus, evals=dict(val=dict(root=str(corpus), list=f"{corpus}/train.json")), **look),
        from_shards(sharded, evals=dict(val=dict(root=str(sharded))), **look),
    ]
    assert both[0].spec == both[1].spec
    a, b = ([*take(one, 5), *one.streams["val"].batches()] for one in both)
    for old, new in zip(a, b, strict=True):
        assert old.keys() == new.keys()
        for key in old.keys() - {"video"}:
            np.testing.assert_array_equal(old[key], new[key], key)
        for film, again in zip(old["video"], new["video"], strict=True):
            assert not film.any() or psnr(film, again) > 28
    with pytest.raises(UserError, match="data.train: .*it takes root, pieces"):
        from_shards(sharded, train=dict(caption="x"))


@pytest.mark.parametrize("path", config_files())
def test_every_config_takes_shards_by_the_documented_command(path, corpus, sharded, monkeypatch):
    """Its sets have keys that only files take, and no flag removes a key."""
    monkeypatch.chdir(ROOT)
    given = dict(kind="shards", **{"train.root": sharded})
    cfg = config.load(path, [f"--config.data.{k}={value}" for k, value in given.items()]).data
    small = sources.load(corpus, corpus / "train.json")
    monkeypatch.setattr(sources, "load", lambda *_, **__: small)  # what the other sets name
    if "text" in cfg:
        cfg["text"] = TEXT
    if pieces := cfg["train"].get("pieces"):
        with pytest.raises(UserError, match=f"some clips have 1 captions; pieces={pieces}"):
            pipeline.make(**cfg, batch=4, seed=0)
        return
    data = pipeline.make(**cfg, batch=4, seed=0)
    held = [name for name, one in cfg["evals"].items() if one.get("held_out")]
    assert data.rows + sum(data.streams[name].rows for name in held) >= ROWS
    assert data.streams.keys() >= cfg["evals"].keys()


def test_pieces_of_shards_are_those_of_files(corpus, tmp_path):
    said = {f"train/{i:05d}.mp4": ["first it rests", "then it falls"] for i in range(4)}
    (tmp_path / "long.json").write_text(json.dumps(said))
    (task,) = inputs.plan_files(sources.load(corpus, tmp_path / "long.json"), 9)
    form = shards.Form(every=1, quality=95, ratio=0.0)
    shards.begin(tmp_path / "out", [task], form)
    shards.make_shard(task, tmp_path / "out", form)
    shards.finish(tmp_path / "out")
    given = dict(evals={}, video=dict(VIDEO, size=32, crop="centre"))
    train = dict(root=str(corpus), list=str(tmp_path / "long.json"), pieces=2)
    (a,) = take(make(corpus, train=train, **given), 1)
    (b,) = take(make(kind="shards", train=train | dict(root=str(tmp_path / "out")), **given), 1)
    np.testing.assert_array_equal(a["text"], b["text"])
    assert a["video"].shape == b["video"].shape and psnr(a["video"], b["video"]) > 28
    with pytest.raises(UserError, match="has 2 captions, but pieces=3"):
        collect.choose_captions(records.Shards(tmp_path / "out")[0], 3, 0, 0, 0)


@pytest.mark.parametrize(
    "more",
    [
        {},
        dict(text=None),
        dict(video=dict(VIDEO, views=(2, 1))),
        dict(evals=dict(val=dict(clips=5, side=32, frames=10, label="colour")), eval_batch=3),
        dict(
            train=dict(clips=8, side=32, frames=10, pieces=2),
            evals=dict(val=dict(clips=5, side=32, frames=10, pieces=2)),
        ),
        "files",
        "shards",
    ],
    ids=str,
)
def test_evaluation_streams_tell_what_their_batches_are_like(more, corpus, sharded):
    """So that evaluators are checked without a batch being decoded."""
    if more == "files":
        data = make(corpus)
    elif more == "shards":
        data = from_shards(sharded, evals=dict(val=dict(root=str(sharded))))
    else:
        data = make(**more)
    told = {name: one.spec for name, one in data.streams.items()}
    read = {name: one._replace(spec=None) for name, one in data.streams.items()}
    assert told == {name: evals.structure("mean", read, name) for name in told} != {}


def test_each_record_is_read_once_for_a_row(sharded, monkeypatch):
    """Pixels, captions and label come from one reading; the captions' stream reads no record."""
    reads, real = collections.Counter(), records.Shard.header

    def header(shard, index):
        reads[shard.path, index] += 1
        return real(shard, index)

    monkeypatch.setattr(records.Shard, "header", header)
    monkeypatch.setattr(pipeline, "run_tfdata", workers.run_here)  # which makes none ahead
    data = from_shards(sharded, evals=dict(val=dict(root=str(sharded))), text=TEXT)
    passes = dict(
        train=lambda: take(data, 3),  # an epoch
        video=lambda: list(data.streams["val"].batches()),
        captions=lambda: list(data.streams["val/captions"].batches()),
    )
    for name, run in passes.items():
        reads.clear()
        assert sum(int(batch["valid"].sum()) for batch in run()) >= ROWS
        assert set(reads.values()) <= {1} and len(reads) == (0 if name == "captions" else ROWS)


# Files of no config.


@pytest.mark.parametrize("kind", ["files", "shards", "sets", "mix", "also", "shapes"])
def test_files_of_no_config_become_streams_for_any_kind(kind, corpus, sharded, tmp_path):
    """By the config's own look, without its test views, and in its own words."""
    files, drawn = dict(root=str(corpus), list=str(corpus / "train.json")), dict(clips=9, side=32)
    train = dict(
        files=files,
        shards=dict(root=str(sharded)),
        sets=dict(set="ucf101", split="train_1", root=str(tmp_path)),
        mix=dict(mix=dict(a=dict(files), b=dict(drawn, kind="shapes"))),
        also=files,
        shapes=drawn,
    )
    video = corpus / "val/00000.mp4"
    (tmp_path / "PurpleDisc").mkdir()
    (tmp_path / "PurpleDisc/v.mp4").write_bytes(video.read_bytes())
    (tmp_path / "classInd.txt").write_text("1 PurpleDisc\n")
    (tmp_path / "trainlist01.txt").write_text("PurpleDisc/v.mp4 1\n")
    cfg = dict(kind=kind, train=train[kind], video=dict(VIDEO, views=(2, 3)), text=TEXT)
    if kind in ("mix", "also"):
        cfg["kind"] = "files"
    if kind == "also":
        cfg["also"] = dict(more=dict(train=dict(drawn, kind="shapes"), batch=2))
    told = ["purple disc", "disc"]
    streams = pipeline.given(cfg, [video, corpus / "val/00001.mp4"], told, at_once=8, ways=4)
    (batch,), (words,) = (list(stream.batches()) for stream in streams.values())
    check_batch(batch), check_batch(words)
    assert list(streams) == ["given", "given/captions"]
    assert batch["valid"].tolist() == words["valid"].tolist() == [True, True, False, False]
    wanted = next(make(corpus).streams["val"].batches())["video"][:2]
    np.testing.assert_array_equal(batch["video"][:2], wanted)
    own = pipeline.make(**cfg, batch=4, seed=0)
    np.testing.assert_array_equal(batch["text"], words["text"])
    assert own.decode(words["text"][:2]) == told and streams["given"].rows == 2
    path = str(tmp_path / "spm.model")
    text.train([*told, *told], path, 40)
    gone = dict(cfg, train=dict(root="gone"), text=dict(TEXT, path=path))  # a kept tokenizer
    assert pipeline.given(gone, [video], None)["given"].rows == 1


def test_two_then_three_then_one_process_across_restarts_read_one_sequence(sharded):
    """Together they make what one process makes in one run: ids, words and pixels."""

    def run(count, first, steps):
        parts = [take(from_shards(sharded, batch=6, process=(i, count)), steps, first)
                 for i in range(count)]  # fmt: skip
        return [{k: np.concatenate([p[k] for p in row]) for k in row[0]}
                for row in zip(*parts, strict=True)]  # fmt: skip

    whole = run(1, 0, 6)
    for a, b in zip(whole, run(2, 0, 2) + run(3, 2, 2) + run(1, 4, 2), strict=True):
        check_equal(a, b)


def test_a_stride_between_stored_frames_is_rejected(corpus, tmp_path):
    (task,) = inputs.plan_files(sources.load(corpus, corpus / "val.csv"), 9)
    form = shards.Form(every=4)
    shards.begin(tmp_path, [task], form)
    shards.make_shard(task, tmp_path, form)
    shards.finish(tmp_path)
    with pytest.raises(UserError, match="frames 6 apart.*every 4th.*--every 2"):
        from_shards(tmp_path, video=dict(frames=4, stride=6, size=32))
    from_shards(tmp_path, video=dict(frames=1, stride=1, size=32))  # an image
    assert from_shards(tmp_path, video=dict(frames=2, stride=4, size=32)).rows == 5


def test_tfds_becomes_shards(tmp_path):
    """A set on disk, without the code that made it, in shards of three."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Films(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = dict(film=tfds.features.Video(shape=(None, 32, 32, 3)), label=np.int64)
            features |= dict(text=tfds.features.Text(), name=tfds.features.Text())
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return dict(train=self._generate_examples())

        def _generate_examples(self):
            for k in range(5):
                film = np.full((8, 32, 32, 3), 40 * k, np.uint8)
                yield k, dict(film=film, label=k, text=f"level {k}", name=f"n{k}")

    Films(data_dir=str(tmp_path / "tfds")).download_and_prepare()
    name = str(tmp_path / "tfds")
    columns = ("film", "text", "label", "name")
    tasks = inputs.plan_tfds("films", "train", name, 3, columns, "there", "CC0")
    form, out = shards.Form(every=2), tmp_path / "out"
    for task in shards.begin(out, tasks, form):
        shards.make_shard(task, out, form)
    assert [task.count for task in tasks] == [3, 2] and shards.finish(out)["classes"] == 5
    clips = records.Shards(out)
    assert sorted(clip.label for clip in clips) == list(range(5))
    for number, clip in enumerate(clips):
        k = clip.label
        assert (clip.path, clip.captions) == (f"n{k}", (f"level {k}",))
        assert np.abs(clips.open(number).read(np.arange).astype(int) - 40 * k).max() < 4
    with pytest.raises(UserError, match="no feature 'video'; it has"):
        inputs.plan_tfds("films", "train", name, 3, ("video", "", "", ""), "", "")
    with pytest.raises(UserError, match="TFDS: "):
        inputs.plan_tfds("absent", "train", name, 3, columns, "", "")


def test_keys_of_older_runs_are_read_and_reported(corpus, monkeypatch):
    """`captions` is now `list`, at any depth; a config with both names is rejected."""
    old = {"root": str(corpus), "captions": str(corpus / "train.json")}
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    data = make(corpus, train=dict(mix=dict(a=old)), evals=dict(val=old))
    assert data.rows == ROWS and data.streams["val"].rows == ROWS
    assert [x.partition(":")[0] for x in lines] == ["data.train.mix.a", "data.evals.val"]
    assert all("'captions' is now called 'list'" in x for x in lines)
    with pytest.raises(UserError, match="data.train: 'captions' is the old name of 'list'"):
        make(corpus, train=dict(old, list=old["captions"]))


# Mixtures.


def test_sets_are_mixed_by_weight_each_with_its_own_epochs(corpus):
    data = mixed(corpus)
    assert data.rows == ROWS + 7
    ids = np.concatenate([b["id"] for b in take(data, 40)])
    files, drawn = ids[ids < ROWS], ids[ids >= ROWS] - ROWS
    assert 100 < len(files) < 140 and len(files) + len(drawn) == 160
    for own, count in ((files, ROWS), (drawn, 7)):
        for epoch in own[: len(own) // count * count].reshape(-1, count):
            assert sorted(epoch) == list(range(count))


def test_rows_of_a_mixture_are_those_of_its_sets(corpus):
    """Captions and pixels of both, any step first, any number of processes."""
    data, alone = mixed(corpus, video=dict(VIDEO, size=32, crop="centre")), shapes.Plan(side=32)
    told = [clip.captions for clip in sources.load(corpus, corpus / "train.json").clips]
    told += [clip.captions for clip in shapes.source(alone._replace(train=7), "train").clips]
    batches = take(data, 12)
    for batch in batches:
        assert batch["valid"].all()
        for index, words, pixels in zip(
            batch["id"], data.decode(batch["text"]), batch["video"], strict=True
        ):
            assert words in told[index]
            if index >= ROWS:
                film = shapes.read(alone._replace(frames=10), "train", int(index) - ROWS)
                assert (pixels[0] == film).all(axis=(1, 2, 3)).any()
    again = dict(video=dict(VIDEO, size=32, crop="centre"))
    parts = [mixed(corpus, process=(i, 2), **again) for i in range(2)]
    for batch, *shares in zip(batches[7:9], *(take(p, 2, 7) for p in parts), strict=True):
        check_equal(batch, {k: np.concatenate([s[k] for s in shares]) for k in batch})
