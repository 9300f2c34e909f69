"""Corpora with damaged files, each damaged in a different way."""

import av
import numpy as np

from vtp_jax.data import inputs, records, shapes, shards, sources

CLIPS = 160
DAMAGE = {  # one in twenty
    11: "missing",
    23: "not_a_video",
    42: "not_a_video",
    64: "damaged",
    77: "no_video_stream",
    99: "truncated",
    120: "too_large",
    141: "too_large",
}
# In shards of eight clips: two shards of twenty, and two records.
PER_SHARD = 8
SHARDS = {8 + k: "missing" for k in range(8)} | {24 + k: "damaged" for k in range(8)}
SHARDS |= {3: "damaged", 44: "damaged"}


def write(root, side, frames):
    """Writes 160 videos under `root`; those in DAMAGE are unreadable for those causes."""
    shapes.write(root, shapes.Plan(train=CLIPS, val=1, side=side, frames=frames), workers=1)

    def path(number):
        return root / f"train/{number:05d}.mp4"

    whole = path(1).read_bytes()
    (root / "inner.ts").write_bytes(whole)
    path(11).unlink()
    path(23).write_bytes(b"")
    path(42).write_text(f"#EXTM3U\n#EXTINF:1,\n{root}/inner.ts\n#EXT-X-ENDLIST\n")
    body = whole.index(b"mdat") + 4
    path(64).write_bytes(whole[:body] + bytes(len(whole) - body))
    write_sound(path(77))
    write_short(path(99), side, frames)
    path(120).write_bytes(promise(whole, 30_000_000))
    write_huge(path(141))
    return root


def write_sound(path):
    """Writes an mp4 without a video stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.float32), "fltp", "mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_avi(path, codec, frames, side=64):
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream(codec, rate=8, options=dict(bf="0"))
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for k in range(frames):
            picture = np.full((side, side, 3), k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return bytearray(path.read_bytes())


def write_short(path, side, frames):
    """Writes an avi that is cut after three of the frames that its header promises."""
    data = write_avi(path, "mpeg4", frames, side)
    at = data.index(b"movi")
    for _ in range(4):
        at = data.index(b"00dc", at + 4)
    path.write_bytes(data[:at])


def write_huge(path):
    """Writes an avi whose header declares frames of 30,000 x 30,000 pixels."""
    data = write_avi(path, "rawvideo", 1)
    at = data.index(b"strf") + 12  # after the sizes of this chunk and of its header
    data[at : at + 8] = (30_000).to_bytes(4, "little") * 2
    path.write_bytes(data)


def promise(mp4, count):
    """The mp4 with tables that declare `count` frames of one byte each; its size stays the same."""
    sizes, times = mp4.index(b"stsz") + 4, mp4.index(b"stts") + 12
    data = bytearray(mp4)
    data[sizes + 4 : sizes + 12] = (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    data[times : times + 4] = count.to_bytes(4, "big")
    return bytes(data)


def write_shards(root, side, frames):
    """Writes 160 clips in 20 shards under `root`; those in SHARDS are unreadable: one shard is
    missing, one is cut; one record has a flipped bit in its header, one in its frames."""
    films = root / "films"
    shapes.write(films, shapes.Plan(train=CLIPS, val=1, side=side, frames=frames), workers=1)
    tasks = inputs.plan_files(sources.load(films, films / "train.csv"), PER_SHARD)
    form, out = shards.Form(every=1), root / "shards"
    for task in shards.begin(out, tasks, form):
        shards.make_shard(task, out, form)
    shards.finish(out)
    (out / "000001.shard").unlink()
    cut = out / "000003.shard"
    cut.write_bytes(cut.read_bytes()[:-100])
    clips = records.Shards(out)
    shard, header = clips.open(3)
    flip(shard.path, header.at - 20)
    shard, header = clips.open(44)
    for part in (4, 5):  # frames 3 and 4: every second frame is shown
        flip(shard.path, header.at + sum(header.sizes[:part]) + header.sizes[part] // 2)
    return out


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 4]))
