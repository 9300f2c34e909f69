"""The commands that make and check data, as a user types them."""

import collections
import csv
import itertools
import json
import os

import pytest

from tests import odd
from vtp_jax import prepare
from vtp_jax.data import pipeline, records, text
from vtp_jax.types import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "shapes"
    prepare.main(f"shapes --out {out} --train 6 --val 2 --side 32 --frames 8".split())
    return out


def test_shapes_are_written_once(corpus, capsys):
    assert len(list(corpus.glob("train/*.mp4"))) == 6
    with (corpus / "val.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
    prepare.main(f"shapes --out {corpus} --train 6 --val 2 --side 32 --frames 8".split())
    assert "6 + 2 clips, as they were" in capsys.readouterr().out


def test_a_tokenizer_is_trained_on_captions(corpus, tmp_path, capsys):
    out = tmp_path / "new" / "spm.model"
    prepare.main(f"tokenizer --captions {corpus}/train.csv --vocab-size 80 --out {out}".split())
    size = text.make(kind="sentencepiece", path=out).facts["vocab_size"]
    assert size <= 80 and f"{size} pieces" in capsys.readouterr().out


def test_videos_are_counted_by_cause(corpus, tmp_path, capsys):
    """Counts by cause, of what a caption file names or of a whole folder."""
    captions = tmp_path / "c.csv"
    captions.write_text("file,text\ntrain/00000.mp4,x\nabsent.mp4,x\nbad.mp4,x\n")
    (corpus / "bad.mp4").write_bytes(b"no video")
    columns = "--path-column file --caption-column text"
    with pytest.raises(SystemExit, match="1"):
        prepare.main(f"check --root {corpus} --list {captions} {columns}".split())
    out = capsys.readouterr().out
    assert f"{corpus}/bad.mp4: not_a_video" in out and f"{corpus}/absent.mp4: missing" in out
    assert all(f"1 {cause}" in out for cause in ("readable", "missing", "not_a_video"))
    with pytest.raises(SystemExit, match="1"):
        prepare.main(f"check --root {corpus}".split())
    out = capsys.readouterr().out
    assert "8 readable" in out and "1 not_a_video" in out and "missing" not in out


def test_a_check_finds_linked_folders_once(corpus, tmp_path, capsys):
    """And ends where a link leads back."""
    (tmp_path / "a").mkdir()
    (tmp_path / "real").mkdir()
    video = corpus / "train/00000.mp4"
    for name in ("x.mp4", "line\nbreak.mp4", "\u2028 \xe9 \U0001f600 100%d?.mp4"):
        (tmp_path / "real" / name).write_bytes(video.read_bytes())
    os.rename(tmp_path / "real/x.mp4", os.fsencode(tmp_path / "real") + b"/\xff\xfe.mp4")
    (tmp_path / "a/link").symlink_to(tmp_path / "real")
    (tmp_path / "a/again").symlink_to(tmp_path / "real")
    (tmp_path / "a/back").symlink_to(tmp_path / "a")
    (tmp_path / "a/file.mp4").symlink_to(video)
    (tmp_path / "a/gone.txt").symlink_to(tmp_path / "absent")
    prepare.main(["check", "--root", str(tmp_path / "a")])
    assert "4 readable" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, text",
    [
        ("l.txt", "train/00000.mp4 0\ntrain/00001.mp4 1\n"),
        ("l.csv", "path\ntrain/00000.mp4\ntrain/00001.mp4\n"),
        ("l.jsonl", '{"path": "train/00000.mp4"}\n{"path": "train/00001.mp4"}\n'),
        ("l.json", '{"train/00000.mp4": "a", "train/00001.mp4": ["b", "c"]}'),
    ],
)
def test_a_check_needs_no_captions(corpus, tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    prepare.main(f"check --root {corpus} --list {tmp_path / name}".split())
    assert "2 readable" in capsys.readouterr().out


def test_check_shards_and_training_agree(tmp_path, capsys):
    """On odd files of every kind: what one of them reads, all do; and for the same causes."""
    films = [
        odd.film(tmp_path / "good.mp4", odd.plain(60)),
        odd.with_matrix(odd.film(tmp_path / "mirrored.mp4", odd.plain(60)), -1, 0, 0, 1),
        odd.spliced(tmp_path / "grows.ts", [odd.plain(60), odd.plain(60, 96, 128)]),
        odd.without_decoder(odd.film(tmp_path / "codec.mp4", odd.plain(60)), b"avc1"),
        odd.write(tmp_path / "cover.mp4", odd.COVER, sound=True),
        odd.film(tmp_path / "large.mp4", odd.plain(60, 160, 160)),
    ]
    (tmp_path / "junk.mp4").write_bytes(b"junk")
    rows = "".join(f"{one.name},a caption\n" for one in (*films, tmp_path / "junk.mp4"))
    (tmp_path / "l.csv").write_text(f"path,caption\n{rows}")
    causes = {
        "codec.mp4": "no_decoder",
        "cover.mp4": "no_video_stream",
        "large.mp4": "too_large",
        "junk.mp4": "not_a_video",
    }
    given = f"--root {tmp_path} --list {tmp_path}/l.csv --pixels 20000"
    with pytest.raises(SystemExit, match="1"):
        prepare.main(f"check {given}".split())
    lines = capsys.readouterr().out
    assert all(f"{name}: {cause}" in lines for name, cause in causes.items())
    assert "3 readable" in lines
    prepare.main(f"shards {given} --out {tmp_path}/out --workers 1".split())
    made = json.loads((tmp_path / "out" / records.MANIFEST).read_text())
    assert {one["id"]: one["cause"] for one in made["rejected"]} == causes
    train = dict(root=str(tmp_path), list=str(tmp_path / "l.csv"), limits=dict(pixels=20_000))
    look = dict(frames=2, stride=1, size=16)
    data = pipeline.make(
        kind="files", batch=7, seed=0, train=train, video=look, max_failed=1.0, workers=1
    )
    (batch, *_) = itertools.islice(data.batches(0), 1)
    names = [one.strip().split(",")[0] for one in rows.splitlines()]
    assert {names[i] for i in batch["id"][~batch["valid"]]} == set(causes)
    counts = collections.Counter(causes.values())
    assert data.counts(1) == dict(rows=7, failed=4, **{f"failed/{k}": n for k, n in counts.items()})


@pytest.mark.parametrize(
    "argv, message",
    [
        ("check --root . --pixels 0", "--pixels must be 1 or more"),
        ("tokenizer --captions no.csv --out x", "no file 'no.csv'; give a list"),
        ("check --root absent", "no file or folder 'absent'"),
        ("check --root . --config.a=3", "takes no config"),
        ("shapes --out x --val 201", "only 200"),
        ("shapes --out x --traim 3", "unknown argument '--traim'"),
    ],
)
def test_mistakes_are_reported_in_one_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        prepare.main(argv.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags, every",
    [
        ("", 4),
        ("--every 3", 3),
        ("--config simvtp/pretrain_webvid", 4),
        ("--config simvtp/pretrain_webvid --config.data.video.stride=6", 6),
        ("--config simvtp/pretrain_webvid --every 2", 2),
        ("--config tvtsv2/pretrain_yt_webvid", 25),
        ("--config omnivl/pretrain", 15),  # images beside it have one frame
        ("--config videomae/finetune_k400:ssv2", 1),  # segments of whole videos
        ("--config own", 1),  # chosen: videos of 8 frames at 8 a second
    ],
)
def test_shards_store_the_frames_that_a_config_shows(corpus, tmp_path, flags, every):
    where = f"--root {corpus} --list {corpus}/val.csv --out {tmp_path}"
    prepare.main(f"shards {where} --workers 1 {flags}".split())
    assert json.loads((tmp_path / "manifest.json").read_text())["every"] == every


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--config simvtp/pretrain_webvid --every 3", "shows frames 4 apart; give 4 or 2 or 1"),
        ("--config.data.video.stride=6", "changes --config, which is not given"),
    ],
)
def test_frames_that_a_config_cannot_show_are_reported_first(tmp_path, flags, told):
    with pytest.raises(UserError, match=told):
        prepare.main(f"shards --list absent.csv --root . --out {tmp_path}/new {flags}".split())
    assert not (tmp_path / "new").exists()
