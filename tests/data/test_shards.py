"""From collections to shards: the same frames, nothing twice, nothing lost, every refusal named.

Above 500 lines, since nearly all tests need the same corpus and the same finished shards.
"""

import io
import json
import multiprocessing
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
from vtp_jax.data import inputs, ops, processes, records, sets, shapes, shards, sources, tars, video
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
    given = f"--root {corpus} --list {corpus}/c.jsonl --source here"
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


def test_every_clip_is_stored_or_refused_with_a_cause(corpus, made, capsys):
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
        record = clips.open(number).header.record
        assert (record.source, record.licence) == ("here", clip.licence)
        film = video.read_frames(corpus / clip.path, np.arange)
        assert record.frames == len(film) and psnr(film, clips.open(number).read(np.arange)) > 25
    files = {p.name for p in made.iterdir()}
    assert files == {
        *(f"00000{k}.{end}" for k in range(4) for end in ("shard", "json")),
        *("plan.json", "manifest.json"),
    }


# Kills, restarts, take-downs.


def test_a_run_that_is_killed_at_any_moment_resumes(corpus, made, tmp_path):
    """Killed with its children at its first shard; then again with half-written files."""
    argv = f"shards --root {corpus} --list {corpus}/c.jsonl --source here --out {tmp_path}"
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


def test_removed_records_do_not_come_back(corpus, made, tmp_path, capsys):
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbfid4\r\nid9\r\n\r\nnobody\r\n")  # Notepad's
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("*.shard")}
    argv = f"remove --shards {tmp_path} --ids {tmp_path}/ids.txt".split()
    for now in (2, 0):  # what is gone is known, what never was is an error, each time
        with pytest.raises(UserError, match="1 of 3 ids are nowhere.*'nobody' .*, line 4"):
            prepare.main(argv)
        told = f"6 records are left, {now} have been taken down (2 in all)"
        assert told in capsys.readouterr().out
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
            yield inputs.Item(sources.Clip(str(number), ("x",)), media)


def test_a_clip_that_kills_or_hangs_is_refused_alone(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "POLL", 0.1)
    monkeypatch.setattr(processes, "PATIENCE", 1.0)
    good = str(corpus / "train/00000.mp4")
    media = (good, "crash", good, "hang", "crash", good)
    form = shards.Form(seconds=0.5)
    task = inputs.Task("a.shard", Deadly(media), len(media))
    shards.begin(tmp_path, [task], form)
    steps = processes.run([task], tmp_path, form, workers=1, memory=4.0)
    assert sum(steps) >= len(media) - 1
    manifest = shards.finish(tmp_path)
    assert [c.path for c in records.Shards(tmp_path)] == ["0", "2", "5"]
    assert {one["id"]: one["cause"] for one in manifest["rejected"]} == {
        "1": "crashed", "3": "stuck", "4": "crashed"
    }  # fmt: skip


class Broken(NamedTuple):
    """Items the second of which raises."""

    media: str
    dies: bool

    def __call__(self):
        yield inputs.Item(sources.Clip("0", ("x",)), self.media)
        if self.dies:
            os._exit(1)
        raise KeyError("a mistake")


@pytest.mark.parametrize(
    "dies, told", [(False, "a.shard: KeyError: 'a mistake'"), (True, "twice.* 1")]
)
def test_an_error_between_clips_is_not_attributed_to_a_clip(corpus, tmp_path, dies, told):
    task = inputs.Task("a.shard", Broken(str(corpus / "train/00000.mp4"), dies), 2)
    shards.begin(tmp_path, [task], shards.Form())
    with pytest.raises(UserError, match=told):
        list(processes.run([task], tmp_path, shards.Form(), workers=1, memory=4.0))


def test_an_unexpected_error_costs_one_clip(corpus, tmp_path, monkeypatch):
    """And text that UTF-8 cannot encode is repaired."""
    real, film = shards.store, str(corpus / "train/00000.mp4")

    def store(item, form):
        return real(item, form) if item.media == film else {}["odd \ud83d"]

    monkeypatch.setattr(shards, "store", store)
    told = [sources.Clip("a\ud83d", ("b\ud83d",), source="\udce9"), sources.Clip("c", ("x",))]

    def items():
        yield inputs.Item(told[0], film)
        yield inputs.Item(told[1], "other")

    task = inputs.Task("a.shard", items, 2)
    shards.begin(tmp_path, [task], shards.Form())
    shards.make_shard(task, tmp_path, shards.Form())
    manifest = shards.finish(tmp_path)
    record = records.Shard(tmp_path / "a.shard").header(0).record
    assert (record.id, record.captions, record.source) == ("a\ufffd", ["b\ufffd"], "\ufffd")
    assert [(one["id"], one["cause"]) for one in manifest["rejected"]] == [("c", "failed")]
    assert manifest["rejected"][0]["detail"] == "KeyError: 'odd \\ud83d'"


# Several runs at once.


def test_one_run_at_a_time(corpus, made, capsys):
    with shards.hold(made):
        with pytest.raises(UserError, match="another run is active"):
            make(corpus, made)
        with pytest.raises(UserError, match="another run is active"):
            shards.remove(made, ["id0"])
    make(corpus, made)


def test_a_worker_ends_when_its_run_does(tmp_path):
    """An orphan once put its shard into the folder of the next run."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    task = inputs.Task("a.shard", Deadly(("hang",)), 1)
    given = (sender, task, tmp_path, shards.Form(), frozenset(), {}, 4.0)
    process = context.Process(target=processes.work, args=given, daemon=True)
    process.start()
    sender.close()
    assert receiver.recv() == 0 and process.is_alive()
    receiver.close()
    process.join(20)
    assert process.exitcode == 1


def test_two_writers_do_not_collide(corpus, tmp_path):
    film, _ = shards.store(inputs.Item(sources.Clip("a", ()), f"{corpus}/train/00000.mp4"), FORM)
    one = records.Record("a", (), (), None, "", "", **film)

    def some():
        yield one
        assert records.write_shard(tmp_path / "a.shard", [one]) == 1
        yield one._replace(id="b")

    assert records.write_shard(tmp_path / "a.shard", some()) == 2
    assert [r.id for r in records.Shard(tmp_path / "a.shard").records()] == ["a", "b"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.shard"]


def test_a_removal_that_is_killed_resumes(corpus, made, tmp_path, monkeypatch):
    """Between a shard and its summary; then other ids are removed."""
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def die(path, what):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            shards.remove(tmp_path, ["id4"])
    manifest, now, _ = shards.remove(tmp_path, ["id9"])
    assert now == 2
    assert manifest["causes"] == dict(CAUSES, removed=2)
    assert [c.path for c in records.Shards(tmp_path)] == [f"id{k}" for k in (0, 1, 2, 5, 6, 8)]


# Tars, sets, TFDS, real files.


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def test_an_odd_sample_is_refused_alone(corpus, tmp_path):
    """Each of these ended the whole run, and every run after it."""
    film = (corpus / "train/00000.mp4").read_bytes()
    odd = dict(
        a=b'{"caption": "good", "url": 5, "license": ["x"]}',
        b=b'{"caption": 5}',
        c=b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        d=b'{"caption": ["x", null]}',
        e=b'{"caption": "half \\ud83d", "url": "\\ud83d"}',
        f=b'{"caption": ["", " "]}',
    )
    with tarfile.open(
        tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as tar:
        for key, text in odd.items():
            add(tar, f"{key}.mp4", film)
            add(tar, f"{key}.json", text)
        add(tar, "caf\xe9.mp4", film)
        add(tar, "z.mp4", film)
        add(tar, "z.txt", b"the last")
    out = tmp_path / "out"
    prepare.main(f"shards --tars {tmp_path} --out {out} --source mine --workers 1".split())
    found = [(c.path, c.captions) for c in records.Shards(out)]
    assert found == [("a", ("good",)), ("e", ("half \ufffd",)), ("z", ("the last",))]
    assert records.Shard(out / "a.shard").header(0).record.source == "mine"
    refused = {one["id"]: one["cause"] for one in manifest_of(out)["rejected"]}
    assert refused == {
        **dict.fromkeys("bcd", "damaged_text"), "f": "no_caption", "caf\ufffd.mp4": "unsafe_name"
    }  # fmt: skip


def test_ids_are_unique(corpus, tmp_path):
    """Of two tars with samples of one name, the ids begin with the tar's; elsewhere the first
    record of an id stays."""
    film = (corpus / "train/00000.mp4").read_bytes()
    for name in ("one", "two"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            add(tar, "0.mp4", film)
            add(tar, f"{name}.mp4", b"")
    tasks = inputs.plan_tars([str(tmp_path)], "", "", "")
    out, form = tmp_path / "out", shards.Form(captioned=False)
    for task in shards.begin(out, tasks, form):
        shards.make_shard(task, out, form)
    manifest = shards.finish(out)
    assert [c.path for c in records.Shards(out)] == ["one/0", "two/0"]
    assert [one["id"] for one in manifest["rejected"]] == ["one/one", "two/two"]
    assert shards.remove(out, ["two/0"])[0]["records"] == 1

    def items(keys):
        return lambda: (inputs.Item(sources.Clip(key, ()), film) for key in keys)

    tasks = [inputs.Task(f"{n}.shard", items(keys), 2) for n, keys in enumerate(("aba", "cb"))]
    out = tmp_path / "again"
    shards.begin(out, tasks, form)
    for task in tasks:
        shards.make_shard(task, out, form)
    manifest = shards.finish(out)
    assert [c.path for c in records.Shards(out)] == ["a", "b", "c"]
    assert manifest["causes"] == dict(duplicate=2) and shards.finish(out) == manifest


FORM = shards.Form(every=1, quality=95, ratio=0.0, captioned=False)


def make_set(name, split, folder, out):
    """In this process."""
    source = sets.load(name, split, folder, parts=True)
    tasks = inputs.plan_files(source, 99)
    for task in shards.begin(out, tasks, FORM):
        shards.make_shard(task, out, FORM)
    return shards.finish(out)


def test_parts_of_longer_videos_are_stored(tmp_path, monkeypatch):
    """Of 12 frames at 8 a second, those from 0.5 to 1.25 s and those from 1 s on."""
    monkeypatch.setattr(shards, "PIECE", 2 * 3 * 48 * 48)  # two frames at once
    film = np.broadcast_to(20 * np.arange(12, dtype=np.uint8)[:, None, None, None], (12, 48, 48, 3))
    shapes.encode(tmp_path / "v.mp4", film, 8)
    times = [("0.500", "1.250"), ("1.000", "9.000"), ("3.000", "4.000")]
    lines = [
        dict(YoutubeID="v", Start_timestamp=f"0:0:{a}", End_timestamp=f"0:0:{b}", Caption="x")
        for a, b in times
    ]
    (tmp_path / "InternVid-10M-flt.jsonl").write_text("\n".join(map(json.dumps, lines)))
    manifest = make_set("internvid", "train", tmp_path, tmp_path / "out")
    assert manifest["causes"] == dict(no_frames=1)
    clips = records.Shards(tmp_path / "out")
    for number, (first, last) in enumerate([(4, 10), (8, 12)]):
        record = clips.open(number).header.record
        assert (record.frames, record.rate) == (last - first, 8.0)
        levels = clips.open(number).read(np.arange).mean((1, 2, 3))
        assert np.abs(levels - 20 * np.arange(first, last)).max() < 5
    size = (tmp_path / "v.mp4").stat().st_size
    assert manifest["bytes_before"] == size * 6 // 12 + size * 4 // 12


def test_rows_of_sets_keep_their_ids_and_share_their_frames(corpus, tmp_path):
    """Two questions on one video are two records, by the questions' ids, and its frames once."""
    asked = [
        dict(answer=f"a{n}", id=n, question=f"q{n}", video_id=n // 2, category_id=0)
        for n in range(3)
    ]
    (tmp_path / "train_qa.json").write_text(json.dumps(asked))
    for n in range(2):
        (tmp_path / f"video{n}.mp4").write_bytes((corpus / f"train/0000{n}.mp4").read_bytes())
    out = tmp_path / "out"
    manifest = make_set("msrvtt_qa", "train", tmp_path, out)
    assert manifest["bytes_before"] == sum(p.stat().st_size for p in tmp_path.glob("*.mp4"))
    clips = records.Shards(out)
    assert [(c.path, c.captions, c.label) for c in clips] == [
        (str(n), (f"q{n}",), n) for n in range(3)
    ]
    headers = [clips.open(n).header for n in range(3)]
    assert headers[0].at == headers[1].at < headers[2].at
    assert headers[0].record.source == "msrvtt_qa/train"
    assert headers[0].record.licence == sets.SETS["msrvtt_qa"].licence
    before = [clips.open(n).read(np.arange) for n in range(3)]
    assert (before[0] == before[1]).all() and (before[1] != before[2]).any()
    shards.remove(out, ["0"])
    clips = records.Shards(out)
    assert [c.path for c in clips] == ["1", "2"]
    assert all((clips.open(n).read(np.arange) == before[n + 1]).all() for n in range(2))


def test_tars_become_shards(corpus, tmp_path):
    path = tmp_path / "00000.tar"
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
        "g": "damaged_text",
    }  # fmt: skip
    assert set(refused.values()) <= set(shards.CAUSES)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    item = inputs.Item(sources.Clip("a", ("x",)), str(tmp_path / "a.mp4"))
    with pytest.raises(video.Unreadable, match="missing"):
        shards.store(item, shards.Form())


def test_frames_given_as_arrays_are_stored(tmp_path):
    """As TFDS gives them."""
    film = shapes.read(shapes.Plan(side=64, frames=10), "train", 0)

    def items():
        yield inputs.Item(sources.Clip("a", ("x",), 3), (film, 8.0))
        yield inputs.Item(sources.Clip("b", ("x",)), (film[..., 0], 8.0))
        yield tars.Refused("c", "duplicate")

    form = shards.Form(every=3, short_side=32)
    shards.make_shard(inputs.Task("a.shard", items, 3), tmp_path, form)
    (one,) = records.Shard(tmp_path / "a.shard").records()
    assert (one.frames, one.rate, one.label, len(one.film[0].frames)) == (10, 8.0, 3, 4)
    assert (one.height, one.width) == (32, 32)
    summary = json.loads((tmp_path / "a.json").read_text())
    assert [r[:2] for r in summary["refused"]] == [["b", "not_a_video"], ["c", "duplicate"]]
    assert summary["classes"] == 4


def test_quality_falls_where_a_clip_would_be_too_large(corpus):
    item = inputs.Item(sources.Clip("a", ("x",)), str(corpus / "train/00000.mp4"))
    sizes = []
    for ratio in (0.0, 100.0, 0.01):
        known, _ = shards.store(item, shards.Form(every=1, quality=90, ratio=ratio))
        sizes.append(sum(len(frame) for roll in known["film"] for frame in roll.frames))
    assert sizes[0] == sizes[1] > 1.3 * sizes[2]


@pytest.mark.skipif(not REAL.is_dir(), reason="no folder ../shared/videos with real files")
def test_real_videos_are_stored_faithfully_or_refused_with_a_cause(tmp_path):
    """As `prepare` stores them by itself, above 35 dB; drawn ones, whose colours change from pixel
    to pixel, above 26."""
    files = sorted(p for p in REAL.iterdir() if p.suffix in sources.VIDEOS)
    clips = [sources.Clip(p.name, ("x",)) for p in files]
    (task,) = inputs.plan_files(sources.Source(str(REAL), clips), 99)
    form = shards.Form()
    shards.make_shard(task, tmp_path, form)
    found = {one.id: one for one in records.Shard(tmp_path / task.name).records()}
    refused = json.loads((tmp_path / "000000.json").read_text())["refused"]
    assert [(key, cause) for key, cause, _ in refused] == [("corrupted.mp4", "damaged")]
    assert found.keys() == {p.name for p in files} - {"corrupted.mp4"}
    clips = records.Shards(write_manifest(tmp_path, task.name, len(found)))
    for index, one in enumerate(found.values()):
        numbers = np.unique(np.asarray([0, one.frames // 2, one.frames - 1]) // 4 * 4)
        film = video.read_frames(REAL / one.id, lambda n, numbers=numbers: numbers)
        assert min(one.height, one.width) == min(256, *film.shape[1:3])
        small = ops.resize(film, one.height, one.width)
        shown = clips.open(index).read(lambda n, numbers=numbers: numbers)
        drawn = one.id.startswith(("testsrc", "frames"))
        assert psnr(small, shown) > (26 if drawn else 35), one.id


def write_manifest(folder, name, count):
    known = dict(format=records.FORMAT, every=4, captions=1, classes=0)
    known |= dict(shards=[dict(name=name, records=count)])
    (folder / records.MANIFEST).write_text(json.dumps(known))
    return folder


@pytest.mark.parametrize(
    "argv, told",
    [
        ("shards --list x --out x", "--list needs --root, the folder of its videos"),
        ("shards --tars no.tar --out x", "'no.tar' is not a .tar file"),
        ("shards --set ucf101 --out x", "--set needs --root, the folder of its files"),
        ("shards --root . --list no.csv --every 0 --out x", "--every must be 1 or more"),
        ("shards --root . --list x --workers 0 --out x", "--workers must be 1 or more"),
        ("shards --root . --list x --quality 500 --out x", "--quality .* 1 .* 95 or less"),
        ("shards --root . --list x --max-absent -1 --out x", "--max-absent must be 0 or more"),
        ("remove --shards . --ids README.md", "no shards in '.'"),
        ("remove --shards . --ids no.txt", "no file 'no.txt'"),
    ],
)
def test_mistakes_are_one_line_errors(argv, told):
    with pytest.raises(UserError, match=told) as caught:
        prepare.main(argv.split())
    assert "\n" not in str(caught.value)


def test_unfinished_and_damaged_folders_are_reported(corpus, made, tmp_path, capsys):
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "000001.json").unlink()
    with pytest.raises(UserError, match="is not finished: 000001.shard"):
        shards.remove(tmp_path, ["id0"])
    make(corpus, tmp_path)
    (tmp_path / "000000.shard").write_bytes(b"rot")
    with pytest.raises(UserError, match="000000.shard: damaged.*delete it"):
        shards.remove(tmp_path, ["id0"])
    (tmp_path / "plan.json").write_text("{")
    for act in (lambda: make(corpus, tmp_path), lambda: shards.remove(tmp_path, ["id0"])):
        with pytest.raises(UserError, match="plan.json is damaged; delete it"):
            act()
    (tmp_path / "plan.json").unlink()
    assert make(corpus, tmp_path)["causes"] == CAUSES | dict(removed=1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        make(corpus, tmp_path / "file")


def test_splits_of_tfds_are_divided_into_parts(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs the extra [tfds]")

    class Info:
        features = dict(video=None)
        splits = tfds.core.splits.SplitDict(
            [
                tfds.core.SplitInfo(name=name, shard_lengths=[count], num_bytes=1)
                for name, count in (("train", 10), ("test", 4))
            ]
        )

    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: type("Films", (), dict(info=Info)))

    def plan(split):
        tasks = inputs.plan_tfds("films", split, None, 4, ("video", "", "", ""), "", "")
        return [(task.items.split, task.items.start, task.items.stop) for task in tasks]

    assert plan("train[:60%]") == [("train", 0, 4), ("train", 4, 6)]
    assert plan("train[8:]+test") == [("train", 8, 10), ("test", 0, 4)]
    for wrong in ("val", "train[:x]", "train[:200%]"):
        with pytest.raises(UserError, match="TFDS: "):
            plan(wrong)
