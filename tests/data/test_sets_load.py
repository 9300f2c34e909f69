"""From a set's files to a source, and what is missing."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from vtp_jax.data import open as opening
from vtp_jax.data import sets, shapes, sources
from vtp_jax.data.sets import __main__ as entry
from vtp_jax.types import UserError

QUESTIONS = [
    dict(answer=answer, id=n, question=f"q{n}", video_id=n % 2, category_id=0)
    for n, answer in enumerate(["dog", "cat", "ant", "cat", "dog", "bee"])
]


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def jsfusion(folder, *names):
    rows = [f"ret{n},msr{n},{name},sentence {n}\n" for n, name in enumerate(names)]
    table = "".join(["key,vid_key,video_id,sentence\n", *rows])
    (folder / "MSRVTT_JSFUSION_test.csv").write_text(table)


def test_files_are_found_wherever_and_whatever_their_suffix(tmp_path):
    touch(
        tmp_path, "a/b/video7.webm", "video7.mp4", "c/video7.mp4", "1004_Juno_00.58.46.362.avi",
        "x.GIF", "j_60.0_210.0.mp4", "lists/train.json", "other/train.json", "wave/w.avi",
        "run/w.avi",
    )  # fmt: skip
    folder = sets.Folder(tmp_path)
    assert folder.find(["video7"]) == "video7.mp4"  # the least deep
    assert folder.find(["c/video7.avi"]) == "c/video7.mp4"  # in the folder named
    assert folder.find(["videos/wave/w.avi"]) == "wave/w.avi"
    assert folder.find(["absent", "b/video7"]) == "a/b/video7.webm"  # names in turn
    assert folder.find(["1004_Juno_00.58.46.362"]) == "1004_Juno_00.58.46.362.avi"
    assert folder.find(["j_60.0_210.0"]) == "j_60.0_210.0.mp4" and folder.find(["x"]) == "x.GIF"
    assert folder.find([]) is None and folder.find(["", "video8"]) is None
    assert folder.annotations("val.json | other/train.json") == [tmp_path / "other/train.json"]
    assert folder.annotations("train.json") == [tmp_path / "lists/train.json"]
    assert folder.annotations("*.json") == [
        tmp_path / p for p in ("lists/train.json", "other/train.json")
    ]


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "far/v1.mp4", "near/list.txt")
    os.symlink(tmp_path / "far", tmp_path / "near" / "videos")
    os.symlink(tmp_path / "near", tmp_path / "near" / "videos" / "circle")
    assert sets.Folder(tmp_path / "near").find(["v1"]) == "videos/v1.mp4"


def test_nothing_outside_the_folder_is_reached(tmp_path):
    touch(tmp_path, "secret.mp4", "set/video0.mp4")
    jsfusion(tmp_path / "set", "../secret", "/etc/passwd", "video0")
    source = sets.load("msrvtt", "test_1k", tmp_path / "set", max_absent=1.0)
    assert [clip.path for clip in source.clips] == ["secret", "passwd", "video0.mp4"]
    assert not os.path.exists(source.file(0))


def test_captions_are_matched_to_files_in_the_order_of_the_list(tmp_path):
    touch(tmp_path, "all/video1.mp4", "all/video2.mp4")
    jsfusion(tmp_path, "video2", "video1")
    source = sets.load("msrvtt", "test_1k", tmp_path)
    assert source.root == str(tmp_path)
    assert list(source.clips) == [
        sources.Clip(
            f"all/{key}.mp4", (said,), id=key, source="msrvtt/test_1k", licence="not known"
        )
        for key, said in (("video2", "sentence 0"), ("video1", "sentence 1"))
    ]


def test_absent_videos_keep_their_places_up_to_a_share(tmp_path):
    touch(tmp_path, "video1.mp4")
    jsfusion(tmp_path, "video2", "video1")
    with pytest.raises(UserError, match="1 of 2 videos are not below.*first 'video2'.*max_absent"):
        sets.load("msrvtt", "test_1k", tmp_path)
    source = sets.load("msrvtt", "test_1k", tmp_path, max_absent=0.5)
    assert [clip.path for clip in source.clips] == ["video2", "video1.mp4"]  # it keeps its place


def test_answers_are_numbered_by_how_common_they_are(tmp_path):
    touch(tmp_path, "video0.mp4", "video1.mp4")
    (tmp_path / "train_qa.json").write_text(json.dumps(QUESTIONS))
    (tmp_path / "val_qa.json").write_text(json.dumps(QUESTIONS[2:4]))
    source = sets.load("msrvtt_qa", "train", tmp_path, answers=3)
    assert [clip.label for clip in source.clips] == [1, 0, 2, 0, 1, 3]  # cat, dog, ant; others
    assert source.clips[1][:3] == ("video1.mp4", ("q1",), 0) and source.clips[1].id == "1"
    held_out = sets.load("msrvtt_qa", "val", tmp_path, answers=3)  # numbers of training
    assert [clip.label for clip in held_out.clips] == [2, 0]
    (tmp_path / "answers.txt").write_text("ant\nbee\n")
    given = sets.load("msrvtt_qa", "val", tmp_path, answers=str(tmp_path / "answers.txt"))
    assert [clip.label for clip in given.clips] == [0, 2]
    for name, known in (("list", ["ant", "bee"]), ("lavis", {"bee": 1, "ant": 0})):
        (tmp_path / f"{name}.json").write_text(json.dumps(known))
        told = sets.load("msrvtt_qa", "val", tmp_path, answers=str(tmp_path / f"{name}.json"))
        assert told.clips == given.clips
    (tmp_path / "odd.json").write_text('{"ant": 0, "bee": 2}')
    with pytest.raises(UserError, match="odd.json: the answers must be numbered from 0, each once"):
        sets.load("msrvtt_qa", "val", tmp_path, answers=str(tmp_path / "odd.json"))


def test_options_are_captions_and_the_label_says_which(tmp_path):
    touch(tmp_path, "g.gif")
    head = "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey\n"
    row = "g\twhat ?\teat\thold\tfall\ttalk\tflap\t2\t1\t1\n"
    (tmp_path / "Test_action_question.csv").write_text(head + row)
    (clip,) = sets.load("tgif_qa", "test_action", tmp_path).clips
    assert clip.captions[2] == "what ? fall" and len(clip.captions) == 5 and clip.label == 2


def test_parts_of_longer_videos_have_their_spans(tmp_path):
    """A whole video is found, and reported, but not taken for the clip."""
    rows = [dict(videoID=f"id_{n}_00000{n}_00001{n}", enCap=["x"]) for n in (1, 2)]
    (tmp_path / "vatex_training_v1.0.json").write_text(json.dumps(rows))
    touch(tmp_path, "id_1_000001_000011.mp4", "id_2.mkv")
    found = list(sets.locate(sets.read("vatex", "train_en", tmp_path), tmp_path))
    assert [(path, span) for _, path, span in found] == [
        ("id_1_000001_000011.mp4", None),
        ("id_2.mkv", (2, 12)),
    ]
    with pytest.raises(UserError, match="1 of 2 rows are parts of longer videos.*id_2_000002"):
        sets.load("vatex", "train_en", tmp_path)
    clips = sets.load("vatex", "train_en", tmp_path, parts=True).clips
    assert [clip.part for clip in clips] == [None, (2, 12)]
    (report,) = sets.check("vatex", tmp_path, "train_en")
    assert report.parts == 1 and not report.missing


def test_boxes_are_no_source(tmp_path):
    (tmp_path / "ava_val_v2.2.csv").write_text("v,0902,0.1,0.1,0.2,0.2,9,1\n")
    with pytest.raises(UserError, match="a source has no boxes"):
        sets.load("ava", "val", tmp_path)


def test_moments_are_spans_where_there_is_one(tmp_path):
    touch(tmp_path, "A.mp4", "B.mp4")
    (tmp_path / "charades_sta_test.txt").write_text("A 0.5 6.9##a person sits.\n")
    (clip,) = sets.load("charades_sta", "test", tmp_path).clips
    assert clip[:4] == ("A.mp4", ("a person sits.",), None, ((0.5, 6.9),))
    row = dict(annotation_id=1, description="x", video="B.avi", times=[[0, 0], [1, 1]])
    (tmp_path / "val_data.json").write_text(json.dumps([row]))
    assert sets.load("didemo_moments", "val", tmp_path).clips[0].spans == ()


def test_the_pipeline_opens_sets_by_name(tmp_path):
    shapes.write(tmp_path, shapes.Plan(train=2, val=1, side=32, frames=4))
    one, two = sorted(tmp_path.rglob("train/*.mp4"))
    one.rename(tmp_path / "video7.mp4"), two.rename(tmp_path / "video9.mp4")
    jsfusion(tmp_path, "video9", "video7")
    given = dict(set="msrvtt", split="test_1k", root=str(tmp_path))
    clips = opening.open_set("data.train", "sets", given, "train")
    assert [clip.path for clip in clips.source.clips] == ["video9.mp4", "video7.mp4"]
    assert clips.open(1).read(lambda n: np.arange(n)).shape == (4, 32, 32, 3)
    old = dict(given, manual_dir=given["root"])
    del old["root"]  # as older runs wrote it
    assert opening.open_set("data.train", "sets", old, "train").source == clips.source
    with pytest.raises(UserError, match="data.train: .*root"):
        opening.open_set("data.train", "sets", dict(set="msrvtt", split="test_1k"), "train")


# What is missing.


def test_the_checker_counts_and_names(tmp_path, capsys, monkeypatch):
    touch(tmp_path, "video1.mp4")
    jsfusion(tmp_path, "video2", "video1", "video3", "video1")
    with pytest.raises(SystemExit) as done:
        missing = str(tmp_path / "missing.txt")
        entry.main(["check", "--set", "msrvtt", "--root", str(tmp_path), "--missing", missing])
    assert done.value.code == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(sets.SETS["msrvtt"].splits)
    assert "msrvtt/test_1k: 4 rows, 1,000 were published; 1 ids are repeated; " in said[2]
    assert "2 videos are missing, first video2, video3" in said[2]
    assert "lacks `MSRVTT_data.json` or `MSR_VTT.json`, `MSRVTT_train.9k.csv`" in said[0]
    assert Path(missing).read_text() == "video2\nvideo3\n"
    # What is all there does not fail.
    splits = sets.SETS["msrvtt"].splits
    monkeypatch.setitem(splits, "test_1k", splits["test_1k"]._replace(rows=2))
    touch(tmp_path, "video2.mp4")
    jsfusion(tmp_path, "video2", "video1")
    entry.main(["check", "--set=msrvtt", f"--root={tmp_path}", "--split=test_1k"])
    assert capsys.readouterr().out == "msrvtt/test_1k: 2 rows, as published; all videos are there\n"


def test_the_checker_continues_after_a_damaged_file(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    (tmp_path / "val_1.json").write_text("{}")
    train, val, other = sets.check("activitynet", tmp_path)
    assert "must be an object" in train.wrong and val.rows == 0 and other.lacking == ("val_2.json",)
    with pytest.raises(UserError, match="no data set 'x'"):
        sets.check("x", tmp_path)
    with pytest.raises(UserError, match="no folder"):
        sets.check("msrvtt", tmp_path / "nowhere")


# The table.


def test_one_set_is_described(capsys):
    entry.main(["list", "--set", "didemo"])
    said = capsys.readouterr().out
    assert "train: 8,392 rows; `train_data.json`; (`train_list.txt`)" in said
    with pytest.raises(UserError, match="no data set 'dideno'; did you mean 'didemo'"):
        entry.main(["list", "--set", "dideno"])


def test_vocabularies_are_splits():
    for one in sets.SETS.values():
        assert all(not s.vocabulary or s.vocabulary in one.splits for s in one.splits.values())
