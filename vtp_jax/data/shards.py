"""From tasks (inputs.py) to a folder of shards: the output of `vtp prepare shards`.

A task is done once its shard and then its summary have been renamed into place, so a run that is
killed at any moment can be resumed, and no clip is repeated or missing. `make_shard` is a plain
function of a task; processes.py runs it, in processes of this machine or on Apache Beam.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from vtp_jax import lines
from vtp_jax.data import ops, records, rolls, tars, video
from vtp_jax.data.inputs import Item, Task
from vtp_jax.data.sources import clean
from vtp_jax.types import UserError

PLAN, REMOVED = "plan.json", "removed.txt"
CAUSES = {
    **video.CAUSES,
    **tars.CAUSES,
    "stuck": "decoding did not end, and was stopped",
    "crashed": "the process that decoded it died",
    "failed": "an unexpected error, which is recorded in the manifest",
    "damaged_text": "its JSON or text in the tar is damaged",
    "no_caption": "it has no text, but text is required",
    "removed": "taken down",
}
LOWER = (0, 15, 30)  # steps by which quality is lowered, until a clip is small enough
PIECE = 2**28  # bytes of frames of a part that are decoded together


class Form(NamedTuple):
    """How clips are stored.

    short_side: pixels, to which larger videos are shrunk; every: frames 0, every, 2 every, ... are
    stored; quality: of JPEG; ratio: quality is lowered by 15 or 30 if a clip would otherwise have
    more than `ratio` times the bytes of its video (0: never); seconds: limit for a video, of one
    core; captioned: whether every clip needs a caption; pixels: of the largest picture that is
    decoded
    """

    short_side: int = 256
    every: int = 4
    quality: int = 75
    ratio: float = 3.0
    seconds: float = video.WHOLE.seconds
    captioned: bool = True
    pixels: int = video.WHOLE.pixels

    @property
    def limits(self) -> video.Limits:
        return video.WHOLE._replace(pixels=self.pixels, seconds=self.seconds)


# One clip, one shard.


def store(item: Item, form: Form) -> tuple[dict[str, Any], int]:
    """(the fields of a record that come from a clip's media, the size of the media in bytes; 0 for
    frames in memory). Raises Unreadable."""
    (_, media), part = item, item.clip.part
    if isinstance(media, str):
        if not os.path.isfile(media):
            raise video.Unreadable("missing")
        with open(media, "rb") as file:
            digest, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    else:
        content = media if isinstance(media, bytes) else media[0].tobytes()
        digest, size = hashlib.sha256(content).hexdigest(), len(content)
    cut = None
    if part is not None and not isinstance(media, tuple):
        cut = find_part(media, part, form.limits)
        size = size * len(cut.numbers) // cut.frames
    most = form.ratio * size if form.ratio and not isinstance(media, tuple) else float("inf")
    for lower in LOWER:
        try:
            quality = max(form.quality - lower, 1)
            last = lower == LOWER[-1]
            film = encode(media, cut, form, quality, float("inf") if last else most)
            break
        except Large:
            continue
    return dict(film, sha256=digest, every=form.every), size if not isinstance(media, tuple) else 0


class Cut(NamedTuple):
    """Some frames of a video. frames: of the whole video; size: bytes of a frame; rate: frames per
    second."""

    numbers: range
    frames: int
    size: int
    rate: float


def find_part(media: str | bytes, part: tuple[float, float], limits: video.Limits) -> Cut:
    """The frames within a time span, by their time stamps, in seconds from the first frame. Raises
    Unreadable."""
    check = video.start_clock(limits.seconds)
    with video.open_video(media, limits) as (container, stream), video.reading():
        packets = video.demux(container, stream, check)
        shown = (p.pts for p in packets if p.size and not p.is_discard)
        stamps = list(itertools.islice(shown, limits.frames + 1))
        video.check_count(len(stamps), limits)
        rate, unit = float(stream.average_rate or 0), float(stream.time_base)
        declared = stream.height, stream.width
    first = functools.partial(video.first_shape, media, limits, check)
    h, w = video.look_up(first, declared)
    size = 3 * h * w
    if len(set(stamps) - {None}) == len(stamps) > 0:
        times = (np.sort(stamps) - min(stamps)) * unit
    elif rate:
        times = np.arange(len(stamps)) / rate
    else:
        raise video.Unreadable("damaged", "no time stamps")
    first, last = np.searchsorted(times, np.asarray(part) - 1e-6).tolist()
    if first >= last:
        raise video.Unreadable("no_frames", f"none from {part[0]:g} to {part[1]:g} s")
    return Cut(range(first, last), len(times), size, rate)


def read_part(
    media: str | bytes, numbers: range, size: int, pixels: int
) -> Iterator[UInt8[np.ndarray, "h w c"]]:
    """Frames of `size` bytes by their numbers, with few in memory at a time."""
    step, limits = max(PIECE // size, 1), video.LIMITS._replace(pixels=pixels)
    for start in range(0, len(numbers), step):
        some = np.asarray(numbers[start : start + step])
        yield from video.read_frames(media, lambda n, some=some: np.minimum(some, n - 1), limits)


class Large(Exception):
    """The frames have more bytes than allowed."""


def encode(
    media: str | bytes | tuple[np.ndarray, float],
    cut: Cut | None,
    form: Form,
    quality: int,
    most: float,
) -> dict[str, Any]:
    """frames, rate, height, width, capacity and film of a record. Raises Large, Unreadable."""
    made: list[rolls.Roll] = []
    waiting: list[np.ndarray] = []
    left, h, w, capacity = most, 0, 0, 0

    def use(frame: UInt8[np.ndarray, "h w c"]) -> None:
        nonlocal h, w, capacity
        if not capacity:
            h, w = fit(frame.shape[0], frame.shape[1], form.short_side)
            capacity = rolls.capacity(h, w)
        (small,) = ops.resize(frame[None], h, w)
        waiting.append(small)
        if len(waiting) == capacity:
            roll_up()

    def roll_up() -> None:
        nonlocal left
        made.append(rolls.encode(np.stack(waiting), quality))
        waiting.clear()
        left -= len(made[-1].head) + sum(map(len, made[-1].frames))
        if left < 0:
            raise Large

    if isinstance(media, tuple):
        film, rate = media
        if film.dtype != np.uint8 or film.ndim != 4 or film.shape[-1] != 3 or not film.size:
            raise video.Unreadable("not_a_video", f"{film.dtype}{film.shape}")
        frames = len(film)
        for frame in film[:: form.every]:
            use(frame)
    elif cut is not None:
        frames, rate = len(cut.numbers), cut.rate
        for frame in read_part(media, cut.numbers[:: form.every], cut.size, form.pixels):
            use(frame)
    else:
        info = video.scan(media, form.every, use, form.limits)
        frames, rate = info.frames, info.rate
    if waiting:
        roll_up()
    return dict(frames=frames, rate=rate, height=h, width=w, capacity=capacity, film=made)


def fit(h: int, w: int, short_side: int) -> tuple[int, int]:
    """The sides of a picture, shrunk if its short side is larger than `short_side`."""
    scale = min(short_side / min(h, w), 1.0)
    return max(round(h * scale), 1), max(round(w * scale), 1)


def make_shard(
    task: Task,
    out: Path,
    form: Form,
    removed: AbstractSet[str] = frozenset(),
    skip: Mapping[int, str] = {},
    tell: Callable[[int], None] = lambda number: None,
) -> None:
    """Writes a shard, then its summary.

    removed: ids to exclude; skip: numbers of items to reject -> the cause; tell: called with the
    number of each item before it is read
    """
    ids: dict[str, None] = {}
    refused: list[tars.Refused] = []
    facts = dict(captions=[], classes=[0], bytes_before=[])

    def refuse(key: str, cause: str, detail: str = "") -> None:
        refused.append(tars.Refused(clean(key), cause, clean(detail)))

    def make_records() -> Iterator[records.Record]:
        items, same, film = iter(task.items()), None, {}
        for number in itertools.count():
            tell(number)
            item = next(items, None)
            if item is None:
                return
            if isinstance(item, tars.Refused):
                refuse(*item)
                continue
            clip, media = item
            key, size = clean(clip.id or clip.path), 0
            try:
                if key in removed:
                    raise video.Unreadable("removed")
                if key in ids:
                    raise video.Unreadable("duplicate")
                if number in skip:
                    raise video.Unreadable(skip[number])
                if form.captioned and not clip.captions:
                    raise video.Unreadable("no_caption")
                if not isinstance(media, str) or (media, clip.part) != same:
                    same = None
                    film, size = store(item, form)
                    same = (media, clip.part)
            except video.Unreadable as error:
                refuse(key, error.cause, error.detail)
                continue
            except MemoryError:
                refuse(key, "too_large", "out of memory")
                continue
            except Exception as error:  # a single clip must not stop millions of others
                refuse(key, "failed", f"{type(error).__name__}: {error}")
                continue
            ids[key] = None
            facts["captions"].append(len(clip.captions))
            facts["classes"].append(-1 if clip.label is None else clip.label)
            facts["bytes_before"].append(size)
            yield records.Record(
                id=key,
                captions=tuple(map(clean, clip.captions)),
                spans=clip.spans,
                label=clip.label,
                source=clean(clip.source),
                licence=clean(clip.licence),
                **film,
            )

    path = out / task.name
    records.write_shard(path, make_records())
    summary = dict(
        summarize(path, list(ids)),
        captions=min(facts["captions"], default=0),
        classes=max(facts["classes"][1:], default=-1) + 1,
        bytes_before=sum(facts["bytes_before"]),
        refused=refused,
    )
    write_json(summary_of(path), summary)


def summarize(path: Path, ids: Sequence[str]) -> dict[str, Any]:
    """The fields of a summary that are determined by the shard's file and its ids."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return dict(name=path.name, records=len(ids), bytes=path.stat().st_size, sha256=digest, ids=ids)


def summary_of(shard: Path) -> Path:
    return shard.with_suffix(".json")


def is_done(out: Path, task: Task) -> bool:
    shard = out / task.name
    try:
        summary = json.loads(summary_of(shard).read_text(encoding="utf-8"))
        return shard.stat().st_size == summary["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def write_json(path: Path, what: Any) -> None:
    """Writes a JSON file atomically."""
    new = records.temporary(path)
    with new.open("w", encoding="utf-8") as file:
        json.dump(what, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


# The folder.


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
    """Creates a folder and locks it against other runs. Raises UserError if one is active."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}") from None
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UserError(f"another run is active in {out}; wait until it ends") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(folder)


def begin(out: Path, tasks: Sequence[Task], form: Form) -> list[Task]:
    """Writes the plan of a folder, and returns the tasks that are not done yet. Raises UserError if
    the folder has another plan."""
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(repr(task).encode("utf-8", "surrogatepass"))
    names = [task.name for task in tasks]
    plan = dict(form=form._asdict(), tasks=names, digest=digest.hexdigest())
    if (out / PLAN).exists() and read_plan(out) != plan:
        raise UserError(
            f"{out} holds shards of another collection, or made with other options; "
            "give the same ones to resume, or another --out"
        )
    write_json(out / PLAN, plan)
    for left in out.glob("*.new"):
        left.unlink()
    return [task for task in tasks if not is_done(out, task)]


def read_plan(out: Path) -> dict[str, Any]:
    try:
        plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
        # A folder may be older than the last fields of `Form`.
        form = {**Form()._asdict(), **plan["form"]}
        return dict(form=form, tasks=list(plan["tasks"]), digest=plan["digest"])
    except OSError:
        raise UserError(f"no shards in '{out}'") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{out / PLAN} is damaged; delete it and run the same command") from None


def read_summary(shard: Path) -> dict[str, Any]:
    try:
        found = json.loads(summary_of(shard).read_text(encoding="utf-8"))
        if not shard.is_file():
            raise FileNotFoundError
        return found
    except (OSError, ValueError):
        raise UserError(
            f"{shard.parent} is not finished: {shard.name} or its summary is missing; "
            "run `prepare shards` to completion first"
        ) from None


def read_removed(out: Path) -> frozenset[str]:
    """The ids that have been taken down."""
    path = out / REMOVED
    return frozenset(one for _, one in lines.each(path) if one) if path.exists() else frozenset()


def finish(out: Path) -> dict[str, Any]:
    """Writes the manifest: the content of all shards, and all rejected clips, by cause. If records
    share an id, only the first is kept."""
    plan = read_plan(out)
    shards, rejected = [], []
    seen: set[str] = set()
    for name in plan["tasks"]:
        one = read_summary(out / name)
        take_out(out / name, one, seen, "duplicate")
        rejected += [dict(id=i, cause=c, detail=d, shard=name) for i, c, d in one.pop("refused")]
        seen.update(one.pop("ids"))
        shards.append(one)
    full = [one for one in shards if one["records"]]
    causes = collections.Counter(one["cause"] for one in rejected)
    content = hashlib.sha256("".join(one["sha256"] for one in shards).encode()).hexdigest()
    manifest = dict(
        format=records.FORMAT,
        **plan["form"],
        records=sum(one["records"] for one in full),
        bytes=sum(one["bytes"] for one in full),
        bytes_before=sum(one["bytes_before"] for one in full),
        captions=min((one["captions"] for one in full), default=0),
        classes=max((one["classes"] for one in full), default=0),
        sha256=content,
        causes=dict(sorted(causes.items())),
        shards=shards,
        rejected=rejected,
    )
    write_json(out / records.MANIFEST, manifest)
    return manifest


def remove(out: Path, ids: Collection[str]) -> tuple[dict[str, Any], int, list[str]]:
    """Removes records from finished shards; the others are unchanged. A run that is resumed later
    does not add them again. Returns the manifest, the number of records that were removed now, and
    the ids that no record has or had, in their order."""
    names = read_plan(out)["tasks"]
    with hold(out):
        summaries = {out / name: read_summary(out / name) for name in names}
        # Everything removed so far: an earlier removal may have been killed before it was done.
        there = {one for found in summaries.values() for one in found["ids"]}
        gone = {one for found in summaries.values() for one, *_ in found["refused"]}
        unknown = [one for one in ids if one not in there | gone]
        known = read_removed(out) | (set(ids) - set(unknown))
        new = records.temporary(out / REMOVED)
        new.write_text("".join(f"{one}\n" for one in sorted(known)), encoding="utf-8")
        os.replace(new, out / REMOVED)
        for path, one in summaries.items():
            take_out(path, one, known, "removed")
        return finish(out), len(there & known), unknown


def take_out(shard: Path, summary: dict[str, Any], ids: AbstractSet[str], cause: str) -> None:
    """Removes the records with these ids, if any, from a shard and from its summary."""
    gone = [one for one in summary["ids"] if one in ids]
    if not gone:
        return
    try:
        kept = (one for one in records.Shard(shard).records() if one.id not in ids)
        records.write_shard(shard, kept)
    except video.Unreadable as error:
        raise UserError(f"{shard}: {error}; delete it and run `prepare shards` again") from None
    summary.update(summarize(shard, [one for one in summary["ids"] if one not in ids]))
    summary["refused"] += [[one, cause, ""] for one in gone]
    write_json(summary_of(shard), summary)
