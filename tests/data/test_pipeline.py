"""Order, resume, processes, failures: batches of real mp4 files through tf.data, and of shapes."""

import collections
import contextlib
import itertools
import json
import re
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from absl import logging

from tests import worn
from tests.configs import ROOT, config_files
from vtp_jax.data import (
    collect,
    inputs,
    pipeline,
    records,
    shapes,
    shards,
    sources,
    text,
    workers,
)
from vtp_jax.run import sharding
from vtp_jax.setup import config
from vtp_jax.types import UserError, check_batch

ROWS = 12
VIDEO = dict(frames=4, stride=2, size=24)
TEXT = dict(kind="sentencepiece", length=48)
BAD = {3: ("missing", None), 7: ("not_a_video", b"no"), 8: ("not_a_video", b"no")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small corpus of mp4 files; clip 1 has three captions."""
    root = tmp_path_factory.mktemp("corpus")
    shapes.write(root, shapes.Plan(train=ROWS, val=5, side=32, frames=10), workers=1)
    source = shapes.source(shapes.Plan(train=ROWS), "train")
    captions = {clip.path: list(clip.captions) for clip in source.clips}
    captions["train/00001.mp4"] += ["a second caption", "a third"]
    (root / "train.json").write_text(json.dumps(captions))
    return root


@pytest.fixture(scope="module")
def broken(corpus, tmp_path_factory):
    """The same corpus with three unreadable videos."""
    root = tmp_path_factory.mktemp("broken")
    for path in [*corpus.glob("*/*.mp4"), *corpus.glob("*.*s*")]:
        (root / path.relative_to(corpus)).parent.mkdir(exist_ok=True)
        (root / path.relative_to(corpus)).write_bytes(path.read_bytes())
    for index, (_, content) in BAD.items():
        path = root / f"train/{index:05d}.mp4"
        path.unlink() if content is None else path.write_bytes(content)
    return root


def make(root=None, **changes):
    """Data of the files under `root`, or of shapes drawn in memory."""
    given = dict(batch=4, seed=0, video=VIDEO, text=TEXT, workers=2)
    if root is None:
        given |= dict(kind="shapes", train=dict(clips=ROWS, side=32, frames=10))
        given |= dict(evals=dict(val=dict(clips=5, side=32, frames=10)))
    else:
        given |= dict(kind="files", train=dict(root=str(root), list=str(root / "train.json")))
        given |= dict(evals=dict(val=dict(root=str(root), list=str(root / "val.csv"))))
    return pipeline.make(**(given | changes))


def take(data, count, first=0):
    return list(itertools.islice(data.batches(first), count))


def check_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], key)


@pytest.fixture(params=["files", "shapes"])
def root(request, corpus):
    return corpus if request.param == "files" else None


def test_batches_are_what_the_contract_says(root):
    data = make(root)
    check_batch(data.spec)
    (batch,) = take(data, 1)
    check_batch(batch)
    assert batch.keys() == data.spec.keys()
    for key, spec in data.spec.items():
        assert (batch[key].shape, batch[key].dtype) == (spec.shape, spec.dtype)
    assert data.rows == ROWS and batch["valid"].all() and batch["video"].any()
    assert data.facts["vocab_size"] > batch["text"].max() and len(data.facts["mean"]) == 3
    assert all(isinstance(words, str) and words for words in data.decode(batch["text"]))


def test_every_clip_once_in_every_epoch(root):
    """Batches of 5 continue over the ends of epochs of 12."""
    ids = np.concatenate([b["id"] for b in take(make(root, batch=5), 12)])
    epochs = ids.reshape(5, ROWS)
    for epoch in epochs:
        assert sorted(epoch) == list(range(ROWS))
    assert len({tuple(epoch) for epoch in epochs}) == 5  # and each in an order of its own


def test_captions_belong_to_their_clips(corpus):
    data = make(corpus)
    captions = json.loads((corpus / "train.json").read_text())
    texts = list(captions.values())
    told = set()
    for batch in take(data, 30):
        for index, words in zip(batch["id"], data.decode(batch["text"]), strict=True):
            assert words in texts[index]
            told.add((int(index), words))
    assert {words for index, words in told if index == 1} == set(texts[1])


def test_any_step_can_be_the_first(root):
    batches = take(make(root, batch=5, video=dict(VIDEO, crop="multiscale")), 6)
    for first in (1, 4):
        for a, b in zip(batches[first:], take(make(root, batch=5), 2, first), strict=False):
            check_equal(a, b)


def test_workers_change_nothing(corpus):
    for a, b in zip(
        take(make(corpus, workers=1), 4), take(make(corpus, workers=5), 4), strict=True
    ):
        check_equal(a, b)


def test_seeds_and_epochs_differ(root):
    """The same clip is seen differently in another epoch and under another seed."""
    by_seed = []
    for seed in (0, 1):
        seen = {}
        for batch in take(make(root, seed=seed), 6):  # two epochs
            for index, pixels in zip(batch["id"], batch["video"], strict=True):
                seen.setdefault(int(index), []).append(pixels)
        assert sum((a != b).any() for a, b in seen.values()) > ROWS // 2
        by_seed.append(seen)
    assert sum((by_seed[0][i][0] != by_seed[1][i][0]).any() for i in range(ROWS)) > ROWS // 2


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_give_the_global_rows(root, count):
    parts = [make(root, process=(i, count)) for i in range(count)]
    whole = make(root)
    for batch, *shares in zip(take(whole, 3, 2), *(take(p, 3, 2) for p in parts), strict=True):
        check_equal(batch, {k: np.concatenate([s[k] for s in shares]) for k in batch})
    for name, stream in whole.streams.items():
        shares = [list(p.streams[name].batches()) for p in parts]
        for batch, *rows in zip(stream.batches(), *shares, strict=True):
            check_equal(batch, {k: np.concatenate([r[k] for r in rows]) for k in batch})


def test_streams(root, tmp_path):
    letters = [clip.captions[0] for clip in shapes.source(shapes.Plan(), "train").clips]
    text.train(letters, tmp_path / "spm.model", 200)
    data = make(root, eval_batch=3, text=dict(TEXT, path=str(tmp_path / "spm.model")))
    assert set(data.streams) == {"val", "val/captions"}
    stream = data.streams["val"]
    batches = list(stream.batches())
    for batch in batches:
        check_batch(batch)
        assert batch["valid"].shape == (3,)
    ids = np.concatenate([b["id"][b["valid"]] for b in batches])
    assert ids.tolist() == list(range(5)) and stream.rows == 5
    (first, last) = batches
    assert not last["video"][~last["valid"]].any()
    assert data.decode(first["text"]) == [stream.table["caption"][i] for i in first["id"]]
    for a, b in zip(batches, stream.batches(), strict=True):
        check_equal(a, b)


def test_stream_of_captions_has_a_row_for_each(corpus):
    evals = dict(many=dict(root=str(corpus), list=str(corpus / "train.json")))
    data = make(corpus, evals=evals)
    stream = data.streams["many/captions"]
    rows = [
        (int(i), words)
        for batch in stream.batches()
        for i, words, valid in zip(
            batch["id"], data.decode(batch["text"]), batch["valid"], strict=True
        )
        if valid and check_batch(batch) is None
    ]
    assert stream.rows == len(rows) == ROWS + 2
    assert rows == [(i, c) for i, many in enumerate(stream.table["captions"]) for c in many]


def test_views(root):
    data = make(root, video=dict(VIDEO, views=(2, 3)))
    for batch in data.streams["val"].batches():
        check_batch(batch)
        assert batch["video"].shape == (4, 6, 4, 24, 24, 3)
        # Square pictures leave no room to the sides: crops are alike, segments are not.
        views = batch["video"][batch["valid"]].reshape(-1, 2, 3, 4, 24, 24, 3)
        np.testing.assert_array_equal(views[:, :, 0], views[:, :, 2])
        assert (views[:, 0] != views[:, 1]).any()


def test_segments_cover_the_whole_video():
    """Ten frames in four parts, whatever the stride."""
    look = dict(frames=4, stride=1, size=32, crop="centre", sampling="segments")
    plan = shapes.Plan(train=ROWS, val=5, side=32, frames=10)
    numbers = set()
    for batch in take(make(video=look), 9):
        for i, clip in zip(batch["id"], batch["video"], strict=True):
            film = shapes.read(plan, "train", int(i))
            for part, frame in enumerate(clip):
                same = [n for n in range(10) if (film[n] == frame).all()]
                assert {2 * part, 2 * part + 1} & set(same)
                numbers |= set(same) if len(same) == 1 else set()
    assert len(numbers) == 8  # two of each part; the last two of ten are in none
    wanted = {None: [[1, 3, 6, 8]], (2, 1): [[0, 2, 5, 7], [1, 3, 6, 8]]}
    for views, clips in wanted.items():
        (batch, *_) = make(video=dict(look, views=views)).streams["val"].batches()
        for i, video in zip(batch["id"], batch["video"], strict=True):
            film = shapes.read(plan, "val", int(i))
            shown = video.reshape(-1, *film.shape[1:])
            np.testing.assert_array_equal(shown, np.concatenate([film[c] for c in clips]))


# Shards.


@pytest.fixture(scope="module")
def sharded(corpus, tmp_path_factory):
    """The same corpus as shards of five clips each, all frames at high quality."""
    out = tmp_path_factory.mktemp("sharded")
    clips = sources.load(corpus, corpus / "train.json")
    tasks, form = inputs.plan_files(clips, 5), shards.Form(every=1, quality=95, ratio=0.0)
    for task in shards.begin(out, tasks, form):
        shards.make_shard(task, out, form)
    shards.finish(out)
    return out


def from_shards(root, **more):
    return make(root, **{**dict(kind="shards", train=dict(root=str(root)), evals={}), **more})


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.mark.parametrize("repeats", [1, 2])
def test_shards_show_what_files_show(corpus, sharded, repeats):
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
    assert data.rows >= ROWS and data.streams.keys() >= cfg["evals"].keys()


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
    with pytest.raises(UserError, match="has 2 captions, of pieces=3"):
        collect.choose_captions(records.Shards(tmp_path / "out")[0], 3, 0, 0, 0)


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


def test_two_then_three_then_one_process_across_restarts(sharded):
    """Together they make what one process makes in one run: ids, words and pixels."""

    def run(count, first, steps):
        parts = [take(from_shards(sharded, batch=6, process=(i, count)), steps, first)
                 for i in range(count)]  # fmt: skip
        return [{k: np.concatenate([p[k] for p in row]) for k in row[0]}
                for row in zip(*parts, strict=True)]  # fmt: skip

    whole = run(1, 0, 6)
    for a, b in zip(whole, run(2, 0, 2) + run(3, 2, 2) + run(1, 4, 2), strict=True):
        check_equal(a, b)


def test_a_stride_between_stored_frames_is_refused(corpus, tmp_path):
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


# A worn corpus.


@pytest.fixture(scope="module", params=["files", "shards"])
def worn_corpus(request, tmp_path_factory):
    """Its kind, its section of a config, and {unreadable clip: cause}."""
    root = tmp_path_factory.mktemp("worn")
    if request.param == "shards":
        return "shards", dict(root=str(worn.write_shards(root, side=32, frames=8))), worn.SHARDS
    worn.write(root, side=32, frames=8)
    given = dict(root=str(root), list=str(root / "train.csv"), max_absent=0.05)
    return "files", given, worn.DAMAGE


def test_counts_of_a_worn_corpus_are_exact(worn_corpus):
    """Files with the default limit, which is the same share: chance alone does not stop a run."""
    kind, train, bad = worn_corpus
    limit = {} if kind == "files" else dict(max_failed=0.2)
    words = dict(TEXT, vocab_size=200)

    def run():
        data = make(kind=kind, train=train, evals=dict(val=train), batch=16, text=words, **limit)
        wrong = [[int(i) for batch in batches for i in batch["id"][~batch["valid"]]]
                 for batches in (take(data, 20), data.streams["val"].batches())]  # fmt: skip
        told = [i for b in data.streams["val/captions"].batches() for i in b["id"][b["valid"]]]
        return data.counts(20), *map(sorted, wrong), told

    counts, trained, shown, told = run()  # two epochs
    assert trained == sorted([*bad] * 2) and shown == sorted(bad)
    causes = {f"failed/{k}": 2 * n for k, n in collections.Counter(bad.values()).items()}
    assert counts == dict(rows=2 * worn.CLIPS, failed=2 * len(bad), **causes)
    # A header is still read where only frames are damaged.
    untold = set() if kind == "files" else set(bad) - {44}
    assert told == [i for i in range(worn.CLIPS) if i not in untold]
    assert run() == (counts, trained, shown, told)


def test_damaged_shards_are_named_in_the_log(worn_corpus, caplog):
    """And the run stops with a one-line error where they are too many."""
    kind, train, bad = worn_corpus
    with caplog.at_level("WARNING", logger="absl"), pytest.raises(UserError, match="max_failed"):
        take(make(kind=kind, train=train, evals={}, batch=16, max_failed=0.01), 30)
    named = [r.getMessage() for r in caplog.records if "unreadable" in r.getMessage()]
    assert named and len(named) <= len(bad) and all("\n" not in line for line in named)
    if kind == "shards":
        assert any(re.search(r"clip \d+ \(.*\.shard.*\): (missing|damaged)", x) for x in named)


def test_a_mixture_continues_over_damaged_shards(worn_corpus):
    kind, train, bad = worn_corpus
    drawn = dict(kind="shapes", clips=40, side=32, frames=8)
    data = make(kind=kind, train=dict(mix=dict(drawn=drawn, worn=dict(train, weight=4))),
                evals={}, batch=16, max_failed=0.2)  # fmt: skip
    wrong = {int(i) - 40 for batch in take(data, 13) for i in batch["id"][~batch["valid"]]}
    assert wrong == set(bad)


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


def mixed(root, **more):
    """The files, three times as often as shapes drawn in memory."""
    files = dict(root=str(root), list=str(root / "train.json"), weight=3.0)
    drawn = dict(kind="shapes", clips=7, side=32, frames=10)
    return make(root, train=dict(mix=dict(files=files, drawn=drawn)), **more)


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


# Unreadable videos.


def test_unreadable_rows_keep_their_places(corpus, broken):
    good = take(make(corpus), 9)
    data = make(broken, train=broken_train(broken), max_failed=1.0)
    for a, b in zip(good, take(data, 9), strict=True):
        np.testing.assert_array_equal(b["valid"], ~np.isin(b["id"], list(BAD)))
        assert not b["video"][~b["valid"]].any()
        np.testing.assert_array_equal(a["video"][b["valid"]], b["video"][b["valid"]])
        for key in ("id", "text", "text_mask", "maskable"):
            np.testing.assert_array_equal(a[key], b[key])


def broken_train(root, **more):
    return dict(root=str(root), list=str(root / "train.json"), max_absent=0.1, **more)


def test_counts_are_exact_for_the_batches_that_were_used(broken):
    """However far ahead batches are made; and each name is in the log once."""
    data = make(broken, train=broken_train(broken), max_failed=1.0)
    batches, seen, failed = sharding.prefetch(data.batches(2), lambda batch: batch), 0, {}
    for step in range(2, 10):
        batch = next(batches)
        seen += 4
        for index in batch["id"][~batch["valid"]]:
            cause = BAD[int(index)][0]
            failed[f"failed/{cause}"] = failed.get(f"failed/{cause}", 0) + 1
        time.sleep(0.01)  # others are made meanwhile
        assert data.counts(step + 1) == dict(rows=seen, failed=sum(failed.values()), **failed)
    batches.close()
    assert failed.keys() == {"failed/missing", "failed/not_a_video"}
    assert data.counts(10) == make_counts(broken, 8)


def make_counts(root, count):
    data = make(root, train=broken_train(root), max_failed=1.0)
    take(data, count, 2)
    return data.counts(2 + count)


def test_failures_are_named_once(broken, caplog):
    data = make(broken, train=broken_train(broken), max_failed=1.0)
    with caplog.at_level("WARNING", logger="absl"):
        take(data, 9)
    named = [r.getMessage() for r in caplog.records if "unreadable" in r.getMessage()]
    assert len(named) == len(BAD)
    for index, (cause, _) in BAD.items():
        assert sum(f"train/{index:05d}.mp4: {cause}" in line for line in named) == 1


def test_too_many_failures_stop_the_run(broken):
    """3 of 12 fail: allowed at 30 %, not at 24 %, and judged after the first epoch."""
    take(make(broken, train=broken_train(broken), max_failed=0.3), 9)
    batches = make(broken, train=broken_train(broken), max_failed=0.24).batches(0)
    next(batches), next(batches)
    told = r"3 of 12 rows cannot be read \(2 not_a_video, 1 missing\).*max_failed=0.24.*train/0000"
    with pytest.raises(UserError, match=told) as caught:
        next(batches)
    assert "\n" not in str(caught.value)


def test_too_many_of_a_large_corpus_stop_a_run_soon():
    """Long before as many clips have failed as may; and chance does not."""
    clips = tuple(sources.Clip(f"{k}", ()) for k in range(100_000))
    causes = np.where(np.arange(100_000) % 50 == 0, 0, collect.GOOD)
    for share, stops in ((0.02, False), (0.01, True)):
        ledger = collect.Ledger(sources.Source("", clips), share)
        told = contextlib.nullcontext() if not stops else pytest.raises(UserError, match="rows")
        with told:
            for start in range(0, 100_000, 500):
                some = slice(start, start + 500)
                ledger.enter(start, np.arange(100_000)[some], causes[some], clips[some])
        assert ledger.rows == (100_000 if not stops else ledger.rows) and ledger.rows > 100
        assert not stops or ledger.rows < 5000


def test_unreadable_in_a_stream(broken):
    evals = dict(val=broken_train(broken))
    (stream, captions) = make(broken, train=broken_train(broken), evals=evals).streams.values()
    ids = [i for b in stream.batches() for i in b["id"][b["valid"]]]
    assert ids == [i for i in range(ROWS) if i not in BAD] and stream.rows == ROWS
    assert sum(int(b["valid"].sum()) for b in captions.batches()) == ROWS + 2


def test_a_bug_is_not_taken_for_an_unreadable_video(monkeypatch):
    def fail(*_):
        raise KeyError("a mistake")

    monkeypatch.setattr(shapes, "read", fail)
    with pytest.raises(KeyError, match="a mistake"):
        take(make(), 1)


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(kind="webdataset"), "data.train: kind='webdataset'.*files, shards"),
        (dict(batch=6, process=(0, 4)), "data.batch=6 does not divide over 4 processes"),
        (dict(eval_batch=6, process=(0, 4)), "data.eval_batch=6 does not divide"),
        (dict(video=dict(frame=4)), "data.video: .*'frame.*it takes frames, stride, size"),
        (
            dict(video=dict(VIDEO, sampling="sparse")),
            "sampling='sparse'; known: windows, segments",
        ),
        (
            dict(video=dict(VIDEO, crop="random")),
            "crop='random'.*known: multiscale",
        ),
        (dict(train=dict(clip=3)), "data.train: .*it takes clips, side"),
        (dict(train=dict(mix=dict(a=dict(clip=3)))), "data.train.mix.a: .*it takes clips, side"),
        (dict(train=dict(mix={}, clips=3)), "data.train.mix takes sets by name"),
        (dict(evals=dict(v=dict(clip=3))), "data.evals.v: .*it takes clips, side"),
        (dict(text=dict(kind="wordpiece", length=8)), "'wordpiece' needs a path"),
        (dict(text=dict(kind="sentencepiece", length=2)), "length=2 holds no word"),
        (dict(text=dict(TEXT, path="no.model")), "no SentencePiece model 'no.model'"),
    ],
)
def test_errors_of_one_line(changes, told):
    with pytest.raises(UserError, match=told) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)


# TensorFlow.


def test_without_text_there_are_no_captions(corpus):
    table = "".join(f"train/{i:05d}.mp4 {i % 3}\n" for i in range(ROWS))
    (corpus / "list.txt").write_text(table)
    given = dict(root=str(corpus), list=str(corpus / "list.txt"), caption_column=None)
    data = make(corpus, text=None, train=given, evals=dict(val=given))
    assert set(data.spec) == {"video", "id", "valid"} and set(data.streams) == {"val"}
    assert set(data.facts) == {"mean", "std", "labels"} and data.facts["labels"] == 0
    check_batch(next(data.batches(0)))
    assert set(next(data.streams["val"].batches())) == set(data.spec)
    with pytest.raises(UserError, match="data.train has no captions to read"):
        make(corpus, train=given)
    labelled = make(corpus, text=None, train=dict(given, label_column="label"))
    assert labelled.facts["labels"] == 3
    for batch in take(labelled, 3):
        check_batch(batch)
        np.testing.assert_array_equal(batch["label"], batch["id"] % 3)


def test_labels_of_shapes_are_those_of_their_captions():
    train = dict(clips=ROWS, side=32, frames=10, label="shape")
    data = make(train=train, evals=dict(val=dict(train, clips=5)))
    names = list(shapes.SHAPES)
    for batch in take(data, 3):
        assert batch["label"].dtype == data.spec["label"].dtype == np.int32
        for index, label in zip(batch["id"], batch["label"], strict=True):
            assert names[label] == shapes.describe(0, "train", int(index))[0].shape
    for batch in data.streams["val"].batches():
        assert ((batch["label"] >= 0) == batch["valid"]).all()
    with pytest.raises(UserError, match="no attribute 'form'; known: colour, shape"):
        make(train=dict(train, label="form"))


@pytest.mark.parametrize("crop", ["multiscale", "resized"])
def test_repeats_are_crops_of_one_decoded_clip(root, crop):
    once = make(root, video=dict(VIDEO, crop=crop))
    data = make(root, video=dict(VIDEO, crop=crop, repeats=3))
    assert data.spec["video"].shape == (4, 3, 4, 24, 24, 3)
    (a,), (b,) = take(once, 1), take(data, 1)
    check_batch(b)
    np.testing.assert_array_equal(a["video"], b["video"][:, 0])  # the first is as without
    assert all((b["video"][:, 0] != b["video"][:, i]).any() for i in (1, 2))
    (again,) = take(make(root, video=dict(VIDEO, crop=crop, repeats=3)), 1)
    check_equal(b, again)
    assert next(data.streams["val"].batches())["video"].ndim == 5  # evaluation knows no repeats


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )


def long_videos(**changes):
    """Rows of three clips in order, drawn in memory."""
    long = dict(clips=5, side=32, frames=10, pieces=3)
    given = dict(train=long, evals=dict(val=long), video={**VIDEO, "size": 32, "crop": "centre"})
    return make(**(given | changes))


def test_pieces_of_a_longer_video_are_in_order_with_their_texts():
    data = long_videos()
    plan = shapes.Plan(side=32, frames=10)
    check_batch(data.spec)
    assert data.rows == 5 and data.spec["video"].shape == (4, 3, 4, 32, 32, 3)
    val = data.streams["val"].batches()
    for split, batch in [*(("train", x) for x in take(data, 2)), *(("val", x) for x in val)]:
        check_batch(batch)
        assert {k: x.shape for k, x in batch.items()} == {k: x.shape for k, x in data.spec.items()}
        for row in np.flatnonzero(batch["valid"]):
            told = data.decode(batch["text"][row])
            for j, clip in enumerate(batch["video"][row]):
                index = 3 * int(batch["id"][row]) + j
                drawn = shapes.read(plan, split, index)
                assert all((frame == drawn).all(axis=(1, 2, 3)).any() for frame in clip)
                assert told[j] == shapes.describe(0, split, index)[1]


def test_pieces_of_files_need_a_caption_each(corpus, tmp_path):
    captions = tmp_path / "long.json"
    train = dict(root=str(corpus), list=str(captions), pieces=2)
    said = ["first it rests", "then it falls"]
    captions.write_text(json.dumps({f"train/0000{i}.mp4": said for i in range(3)}))
    data = make(corpus, train=train, batch=3)
    (batch,) = take(data, 1)
    assert batch["video"].shape == (3, 2, 4, 24, 24, 3) and batch["text"].shape[:2] == (3, 2)
    assert data.decode(batch["text"][2]) == said
    captions.write_text(json.dumps({"train/00000.mp4": said, "train/00001.mp4": said[:1]}))
    with pytest.raises(UserError, match="'train/00001.mp4' has 1 captions; pieces=2"):
        make(corpus, train=train)


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(train=dict(clips=4, pieces=2, label="motion")), "has no one label"),
        (dict(video=dict(VIDEO, repeats=2)), "data.train.pieces=3 and data.video.repeats"),
        (dict(video=dict(VIDEO, views=(1, 1))), "data.evals.val.pieces=3 and data.video.views"),
    ],
)
def test_pieces_are_not_mixed_with_other_clips_of_a_video(changes, told):
    with pytest.raises(UserError, match=told):
        long_videos(**changes)


def test_shapes_need_no_tensorflow():
    """Everything imports, and data drawn in memory flows, where TensorFlow cannot be imported."""
    done = run_python(
        """
        import sys
        sys.modules["tensorflow"] = None
        from vtp_jax.data import ops, pipeline, shapes, sources, text, video
        import vtp_jax.prepare
        data = pipeline.make(
            kind="shapes", batch=2, seed=0, train=dict(clips=8), evals=dict(val=dict(clips=2)),
            video=dict(frames=2, stride=2, size=16), text=dict(kind="sentencepiece", length=8),
        )
        print(next(data.batches(0))["video"].shape, len(list(data.streams["val"].batches())))
        """
    )
    assert done.stdout.strip() == "(2, 2, 16, 16, 3) 1", done.stderr


def test_a_process_ends_while_tensorflow_reads_ahead(corpus):
    """And TensorFlow sees no accelerator."""
    done = run_python(
        f"""
        from vtp_jax.data import pipeline
        root = {str(corpus)!r}
        data = pipeline.make(
            kind="files", batch=4, seed=0, train=dict(root=root, list=root + "/train.json"),
            video=dict(frames=2, stride=2, size=16), text=dict(kind="sentencepiece", length=8),
        )
        batches = data.batches(0)
        next(batches)
        import tensorflow as tf
        assert not tf.config.get_visible_devices("GPU")
        print("end")
        """
    )
    assert done.returncode == 0 and done.stdout.strip() == "end", done.stderr
