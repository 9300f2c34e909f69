"""Shards: what is written is read, only what is shown is read, and what has rotted is found."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtp_jax.data import ops, records, rolls, video
from vtp_jax.data import order as orders
from vtp_jax.types import UserError

H, W, FRAMES, EVERY = 66, 90, 22, 4
STORED, ROLL = 6, 4  # frames, in two rolls


def film(seed=0):
    """Smooth coloured frames that differ from each other."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (FRAMES, 4, 5, 3), dtype=np.uint8)
    return ops.resize(small, H, W)


def record(number=0, frames=None):
    frames = film(number) if frames is None else frames
    return records.Record(
        id=f"clip {number}", captions=("one", "zwei \u00e9"), spans=((0.5, 2.0), (1.0, 3.25)),
        label=number, source="there", licence="CC BY 4.0", sha256="ab" * 32, frames=FRAMES,
        rate=29.97, every=EVERY, height=H, width=W, capacity=ROLL,
        film=[rolls.encode(frames[::EVERY][k : k + ROLL], 95) for k in range(0, STORED, ROLL)],
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    counts = [records.write_shard(out / f"{k}.shard", map(record, range(k, k + 3))) for k in (0, 3)]
    write_manifest(out, [f"{k}.shard" for k in (0, 3)], counts)
    return out


def write_manifest(out, names, counts):
    listed = [dict(name=n, records=c) for n, c in zip(names, counts, strict=True)]
    known = dict(format=records.FORMAT, every=EVERY, captions=2, classes=6, shards=listed)
    (out / records.MANIFEST).write_text(json.dumps(known))


def as_lists(one):
    return json.loads(json.dumps({k: v for k, v in one._asdict().items() if k != "film"}))


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def test_records_are_read_as_written(folder):
    found = list(records.Shard(folder / "3.shard").records())
    assert len(found) == 3
    for number, one in enumerate(found, 3):
        wanted = record(number)
        assert as_lists(one) == as_lists(wanted) and one.film == wanted.film


def test_clips_of_all_shards_are_in_order(folder):
    clips = records.Shards(folder)
    assert len(clips) == 6 and clips.source.survey() == (2, 6)
    for number, clip in enumerate(clips):
        wanted = record(number)
        assert clip[:3] == (wanted.id, wanted.captions, number) and clip.spans == wanted.spans
    with pytest.raises(IndexError):
        clips[6]


@given(wanted=st.lists(st.integers(0, FRAMES - 1), min_size=1, max_size=6))
def test_requested_frames_are_the_last_stored_ones_up_to_them(folder, wanted):
    """Numbers are those of the video, in any order, repeated or not."""
    frames = records.Shards(folder).open(4).read(lambda n: np.asarray(wanted))
    for number, frame in zip(wanted, frames, strict=True):
        assert psnr(film(4)[number // EVERY * EVERY], frame) > 34


def test_only_the_requested_frames_are_read(folder, monkeypatch):
    clips, read = records.Shards(folder), []
    real = records.Shard._read
    monkeypatch.setattr(
        records.Shard, "_read", lambda self, at, size: read.append(size) or real(self, at, size)
    )
    clips.open(1).read(lambda n: np.asarray([4, 8, 20]))
    one, two = record(1).film
    parts = [len(one.head), len(one.frames[1] + one.frames[2]), len(two.head), len(two.frames[1])]
    assert read[-4:] == parts and sum(read[:-4]) < 2 * records.AT_ONCE


def cut(clips, index, choose, boxes, shape):
    out = np.empty(shape, np.uint8)
    clips.open(index).show(choose, boxes, out)
    return out


@pytest.mark.parametrize("box", [(0, 0, 66, 66), (3, 7, 32, 32), (11, 5, 40, 51), (1, 1, 20, 16)])
def test_parts_are_those_of_whole_frames(folder, box):
    """Resized in YCbCr by FFmpeg here, in RGB by Pillow there: brightness is alike and nowhere
    shifted; colour, of which there is one for four pixels, is so but for a pixel."""
    clips, wanted, box = records.Shards(folder), np.asarray([0, 4, 4, 20]), ops.Box(*box)
    (got,) = cut(clips, 2, lambda n: wanted, lambda h, w: [box], (1, 4, 32, 32, 3))
    whole = clips.open(2).read(lambda n: wanted)
    pillow = ops.cut(whole, box, 32)
    grey = np.asarray([0.299, 0.587, 0.114])
    assert psnr(pillow @ grey, got @ grey) > 37 and psnr(pillow, got) > 28
    shifted = ops.cut(whole, box._replace(x=box.x + 1), 32)
    assert psnr(pillow @ grey, got @ grey) > psnr(shifted @ grey, got @ grey) + 3
    np.testing.assert_array_equal(got[1], got[2])


def test_several_parts_come_from_one_reading(folder):
    boxes = [ops.Box(0, 0, 66, 66), ops.Box(0, 24, 66, 66), ops.Box(2, 2, 24, 30)]
    clips = records.Shards(folder)
    shape = (FRAMES, 24, 24, 3)
    got = cut(clips, 0, np.arange, lambda h, w: boxes if (h, w) == (H, W) else [], (3, *shape))
    for box, clip in zip(boxes, got, strict=True):
        (alone,) = cut(clips, 0, np.arange, lambda h, w, box=box: [box], (1, *shape))
        np.testing.assert_array_equal(alone, clip)


@given(at=st.integers(0, 2**31), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(folder, tmp_path_factory, at, bit):
    """Anywhere: what can still be read is right, and the rest is `damaged`."""
    data = bytearray((folder / "0.shard").read_bytes())
    data[at % len(data)] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.shard"
    path.write_bytes(data)
    found = 0
    try:
        shard = records.Shard(path)
        for number in range(len(shard)):
            try:
                header = shard.header(number)
                film = shard.film(header, range(header.frames))
            except video.Unreadable as error:
                assert error.cause == "damaged"
                found += 1
            else:
                assert as_lists(header.record) == as_lists(record(number))
                assert film == record(number).film
    except video.Unreadable as error:
        assert error.cause == "damaged"
        return
    assert found == 1


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_cut_shard_is_damaged(folder, tmp_path, share):
    data = (folder / "0.shard").read_bytes()
    (tmp_path / "a.shard").write_bytes(data[: int(share * len(data))])
    with pytest.raises(video.Unreadable, match="damaged"):
        records.Shard(tmp_path / "a.shard")


def test_writing_is_all_or_nothing(tmp_path):
    def some():
        yield record()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        records.write_shard(tmp_path / "a.shard", some())
    assert not (tmp_path / "a.shard").exists()


def test_rolls_of_another_size_are_damaged(tmp_path):
    """Also ones whose header claims a huge size: nothing of that size is allocated."""
    roll = rolls.encode(film()[:3], 80)
    at = roll.head.index(b"\xff\xc0") + 5
    wrong = [
        rolls.encode(film()[:3, :40], 80),
        roll._replace(head=roll.head[:at] + b"\xff" * 4 + roll.head[at + 4 + 11 :]),
        roll._replace(head=roll.head[:100]),
        roll._replace(head=b""),
        roll._replace(frames=[b""] * 3),
        roll._replace(frames=[b"no jpeg"] * 3),
    ]
    for one in wrong:
        records.write_shard(tmp_path / "a.shard", [record()._replace(film=[one], capacity=3)])
        write_manifest(tmp_path, ["a.shard"], [1])
        with pytest.raises(video.Unreadable, match="damaged"):
            records.Shards(tmp_path).open(0).read(lambda n: np.asarray([0, 8]))


def test_missing_or_replaced_shards_are_unreadable(folder, tmp_path):
    write_manifest(tmp_path, ["0.shard", "1.shard"], [2, 3])
    (tmp_path / "0.shard").write_bytes((folder / "0.shard").read_bytes())
    for index, cause in ((0, "damaged"), (3, "missing")):
        with pytest.raises(video.Unreadable, match=cause):
            records.Shards(tmp_path).open(index).read(np.arange)


@pytest.mark.parametrize(
    "text, told", [(None, "no shards in"), ("{", "is damaged"), ('{"format": 9}', "format 9, not")]
)
def test_mistakes_are_one_line_errors(tmp_path, text, told):
    if text is not None:
        (tmp_path / records.MANIFEST).write_text(text)
    with pytest.raises(UserError, match=told) as caught:
        records.Shards(tmp_path)
    assert "\n" not in str(caught.value)


def test_memory_does_not_grow_with_records(folder, tmp_path):
    """A thousand records and a million, in as many shards, at a late step: the same few kB."""
    nothing = [record()._replace(film=[])]
    for name, count in (("few", 100), ("many", 10_000)):
        records.write_shard(tmp_path / f"{name}.shard", nothing * count)

    def peak(name, count):
        write_manifest(tmp_path, [f"{name}.shard"] * 100, [count] * 100)
        tracemalloc.start()
        clips = records.Shards(tmp_path)
        order = orders.shuffled_order(64, (0, 1), 0, len(clips))
        for index in order.at(np.arange(64 * 10**6, 64 * 10**6 + 64))[1]:
            assert clips[index].label == 0
        found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return len(clips), found

    peak("few", 100)  # what is cached once
    (few, small), (many, large) = peak("few", 100), peak("many", 10_000)
    assert (few, many) == (10_000, 1_000_000)
    assert large[0] < small[0] + 50_000 and large[1] < small[1] + 300_000
