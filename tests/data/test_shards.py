"""From collections to shards: the same frames, nothing twice, nothing lost, every refusal named."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from vtp_jax import prepare
from vtp_jax.data import ops, records, shapes, shards, sources, tars, video
from vtp_jax.types import UserError

REAL = Path(__file__).parents[3] / "shared" / "videos"
CLIPS = 10


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Ten small videos, of which three cannot be read, and their captions."""
    root = tmp_path_factory.mktemp("corpus")
    shapes.write(root, shapes.Plan(train=CLIPS, val=1, side=48, frames=12), workers=1)
    lines = [
        json.dumps(
            dict(path=c.path, caption=c.captions[0], id=f"id{n}", licence=f"L{n}", start=0, end=n)
        )
        for n, c in enumerate(shapes.source(shapes.Plan(train=CLIPS), "train").clips)
    ]
    (root / "c.jsonl").write_text("\n".join([*lines, '{"path": "no.mp4", "caption": "gone"}']))
    (root / "train/00003.mp4").write_bytes(b"")
    (root / "train/00007.mp4").write_bytes(b"no video" * 99)
    return root


CAUSES = dict(missing=1, not_a_video=2)


def make(corpus, out, more=""):
    given = f"--root {corpus} --captions {corpus}/c.jsonl --source here"
    prepare.main(f"shards {given} --out {out} --per-shard 3 --every 1 {more}".split())
    return manifest_of(out)


def manifest_of(out):
    return json.loads((out / records.MANIFEST).read_text())


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    make(corpus, out, "--workers 2")
    return out


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def test_every_clip_is_there_or_refused_for_a_cause(corpus, made, capsys):
    manifest = manifest_of(made)
    assert manifest["causes"] == CAUSES and manifest["records"] == CLIPS - 2
    refused = {one["id"]: one["cause"] for one in manifest["rejected"]}
    assert refused == {"id3": "not_a_video", "id7": "not_a_video", "no.mp4": "missing"}
    clips = records.Shards(made)
    wanted = [c for c in sources.load(corpus, corpus / "c.jsonl", max_absent=0.5).clips if c.id]
    wanted = [c for c in wanted if c.id not in refused]
    assert [(c.path, c.captions, c.spans) for c in clips] == [
        (c.id, c.captions, c.spans) for c in wanted
    ]
    for number, clip in enumerate(wanted):
        record = clips.find(number)[1].record
        assert (record.source, record.licence) == ("here", clip.licence)
        film = video.read_frames(corpus / clip.path, np.arange)
        assert record.frames == len(film) and psnr(film, clips.read(number, np.arange)) > 25
    files = {p.name for p in made.iterdir()}
    assert files == {
        *(f"00000{k}.{end}" for k in range(4) for end in ("shard", "json")),
        *("plan.json", "manifest.json"),
    }


# Kills, restarts, take-downs.


def test_killed_at_any_moment_it_goes_on(corpus, made, tmp_path):
    """Killed with its children at its first shard; then again what stood half done."""
    argv = f"shards --root {corpus} --captions {corpus}/c.jsonl --source here --out {tmp_path}"
    code = "import sys; from vtp_jax import prepare; prepare.main(sys.argv[1:])"
    argv = [sys.executable, "-c", code, *argv.split(), *["--per-shard", "3", "--every", "1"]]
    run = subprocess.Popen([*argv, "--workers", "1"], start_new_session=True)
    while not list(tmp_path.glob("*.shard")) and run.poll() is None:
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not (tmp_path / records.MANIFEST).exists()
    (tmp_path / "000002.shard").write_bytes(b"a shard without its summary")
    (tmp_path / "000003.shard.new").write_bytes(b"half")
    assert make(corpus, tmp_path) == manifest_of(made)
    again = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.shard")}
    assert make(corpus, tmp_path) == manifest_of(made)
    assert again == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.shard")}
    with pytest.raises(UserError, match="other options"):
        make(corpus, tmp_path, "--quality 50")


def test_what_is_taken_down_is_gone_and_stays_so(corpus, made, tmp_path, capsys):
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "ids.txt").write_text("id4\nid9\n\nnobody\n")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("*.shard")}
    prepare.main(f"remove --shards {tmp_path} --ids {tmp_path}/ids.txt".split())
    assert "6 records are left, 2 have been taken down" in capsys.readouterr().out
    assert [c.path for c in records.Shards(tmp_path)] == [f"id{k}" for k in (0, 1, 2, 5, 6, 8)]
    changed = {
        p.name
        for p in tmp_path.glob("*.shard")
        if before[p.name] != (p.read_bytes(), p.stat().st_mtime_ns)
    }
    assert changed == {"000001.shard", "000003.shard"}
    assert manifest_of(tmp_path)["causes"] == dict(CAUSES, removed=2)
    (tmp_path / "000001.json").unlink()  # made again, it comes back without
    make(corpus, tmp_path, "--workers 2")
    assert [c.path for c in records.Shards(tmp_path)] == [f"id{k}" for k in (0, 1, 2, 5, 6, 8)]


def test_beam_makes_the_same_shards(corpus, made, tmp_path):
    assert make(corpus, tmp_path, "--runner beam") == manifest_of(made)


class Deadly(NamedTuple):
    """Items of which some kill the process that stores them, and some never end."""

    media: tuple[str, ...]

    def __call__(self):
        real = shards.store

        def store(item, form):
            if item.media == "crash":
                os._exit(1)
            if item.media == "hang":
                time.sleep(600)
            return real(item, form)

        shards.store = store  # in a process of its own
        for number, media in enumerate(self.media):
            yield shards.Item(sources.Clip(str(number), ("x",)), media)


def test_a_clip_that_kills_or_hangs_costs_itself_alone(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "POLL", 0.1)
    monkeypatch.setattr(shards, "PATIENCE", 1.0)
    good = str(corpus / "train/00000.mp4")
    media = (good, "crash", good, "hang", "crash", good)
    form = shards.Form(seconds=0.5)
    task = shards.Task("a.shard", Deadly(media), len(media))
    shards.begin(tmp_path, [task], form)
    steps = shards.run([task], tmp_path, form, workers=1, memory=4.0)
    assert sum(steps) >= len(media) - 1
    manifest = shards.finish(tmp_path)
    assert [c.path for c in records.Shards(tmp_path)] == ["0", "2", "5"]
    assert {one["id"]: one["cause"] for one in manifest["rejected"]} == {
        "1": "crashed", "3": "stuck", "4": "crashed"
    }  # fmt: skip


# Tars, TFDS, real files.


def test_tars_become_shards(corpus, tmp_path):
    path = tmp_path / "00000.tar"

    def add(tar, name, content):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    film = (corpus / "train/00000.mp4").read_bytes()
    with tarfile.open(path, "w") as tar:
        add(tar, "a.mp4", film)
        add(tar, "a.txt", b" told in text ")
        add(tar, "a.json", b'{"caption": "told in json", "url": "there", "license": "CC0"}')
        add(tar, "b.json", b'{"caption": ["one", "two"]}')
        add(tar, "b.mp4", film)
        add(tar, "../c.mp4", film)
        add(tar, "d.mp4", film)
        add(tar, "e.txt", b"no video")
        add(tar, "f.mp4", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/x.ts\n")
        add(tar, "f.txt", b"a playlist")
        add(tar, "g.mp4", film)
        add(tar, "g.json", b"{")
    out = tmp_path / "out"
    prepare.main(f"shards --tars {tmp_path} --out {out} --licence mine --workers 1".split())
    found = [h.record for h in map(records.Shard(out / "00000.shard").header, range(2))]
    assert [(r.id, r.captions, r.source, r.licence) for r in found] == [
        ("a", ["told in text"], "there", "CC0"),
        ("b", ["one", "two"], "", "mine"),
    ]
    refused = {one["id"]: one["cause"] for one in manifest_of(out)["rejected"]}
    assert refused == {
        "../c.mp4": "unsafe_name", "d": "no_caption", "e": "missing", "f": "not_a_video",
        "g": "damaged",
    }  # fmt: skip
    assert set(refused.values()) <= set(shards.CAUSES)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    item = shards.Item(sources.Clip("a", ("x",)), str(tmp_path / "a.mp4"))
    with pytest.raises(video.Unreadable, match="missing"):
        shards.store(item, shards.Form())


def test_frames_of_arrays(tmp_path):
    """As TFDS gives them."""
    film = shapes.read(shapes.Plan(side=64, frames=10), "train", 0)

    def items():
        yield shards.Item(sources.Clip("a", ("x",), 3), (film, 8.0))
        yield shards.Item(sources.Clip("b", ("x",)), (film[..., 0], 8.0))
        yield tars.Refused("c", "duplicate")

    form = shards.Form(every=3, short_side=32)
    shards.make_shard(shards.Task("a.shard", items, 3), tmp_path, form)
    (one,) = records.Shard(tmp_path / "a.shard").records()
    assert (one.frames, one.rate, one.label, len(one.film[0].frames)) == (10, 8.0, 3, 4)
    assert (one.height, one.width) == (32, 32)
    summary = json.loads((tmp_path / "a.json").read_text())
    assert [r[:2] for r in summary["refused"]] == [["b", "not_a_video"], ["c", "duplicate"]]
    assert summary["classes"] == 4


def test_quality_falls_where_a_clip_would_be_too_large(corpus):
    item = shards.Item(sources.Clip("a", ("x",)), str(corpus / "train/00000.mp4"))
    sizes = [
        sum(map(len, shards.store(item, shards.Form(every=1, quality=90, ratio=ratio)).parts()))
        for ratio in (0.0, 100.0, 0.01)
    ]
    assert sizes[0] == sizes[1] > 1.3 * sizes[2]


@pytest.mark.skipif(not REAL.is_dir(), reason="no folder ../shared/videos with real files")
def test_real_videos_come_out_the_same_or_with_a_cause(tmp_path):
    """Above 33 dB; test patterns, whose colours change from pixel to pixel, above 27."""
    files = sorted(p for p in REAL.iterdir() if p.suffix in sources.VIDEOS)
    clips = [sources.Clip(p.name, ("x",)) for p in files]
    (task,) = shards.plan_files(sources.Source(str(REAL), clips), 99)
    form = shards.Form(every=8, quality=85, ratio=0.0)
    shards.make_shard(task, tmp_path, form)
    found = {one.id: one for one in records.Shard(tmp_path / task.name).records()}
    refused = json.loads((tmp_path / "000000.json").read_text())["refused"]
    assert [(key, cause) for key, cause, _ in refused] == [("corrupted.mp4", "damaged")]
    assert found.keys() == {p.name for p in files} - {"corrupted.mp4"}
    clips = records.Shards(write_manifest(tmp_path, task.name, len(found)))
    for index, one in enumerate(found.values()):
        numbers = np.unique(np.asarray([0, one.frames // 2, one.frames - 1]) // 8 * 8)
        film = video.read_frames(REAL / one.id, lambda n, numbers=numbers: numbers)
        assert min(one.height, one.width) == min(256, *film.shape[1:3])
        small = ops.resize(film, one.height, one.width)
        shown = clips.read(index, lambda n, numbers=numbers: numbers)
        assert psnr(small, shown) > (27 if one.id.startswith("testsrc") else 33), one.id


def write_manifest(folder, name, count):
    known = dict(format=records.FORMAT, every=8, captions=1, classes=0)
    known |= dict(shards=[dict(name=name, records=count)])
    (folder / records.MANIFEST).write_text(json.dumps(known))
    return folder


@pytest.mark.parametrize(
    "argv, told",
    [
        ("shards --root . --out x", "--root needs --captions"),
        ("shards --tars no.tar --out x", "'no.tar' is no .tar file"),
        ("shards --set ucf101 --out x", "--set needs --data-dir"),
        ("shards --root . --captions no.csv --every 0 --out x", "--every must be 1 or more"),
        ("remove --shards . --ids no.txt", "no file 'no.txt'"),
    ],
)
def test_errors_of_one_line(argv, told):
    with pytest.raises(UserError, match=told) as caught:
        prepare.main(argv.split())
    assert "\n" not in str(caught.value)
