"""Measures the input pipeline of a config, stage by stage and as a whole, and finds its bottleneck.

    vtp bench data --config simvtp/pretrain_webvid [--clips 200]

read, decode, transform: one clip after the other on one thread; training runs one such thread per
worker. batch (tokenizing a batch) and transfer: whole batches, which training makes one at a time.
Rates are per core, so that one can compute the number of cores that an accelerator needs. together:
the pipeline as training uses it, with all its workers, up to arrays on the devices.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vtp_jax.data import collect, records, rolls, video, workers
from vtp_jax.data import open as opening
from vtp_jax.data.look import Drawn, Look, show
from vtp_jax.run import metrics, sharding
from vtp_jax.setup import build, config

Stage = Callable[[int], Any]  # index of a clip -> the output of a stage of the pipeline
SERIAL = ("batch", "transfer")  # stages that a single thread runs, whatever the number of workers


def measure(cfg: config.Config, clips: int) -> dict[str, Any]:
    """Seconds of one core per clip for each stage, and clips per second of all cores together."""
    data, rows, seed, mesh = cfg.data, cfg.batch, cfg.seed, build.mesh(cfg)
    opened = opening.open_set("data.train", data["kind"], data["train"], "train")
    look = opening.open_look("data.video", data["video"])
    where = opening.make_order(opened, rows, (0, 1), seed)
    _, indices = where.at(np.arange(clips))
    seconds: dict[str, float] = {}
    before = 0.0
    for name, stage in stages(opened, look, seed).items():
        total = time_of(stage, indices.tolist())
        seconds[name], before = max(total - before, 0.0), total

    captions = [(opened.source.clips[i].captions or ("",))[0] for i in indices[:rows].tolist()]
    words = None
    if data.get("text"):
        words = opening.fit("data.text", opening.open_text, data["text"], opened.source)
    loaded = build.data(data, batch=rows, seed=seed)
    with sharding.activate(mesh):
        put = functools.partial(sharding.put, mesh=mesh)
        batches = loaded.batches(0)
        one = next(batches)
        seconds["batch"] = time_of(lambda _: collect.encode(words, captions), range(3)) / rows
        seconds["transfer"] = time_of(lambda _: jax.block_until_ready(put(one)), range(3)) / rows
        together = time_together(batches, put, rows, clips)
    cores = min(data.get("workers") or workers.cores(), workers.cores())
    return dict(
        seconds={name: round(value, 7) for name, value in seconds.items()},
        together=together,
        cores=cores,
        limit=limit(seconds, cores),
    )


def limit(seconds: Mapping[str, float], cores: int) -> str:
    """The bottleneck: the slowest of the stages that workers share, unless a serial stage takes
    longer than all shared ones on `cores` cores."""
    shared = {name: took for name, took in seconds.items() if name not in SERIAL}
    alone = {name: seconds[name] for name in SERIAL}
    if max(alone.values()) > sum(shared.values()) / cores:
        return max(alone, key=lambda name: alone[name])
    return max(shared, key=lambda name: shared[name])


def stages(clips: opening.Clips, look: Look, seed: int) -> dict[str, Stage]:
    """The stages; each one also runs those before it."""

    def drawn(index: int) -> Drawn:
        return Drawn(look, clips.pieces, np.random.default_rng([seed, index]))

    def transform(index: int) -> Any:
        out = np.empty(look.train_shape(clips.pieces), np.uint8)
        show(clips.open(index), drawn(index), out)

    if isinstance(clips.source.clips, records.Shards):
        kept = clips.source.clips

        def decode(index: int) -> Any:
            one, choice = kept.open(index), drawn(index)
            found, _ = one.pick(choice.frames)
            h, w = one.header.record.height, one.header.record.width
            boxes = choice.boxes(h, w)
            return [rolls.decode(roll, h, w, boxes) for roll in found]

        return dict(
            read=lambda index: kept.open(index).pick(drawn(index).frames),
            decode=decode,
            transform=transform,
        )
    whole: dict[str, Stage] = dict(
        decode=lambda index: clips.open(index).read(drawn(index).frames), transform=transform
    )
    if not os.path.isfile(clips.source.file(0)):
        return whole  # drawn in memory
    return dict(read=lambda index: Path(clips.source.file(index)).read_bytes()) | whole


def time_of(stage: Callable[[int], Any], places: Sequence[int] | range) -> float:
    """Mean seconds for each of some indices, after a warm-up run. An unreadable clip counts with
    the time until that is found out."""
    for place in places[:1]:
        attempt(stage, place)
    start = time.perf_counter()
    for place in places:
        attempt(stage, place)
    return (time.perf_counter() - start) / len(places)


def attempt(stage: Callable[[int], Any], place: int) -> None:
    with contextlib.suppress(video.Unreadable, OSError):
        stage(place)


def time_together(
    batches: Iterator[Any], put: Callable[[Any], Any], rows: int, clips: int
) -> float:
    """Clips per second from storage to devices, after the prefetched batches have been used up."""
    for _ in range(workers.AHEAD + 2):
        put(next(batches))
    steps = max(-(-clips // rows), 3)
    start = time.perf_counter()
    for _ in range(steps):
        jax.block_until_ready(put(next(batches)))
    return steps * rows / (time.perf_counter() - start)


def show_table(found: Mapping[str, Any]) -> None:
    seconds, cores, limit = found["seconds"], found["cores"], found["limit"]
    total = sum(seconds.values())
    rows = [
        (name, 1 / max(took, 1e-9), 1e3 * took, f"{100 * took / total:.0f} %")
        for name, took in seconds.items()
    ]
    rows.append(("one after the other", 1 / total, 1e3 * total, "100 %"))
    each = found["together"] / cores
    rows.append((f"together, {cores} cores", each, 1e3 / each, ""))
    columns = ("part", "clips/s/core", "ms/clip/core", "share")
    metrics.print_table("input", columns, rows)
    print(
        f"limit: {limit} ({100 * seconds[limit] / total:.0f} % of the time); "
        f"{metrics.number(found['together'])} clips/s on {cores} cores"
    )
