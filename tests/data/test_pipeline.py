"""Order, resume, processes, words, views and pieces: batches of mp4 files through tf.data, and of
shapes."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tests.films import ROWS, TEXT, VIDEO, check_equal, make, take
from vtp_jax.data import shapes, text
from vtp_jax.types import UserError, check_batch


def test_batches_follow_the_contract(root):
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


def test_every_clip_comes_once_in_every_epoch(root):
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


def test_a_stream_has_every_row_once_and_its_captions(root, tmp_path):
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


def test_a_stream_of_captions_has_a_row_for_each(corpus):
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


def test_evaluation_has_every_segment_and_crop_as_a_view(root):
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
    (corpus / "val.txt").write_text("train/00000.mp4 7\n")  # a class that training does not have
    more = dict(given, list=str(corpus / "val.txt"), label_column="label")
    further = dict(train=dict(given, label_column="label"), evals=dict(val=more))
    assert make(corpus, text=None, **further).facts["labels"] == 8
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
        (dict(train=dict(clips=4, pieces=2, label="motion")), "has no single label"),
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
