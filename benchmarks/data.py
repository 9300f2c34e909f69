"""Loaders side by side on the same videos: `python -m benchmarks.data`. See docs/data.md.

Rendered corpora of 10 s at 30 frames a second with a key frame every 250: 340x256, and 1920x1080. A
clip is 16 frames, 4 apart, shown at 224 pixels. Each loader runs in a process of its own on one
core; what counts is the CPU time of the process and its children for some clips, less that for
fewer: starting up and what is made ahead cost nothing, nor does what else the machine is doing.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8

from vtp_jax import cli, metrics
from vtp_jax.data import ops, pipeline, records, shards, sources, video

RESULTS = Path(__file__).parent / "results" / "data.jsonl"
FRAMES, STRIDE, SIZE, BATCH = 16, 4, 224, 8
LENGTH = 300  # frames of a video
FEW = 2 * BATCH  # clips of the shorter run


# The corpus.


def film(seed: int, h: int, w: int) -> Iterator[UInt8[np.ndarray, "h w c"]]:
    """A camera that pans over a textured ground, discs that move across it, the sensor's noise."""
    rng = np.random.default_rng(seed)
    big = (2 * h, 2 * w)
    scale = np.hypot(*np.meshgrid(np.fft.fftfreq(big[1]), np.fft.fftfreq(big[0])))
    scale[0, 0] = 1
    waves = np.fft.fft2(rng.normal(size=(3, *big))) / scale**1.1
    ground = np.fft.ifft2(waves).real.transpose(1, 2, 0)
    ground = 128 + 45 * (ground - ground.mean()) / ground.std()
    noise = rng.normal(scale=3.0, size=(8, *big, 1)).astype(np.float32)
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
    """`count` videos of a size, and the file of their captions."""
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


def prepare(folder: Path, name: str) -> dict[str, Any]:
    """The same as shards, as `vtp_jax.prepare shards` makes them by default."""
    source = sources.load(folder, folder / f"{name}.csv")
    out, form = folder / f"{name}.shards", shards.Form()
    tasks = shards.begin(out, shards.plan_files(source, 128), form)
    for _ in shards.run(tasks, out, form, workers=2, memory=4.0):
        pass
    return shards.finish(out)


# The loaders. Each goes through so many clips, in batches, and shows them in the same way.


def ours(kind: str, crop: str, folder: str, name: str, clips: int) -> None:
    train = dict(root=f"{folder}/{name}.shards")
    if kind == "files":
        train = dict(root=folder, captions=f"{folder}/{name}.csv")
    look = dict(frames=FRAMES, stride=STRIDE, size=SIZE, crop=crop)
    data = pipeline.make(kind=kind, batch=BATCH, seed=0, train=train, video=look, workers=1)
    batches = data.batches(0)
    for _ in range(clips // BATCH):
        assert next(batches)["valid"].all()


def theirs(decode: Callable[..., Any], crop: str, folder: str, name: str, clips: int) -> None:
    """torch.utils.data.DataLoader with one worker; frames are cropped and resized as uint8 tensors
    in the layout for which PyTorch has its fast kernel."""
    import torch

    torch.set_num_threads(1)
    source = sources.load(folder, f"{folder}/{name}.csv")

    class Clips(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return clips

        def __getitem__(self, index: int) -> tuple[Any, str, int]:
            rng = np.random.default_rng(index)
            which = int(rng.integers(len(source.clips)))
            numbers = ops.sample_frames(LENGTH, FRAMES, STRIDE, rng)
            frames = decode(source.file(which), numbers)  # t c h w, channels last
            box = pipeline.BOXES[crop](*frames.shape[2:], SIZE, rng)
            part = frames[:, :, box.y : box.y + box.h, box.x : box.x + box.w]
            if part.shape[2:] != (SIZE, SIZE):
                part = torch.nn.functional.interpolate(
                    part, (SIZE, SIZE), mode="bilinear", antialias=True
                )
            return part.permute(0, 2, 3, 1).contiguous(), source.clips[which].captions[0], which

    loader = torch.utils.data.DataLoader(Clips(), BATCH, num_workers=1)
    for batch, *_ in loader:
        assert batch.shape == (BATCH, FRAMES, SIZE, SIZE, 3)


def decode_pyav(path: str, numbers: Sequence[int]) -> Any:
    """To the key frame before, on to the last frame, RGB of those that are shown."""
    import torch

    wanted, found = set(int(n) for n in numbers), {}
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        each = int(1 / (stream.average_rate * stream.time_base))
        container.seek(int(min(wanted)) * each, stream=stream)
        for frame in container.decode(stream):
            number = round(frame.pts / each)
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


LOADERS: dict[str, Callable[..., None]] = {
    "DataLoader, PyAV, mp4": lambda *a: theirs(decode_pyav, *a),
    "DataLoader, torchcodec, mp4": lambda *a: theirs(decode_torchcodec, *a),
    "ours, mp4": lambda *a: ours("files", *a),
    "ours, shards": lambda *a: ours("shards", *a),
}


# What a record may hold, and what it may stand in.


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


def decode_by_tensorflow(jpegs: Sequence[bytes]) -> None:
    tf = pipeline.import_tensorflow()
    for jpeg in jpegs:
        tf.io.decode_and_crop_jpeg(jpeg, (16, 58, SIZE, SIZE), dct_method="INTEGER_FAST").numpy()


def compare_storage(folder: Path, count: int = 6) -> dict[str, Any]:
    """{way: (ms of a clip, bytes over those of the mp4)} of ways to store the 340x256 videos, and
    milliseconds of reading a clip out of a shard and out of an ArrayRecord."""
    ways: dict[str, tuple[int, Callable[[int], Any]]] = {}
    whole: dict[str, list[bytes]] = collections.defaultdict(list)
    stored: list[list[bytes]] = []
    size = 0
    for number in range(count):
        path = folder / f"340x256/{number:03d}.mp4"
        size += path.stat().st_size
        frames: list[Any] = []
        video.scan(path, 1, frames.append)
        stored.append([records.encode_jpeg(f, shards.Form().quality) for f in frames[::STRIDE]])
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
    ways["JPEG, each 4th frame, FFmpeg's decoder"] = (
        jpeg,
        lambda n: records.decode(part(n), 256, 340),
    )
    ways["JPEG, each 4th frame, TensorFlow's with a crop"] = (
        jpeg,
        lambda n: decode_by_tensorflow(part(n)),
    )
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
    clips = records.Shards(folder / "340x256.shards")
    numbers = ops.centre_frames(LENGTH, FRAMES, STRIDE)
    reading = dict(shard=cpu_ms(lambda n: clips.pick(n % count, lambda _: numbers), 400))
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


def cpu_ms(run: Callable[[int], Any], times: int) -> float:
    """CPU milliseconds of the whole process for a run: the least of three rounds."""
    least = np.inf
    for _ in range(3):
        start = time.process_time()
        for n in range(times):
            run(n)
        least = min(least, (time.process_time() - start) / times)
    return 1e3 * float(least)


# The measurement.


def cpu_seconds(name: str, crop: str, folder: Path, corpus: str, clips: int) -> float:
    """Of a whole run in a process of its own, with its children."""
    argv = [sys.executable, "-m", "benchmarks.data", "--only", name, crop, str(folder), corpus]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*argv, str(clips)], check=True, preexec_fn=pin)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(getattr(after, k) - getattr(before, k) for k in ("ru_utime", "ru_stime"))


def pin() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def measure(folder: Path, corpus: str, crop: str, slow: int, fast: int, rounds: int) -> dict:
    """{loader: CPU milliseconds of a clip}, the least of some rounds in turns; None where a loader
    is not installed."""
    found: dict[str, float | None] = {name: None for name in LOADERS}
    for _ in range(rounds):
        for name in LOADERS:
            if "torchcodec" in name and not works("torchcodec.decoders"):
                continue
            more = fast if "shards" in name else slow
            few, many = (cpu_seconds(name, crop, folder, corpus, n) for n in (FEW, FEW + more))
            took = 1e3 * (many - few) / more
            found[name] = min(found[name] or np.inf, took)
    return found


def works(module: str) -> bool:
    """Whether a module is there and can be imported."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return False
    code = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True)
    return code.returncode == 0


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--videos", type=int, default=24, help="of 340x256")
    parser.add_argument("--large", type=int, default=4, help="of 1920x1080")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs=5, help=argparse.SUPPRESS)
    args, _ = cli.parse(parser, argv)
    if args.only:
        name, *given, clips = args.only
        LOADERS[name](*given, int(clips))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        found: dict[str, Any] = dict(
            machine=f"{platform.machine()}, {os.cpu_count()} cores",
            versions={k: version(k) for k in ("av", "torch", "tensorflow-cpu")},
        )
        rows = []
        for corpus, count, h, w in (
            ("340x256", args.videos, 256, 340),
            ("1920x1080", args.large, 1080, 1920),
        ):
            render(folder, corpus, count, h, w)
            manifest = prepare(folder, corpus)
            sizes = dict(
                mb_each=manifest["bytes_before"] / 1e6 / count,
                ratio=manifest["bytes"] / manifest["bytes_before"],
                decode_fps=1e3 / decode_ms(folder / f"{corpus}/000.mp4"),
            )
            found[corpus] = dict(sizes)
            for crop in ("multiscale", "window") if h == 256 else ("multiscale",):
                slow, fast = (6 * BATCH, 60 * BATCH) if h == 256 else (2 * BATCH, 40 * BATCH)
                took = measure(folder, corpus, crop, slow, fast, args.rounds)
                found[corpus][crop] = took
                base = took["DataLoader, PyAV, mp4"]
                for name, ms in took.items():
                    shown = ("not installed", "") if ms is None else (1e3 / ms, f"{base / ms:.2f}")
                    rows.append((corpus, crop, name, *shown))
            print(f"{corpus}: {json.dumps(sizes)}")
            if h == 256:
                found["storage"] = compare_storage(folder)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
    columns = ("videos", "crop", "loader", "clips/s/core", "x DataLoader with PyAV")
    metrics.print_table("16 frames, 4 apart, at 224 pixels", columns, rows)
    ways = [(way, *numbers) for way, numbers in found["storage"]["ways"].items()]
    metrics.print_table("ways to store them", ("way", "ms/clip", "x the mp4's bytes"), ways)
    print(json.dumps(found["storage"]["reading_ms"]))


def decode_ms(path: Path) -> float:
    """CPU milliseconds of a frame, decoded in order."""
    start = time.thread_time()
    return 1e3 * (video.scan(path) and time.thread_time() - start) / LENGTH


if __name__ == "__main__":
    cli.run(main)
