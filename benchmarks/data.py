"""Video loaders compared on the same videos: `python -m benchmarks.data`. See docs/data.md.

The corpora are rendered videos of 10 s at 30 frames a second with a key frame every 250 frames, at
340x256 and at 1920x1080; --films DIR adds the videos of a folder, which must have constant frame
rates. A clip is 16 frames, 4 apart, at 224 pixels; all loaders return the same frames and the same
crops. Each loader runs in its own process on one core. They alternate in turns of about two
seconds, so that other load on the machine affects all of them equally. Measured is the CPU time of
the process and its children, prefetching included: the least over all turns, and the median of the
ratios within a turn.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import importlib.util
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vtp_jax.data import (
    inputs,
    ops,
    pipeline,
    processes,
    records,
    rolls,
    shards,
    sources,
    video,
    workers,
)
from vtp_jax.data.look import BOXES, LOOK
from vtp_jax.data.order import shuffled_order
from vtp_jax.run import metrics
from vtp_jax.setup import cli

RESULTS = Path(__file__).parent / "results" / "data.jsonl"
FRAMES, STRIDE, SIZE, BATCH = 16, 4, 224, 8
PACKAGES = ("av", "numpy", "pillow", "tensorflow", "tensorflow-cpu", "torch", "torchcodec")
LENGTH = 300  # frames of a video
TURN, IDLE = 2.0, 0.3  # seconds: CPU time of a turn; idle time after which a loader has finished


# The corpus.


def film(seed: int, h: int, w: int) -> Iterator[UInt8[np.ndarray, "h w c"]]:
    """A camera that pans over a textured background, moving discs, and sensor noise.

    Texture and noise are chosen so that a frame of 340x256 compresses like one of a real film: 13
    kB as JPEG of quality 75, at a PSNR of 37 dB (three films of people: 12 to 13 kB, 37 to 38 dB).
    """
    rng = np.random.default_rng(seed)
    big = (2 * h, 2 * w)
    scale = np.hypot(*np.meshgrid(np.fft.fftfreq(big[1]), np.fft.fftfreq(big[0])))
    scale[0, 0] = 1

    def field(power: float, count: int) -> np.ndarray:
        """Noise whose spectrum falls with `power` of the frequency."""
        waves = np.fft.fft2(rng.normal(size=(count, *big))) / scale**power
        found = np.fft.ifft2(waves).real
        return (found - found.mean((1, 2), keepdims=True)) / found.std((1, 2), keepdims=True)

    ground = 128 + 45 * (field(1.4, 1) + 0.25 * field(1.6, 3)).transpose(1, 2, 0)
    noise = rng.normal(scale=4.0, size=(8, *big, 1)).astype(np.float32)
    y, x = np.mgrid[:h, :w]
    discs = rng.uniform([0, 0, h / 12, 0], [h, w, h / 5, 6.28], (4, 4))
    colours = rng.uniform(30, 225, (4, 3))
    for t in range(LENGTH):
        angle = t / 40 + seed
        at_y, at_x = int((1 + np.sin(angle)) * h / 2), int((1 + np.cos(angle / 1.7)) * w / 2)
        frame = ground[at_y : at_y + h, at_x : at_x + w].copy()
        for (cy, cx, radius, way), colour in zip(discs, colours, strict=True):
            py, px = (cy + 2 * t * np.sin(way)) % h, (cx + 2 * t * np.cos(way)) % w
            frame[(y - py) ** 2 + (x - px) ** 2 < radius**2] = colour
        dy, dx = rng.integers(0, h), rng.integers(0, w)
        frame += noise[t % 8, dy : dy + h, dx : dx + w]
        yield np.clip(frame, 0, 255).astype(np.uint8)


def render(folder: Path, name: str, count: int, h: int, w: int) -> None:
    """Writes `count` videos of one size, and their captions."""
    lines = ["path,caption"]
    (folder / name).mkdir(parents=True)
    for number in range(count):
        path = f"{name}/{number:03d}.mp4"
        options = {"crf": "23", "g": "250", "preset": "medium", "threads": "2"}
        with av.open(str(folder / path), "w", options=dict(movflags="faststart")) as container:
            stream: Any = container.add_stream("libx264", rate=Fraction(30), options=options)
            stream.height, stream.width, stream.pix_fmt = h, w, "yuv420p"
            for frame in film(number, h, w):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        lines.append(f"{path},video {number}")
    (folder / f"{name}.csv").write_text("\n".join(lines))


def collect(folder: Path, name: str, films: Path) -> int:
    """Makes a corpus of the videos in a folder; returns their number."""
    (folder / name).mkdir()
    files = [p for p in sorted(films.iterdir()) if p.suffix in sources.VIDEOS]
    for path in files:
        (folder / name / path.name).symlink_to(path.resolve())
    lines = [f"{name}/{path.name},a film" for path in files]
    (folder / f"{name}.csv").write_text("\n".join(["path,caption", *lines]))
    return len(files)


def prepare(folder: Path, name: str) -> dict[str, Any]:
    """Writes the corpus as shards, with the defaults of the command; returns the manifest."""
    source = sources.load(folder, folder / f"{name}.csv")
    out, form = folder / f"{name}.shards", shards.Form()
    tasks = shards.begin(out, inputs.plan_files(source, 128), form)
    for _ in processes.run(tasks, out, form, workers=2, memory=4.0):
        pass
    return shards.finish(out)


# The loaders: endless iterators of batches with the same frames and crops.


def vtp_jax_loader(kind: str, crop: str, folder: str, name: str) -> Iterator[Any]:
    train = dict(root=f"{folder}/{name}.shards")
    if kind == "files":
        train = dict(root=folder, list=f"{folder}/{name}.csv")
    look = dict(frames=FRAMES, stride=STRIDE, size=SIZE, crop=crop)
    data = pipeline.make(kind=kind, batch=BATCH, seed=0, train=train, video=look, workers=1)
    for batch in data.batches(0):
        assert batch["valid"].all()
        yield batch["video"]


def torch_loader(decode: Callable[..., Any], crop: str, folder: str, name: str) -> Iterator[Any]:
    """torch.utils.data.DataLoader with one worker; frames are cropped and resized as uint8 tensors
    in the layout of PyTorch's fast kernel."""
    import torch

    torch.set_num_threads(1)
    source = sources.load(folder, f"{folder}/{name}.csv")
    order = shuffled_order(1, (0, 1), 0, len(source.clips))
    lengths = [video.probe(source.file(i)).frames for i in range(len(source.clips))]

    class Clips(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, index: int) -> tuple[Any, str, int]:
            epoch, which = (int(found[0]) for found in order.at(np.asarray([index])))
            rng = np.random.default_rng([LOOK, 0, epoch, which])  # as the pipeline draws
            numbers = ops.sample_frames(lengths[which], FRAMES, STRIDE, rng)
            frames = decode(source.file(which), numbers)  # t c h w, channels last
            box = BOXES[crop](*frames.shape[2:], SIZE, rng)
            part = frames[:, :, box.y : box.y + box.h, box.x : box.x + box.w]
            if part.shape[2:] != (SIZE, SIZE):
                part = torch.nn.functional.interpolate(
                    part, (SIZE, SIZE), mode="bilinear", antialias=True
                )
            return part.permute(0, 2, 3, 1).contiguous(), source.clips[which].captions[0], which

    for batch, *_ in torch.utils.data.DataLoader(Clips(), BATCH, num_workers=1):
        yield batch


def decode_pyav(path: str, numbers: Sequence[int]) -> Any:
    """Seeks to the preceding key frame and decodes to the last frame; converts only those shown."""
    import torch

    wanted, found = set(int(n) for n in numbers), {}
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        each, start = 1 / (stream.average_rate * stream.time_base), stream.start_time or 0
        container.seek(start + int(min(wanted) * each), stream=stream)
        for frame in container.decode(stream):
            number = round((frame.pts - start) / each)
            if number in wanted:
                found[number] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
            if number >= max(wanted):
                break
    return torch.stack([found[int(n)] for n in numbers]).permute(0, 3, 1, 2)


def decode_torchcodec(path: str, numbers: Sequence[int]) -> Any:
    from torchcodec.decoders import VideoDecoder  # type: ignore

    decoder = VideoDecoder(
        path, num_ffmpeg_threads=1, seek_mode="approximate", dimension_order="NHWC"
    )
    return decoder.get_frames_at([int(n) for n in numbers]).data.permute(0, 3, 1, 2)


LOADERS: dict[str, Callable[..., Iterator[Any]]] = {
    "DataLoader, PyAV, mp4": lambda *a: torch_loader(decode_pyav, *a),
    "DataLoader, torchcodec, mp4": lambda *a: torch_loader(decode_torchcodec, *a),
    "vtp_jax, mp4": lambda *a: vtp_jax_loader("files", *a),
    "vtp_jax, shards": lambda *a: vtp_jax_loader("shards", *a),
}


# Ways to store frames, and files to store records in.


def encode_h264(frames: Sequence[UInt8[np.ndarray, "h w c"]], rate: int, gop: int) -> bytes:
    file = io.BytesIO()
    options = {"crf": "23", "g": str(gop), "preset": "medium"}
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(rate), options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def encode_jpeg(frame: UInt8[np.ndarray, "h w c"]) -> bytes:
    """One frame as JPEG, of the quality used in shards."""
    file = io.BytesIO()
    options = dict(quality=shards.Form().quality, subsampling="4:2:0", optimize=True)
    Image.fromarray(frame).save(file, "JPEG", **options)
    return file.getvalue()


def decode_by_tensorflow(jpegs: Sequence[bytes]) -> None:
    tf = workers.import_tensorflow()
    for jpeg in jpegs:
        tf.io.decode_and_crop_jpeg(jpeg, (16, 58, SIZE, SIZE), dct_method="INTEGER_FAST").numpy()


def decode_by_ffmpeg(jpegs: Sequence[bytes]) -> None:
    codec: Any = av.CodecContext.create("mjpeg", "r")
    codec.thread_count = 1
    for jpeg in jpegs:
        codec.decode(av.Packet(jpeg))


def compare_storage(folder: Path, count: int = 6) -> dict[str, Any]:
    """Two dicts. ways: {way to store the 340x256 videos: (ms a clip, bytes relative to the mp4)};
    reading_ms: milliseconds to read a clip from a shard and from an ArrayRecord."""
    ways: dict[str, tuple[int, Callable[[int], Any]]] = {}
    whole: dict[str, list[bytes]] = collections.defaultdict(list)
    stored: list[list[bytes]] = []
    size = 0
    for number in range(count):
        path = folder / f"340x256/{number:03d}.mp4"
        size += path.stat().st_size
        frames: list[Any] = []
        video.scan(path, 1, frames.append)
        stored.append([encode_jpeg(f) for f in frames[::STRIDE]])
        whole["H.264, each 4th frame, all of them key frames"] += [
            encode_h264(frames[::STRIDE], 8, 1)
        ]
        whole["H.264, each 4th frame, a key frame every 8"] += [encode_h264(frames[::STRIDE], 8, 8)]
        whole["H.264, all frames, a key frame every 12"] += [encode_h264(frames, 30, 12)]
    rng = np.random.default_rng(0)
    room = LENGTH // STRIDE - FRAMES

    def part(number: int) -> list[bytes]:
        start = int(rng.integers(room))
        return stored[number % count][start : start + FRAMES]

    jpeg = sum(len(j) for one in stored for j in one)
    ways["JPEG, each 4th frame, FFmpeg"] = (jpeg, lambda n: decode_by_ffmpeg(part(n)))
    ways["JPEG, each 4th frame, TensorFlow with a crop"] = (
        jpeg,
        lambda n: decode_by_tensorflow(part(n)),
    )
    clips = records.Shards(folder / "340x256.shards")
    chosen = ops.centre_frames(LENGTH, FRAMES, STRIDE)
    held = [clips.open(n).pick(lambda _: chosen)[0] for n in range(count)]
    rolled = sum(len(p) for n in range(count) for p in record_of(clips, n).parts())

    def roll(n: int, crop: str) -> None:
        box = BOXES[crop](256, 340, SIZE, rng)
        for one in held[n % count]:
            rolls.decode(one, 256, 340, [box])

    for crop, what in (("multiscale", "a random crop"), ("window", "224 pixels")):
        ways[f"rolls, {what} of them"] = (rolled, functools.partial(roll, crop=crop))
    for name, files in whole.items():
        step = STRIDE if "all frames" in name else 1

        def read(n: int, files: list[bytes] = files, step: int = step) -> Any:
            numbers = (int(rng.integers(room)) + np.arange(FRAMES)) * step
            return video.read_frames(files[n % count], lambda _: numbers)

        ways[name] = (sum(map(len, files)), read)
    found: dict[str, Any] = {
        name: (cpu_ms(run, 24 if "H.264" in name else 200), total / size)
        for name, (total, run) in ways.items()
    }
    reading = dict(shard=cpu_ms(lambda n: clips.open(n % count).pick(lambda _: chosen), 400))
    if works("array_record.python.array_record_module"):
        from array_record.python import array_record_module as array_record

        path = str(folder / "a.array_record")
        writer = array_record.ArrayRecordWriter(path, "group_size:1")
        for one in stored:
            writer.write(b"".join(one))
        writer.close()
        reader = array_record.ArrayRecordReader(path)
        reading["ArrayRecord"] = cpu_ms(lambda n: reader.read([n % count]), 400)
    return dict(ways=found, reading_ms=reading)


def record_of(clips: records.Shards, index: int) -> records.Record:
    shard, header = clips.open(index)
    return header.record._replace(film=shard.film(header, range(header.frames)))


def cpu_ms(run: Callable[[int], Any], times: int) -> float:
    """CPU milliseconds of the process for one run: the least of three rounds."""
    least = np.inf
    for _ in range(3):
        start = time.process_time()
        for n in range(times):
            run(n)
        least = min(least, (time.process_time() - start) / times)
    return 1e3 * float(least)


# The measurement.


class Loader:
    """A loader in its own process on one core, which produces batches on request."""

    def __init__(self, name: str, crop: str, folder: Path, corpus: str):
        argv = [sys.executable, "-m", "benchmarks.data", "--only", name, crop, str(folder), corpus]
        pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(argv, preexec_fn=pin, **pipes)

    def produce(self, batches: int) -> float:
        """Produces `batches` batches; returns the CPU seconds they took."""
        before = self.cpu()
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{batches}\n")
        self.process.stdin.flush()
        if not self.process.stdout.readline():
            raise RuntimeError(f"{self.process.args} ended")
        # The prefetched amount is constant, but must be complete.
        now, last = self.cpu(), 0.0
        while now > last:
            time.sleep(IDLE)
            now, last = self.cpu(), now
        return now - before

    def cpu(self) -> float:
        """CPU seconds that the process and its children have used."""
        ticks, parents = {}, {}
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = file.read_text().rpartition(")")[2].split()
                pid = int(file.parent.name)
                parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
        family, found = {self.process.pid}, 0
        while found < len(family):
            found = len(family)
            family |= {pid for pid, parent in parents.items() if parent in family}
        return sum(ticks.get(pid, 0) for pid in family) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def pin() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def measure(folder: Path, corpus: str, crop: str, rounds: int) -> dict[str, Any]:
    """{loader: (CPU milliseconds a clip, speed relative to the faster DataLoader)}."""
    names = [n for n in LOADERS if "torchcodec" not in n or works("torchcodec.decoders")]
    loaders = {name: Loader(name, crop, folder, corpus) for name in names}
    try:
        each = {n: one.produce(2) and one.produce(1) / BATCH for n, one in loaders.items()}
        turn = {n: max(round(TURN / BATCH / took), 1) for n, took in each.items()}
        took = [
            {n: one.produce(turn[n]) / turn[n] / BATCH for n, one in loaders.items()}
            for _ in range(rounds)
        ]
    finally:
        for one in loaders.values():
            one.end()
    base = [min(ms for n, ms in one.items() if n.startswith("DataLoader")) for one in took]
    return {
        name: (
            1e3 * min(one[name] for one in took),
            statistics.median(b / one[name] for b, one in zip(base, took, strict=True)),
        )
        for name in names
    }


def versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def works(module: str) -> bool:
    """Whether a module is installed and can be imported."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return False
    code = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True)
    return code.returncode == 0


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--videos", type=int, default=24, help="of 340x256")
    parser.add_argument("--large", type=int, default=4, help="of 1920x1080")
    parser.add_argument("--films", metavar="DIR", help="also measure the videos in this folder")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    args, _ = cli.parse(parser, argv)
    if args.only:
        name, *given = args.only
        batches = LOADERS[name](*given)
        for line in sys.stdin:
            for _ in range(int(line)):
                next(batches)
            print("done", flush=True)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        found: dict[str, Any] = dict(
            machine=f"{platform.machine()}, {os.cpu_count()} cores",
            versions=dict(versions()),
        )
        rows = []
        corpora = {"340x256": (args.videos, 256, 340), "1920x1080": (args.large, 1080, 1920)}
        for corpus, (count, *size) in corpora.items():
            render(folder, corpus, count, *size)
        if args.films:
            corpora["films"] = (collect(folder, "films", Path(args.films)),)
        for corpus, (count, *_) in corpora.items():
            manifest = prepare(folder, corpus)
            found[corpus] = dict(
                mb_each=manifest["bytes_before"] / 1e6 / count,
                ratio=manifest["bytes"] / manifest["bytes_before"],
            )
            print(f"{corpus}: {json.dumps(found[corpus])}", flush=True)
            for crop in ("multiscale", "window") if corpus != "1920x1080" else ("multiscale",):
                found[corpus][crop] = measure(folder, corpus, crop, args.rounds)
                for name, (ms, times) in found[corpus][crop].items():
                    rows.append((corpus, crop, name, 1e3 / ms, f"{times:.2f}"))
        found["storage"] = compare_storage(folder)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
    columns = ("videos", "crop", "loader", "clips/s/core at best", "x the faster DataLoader")
    metrics.print_table("16 frames, 4 apart, at 224 pixels", columns, rows)
    ways = [(way, *numbers) for way, numbers in found["storage"]["ways"].items()]
    metrics.print_table("ways to store them", ("way", "ms/clip", "x the mp4's bytes"), ways)
    print(json.dumps(found["storage"]["reading_ms"]))


if __name__ == "__main__":
    cli.run(main)
