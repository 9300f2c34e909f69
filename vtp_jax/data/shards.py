"""From a collection of videos to a folder of shards: what `vtp_jax.prepare shards` does.

The work is cut into tasks, one for each shard, in a way that depends on the collection alone. A
task is done when its shard and then its summary have been renamed into place, so that a run which
is killed at any moment goes on where it was, and no clip is there twice or missing. A task is a
plain function of its own; where it runs (processes here, or Apache Beam) is no concern of it.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import resource
import select
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from vtp_jax.data import ops, records, rolls, tars, video
from vtp_jax.data.sources import VIDEOS, Clip, Source, clean
from vtp_jax.types import UserError

PLAN, REMOVED = "plan.json", "removed.txt"
CAUSES = {
    **video.CAUSES,
    **tars.CAUSES,
    "stuck": "decoding did not end, and was ended",
    "crashed": "the process that decoded it died",
    "failed": "an error that nobody thought of, which the manifest tells",
    "damaged_text": "what a tar says of it is no JSON or text",
    "no_caption": "it has no text, where text is asked for",
    "removed": "taken down",
}
LOWER = (0, 15, 30)  # what quality is lowered by, until a clip is small enough
POLL = 1.0  # seconds
PATIENCE = 60.0  # seconds without a word, beside twice those that a video may take
PIECE = 2**28  # bytes of frames of a part that are decoded at once


class Form(NamedTuple):
    """How clips are stored.

    short_side: pixels, of larger videos; every: of so many frames one is stored; quality: of JPEG;
    ratio: quality falls by 15 or 30 where a clip would have more than so many times the bytes of
    its video (0: never); seconds: of one core, that a video may take; captioned: whether each must
    have a caption
    """

    short_side: int = 256
    every: int = 4
    quality: int = 75
    ratio: float = 3.0
    seconds: float = video.SCAN_SECONDS
    captioned: bool = True


class Item(NamedTuple):
    """A clip to be stored. media: its file, what is in it, or its frames, uint8 "t h w c", and
    how many there are in a second."""

    clip: Clip
    media: str | bytes | tuple[np.ndarray, float]


Items = Callable[[], Iterator[Item | tars.Refused]]


class Task(NamedTuple):
    """A shard to be made. name: of its file; items: what may come into it, so many about."""

    name: str
    items: Items
    count: int


# What there is.


class FromFiles(NamedTuple):
    """Clips of a source, by their files."""

    root: str
    clips: Sequence[Clip]

    def __call__(self) -> Iterator[Item | tars.Refused]:
        for clip in self.clips:
            yield Item(clip, os.path.join(self.root, clip.path))


class FromTar(NamedTuple):
    """The samples of a tar; captions from .txt, or else from that field of .json; before their ids
    comes `prefix`."""

    path: str
    field: str
    source: str
    licence: str
    prefix: str = ""

    def __call__(self) -> Iterator[Item | tars.Refused]:
        for found in tars.read(self.path):
            found = found._replace(key=self.prefix + found.key)
            yield found if isinstance(found, tars.Refused) else self.open(found)

    def open(self, sample: tars.Sample) -> Item | tars.Refused:
        media = [m for suffix, m in sample.members.items() if suffix in VIDEOS]
        if not media:
            return tars.Refused(sample.key, "missing", "no video in this sample")
        try:
            known = json.loads(sample.members.get(".json", b"{}"))
            text = sample.members.get(".txt", b"").decode().strip()
        except (ValueError, RecursionError) as error:
            return tars.Refused(sample.key, "damaged_text", str(error))
        known = known if isinstance(known, Mapping) else {}
        told = text or known.get(self.field) or []
        told = [told] if isinstance(told, str) else told
        if not isinstance(told, list) or not all(isinstance(one, str) for one in told):
            return tars.Refused(sample.key, "damaged_text", f"'{self.field}' is not text")

        def get(name: str) -> str:
            return one if isinstance(one := known.get(name), str) else ""

        clip = Clip(
            path=sample.key,
            captions=tuple(filter(None, map(str.strip, told))),
            source=get("url") or self.source,
            licence=get("license") or self.licence,
        )
        return Item(clip, media[0])


class FromTfds(NamedTuple):
    """Examples of a TFDS set that is prepared already. columns: the features that hold frames,
    caption, label and id, "" where there are none."""

    name: str
    data_dir: str | None
    split: str
    start: int
    stop: int
    columns: tuple[str, str, str, str]
    source: str
    licence: str

    def __call__(self) -> Iterator[Item | tars.Refused]:
        import tensorflow_datasets as tfds

        split = f"{self.split}[{self.start}:{self.stop}]"
        data: Any = tfds.load(self.name, split=split, data_dir=self.data_dir, download=False)
        frames, caption, label, key = self.columns
        for number, row in enumerate(tfds.as_numpy(data), self.start):
            told = np.ravel(row[caption]) if caption else ()
            clip = Clip(
                path=row[key].decode("utf-8", "replace") if key else f"{self.split}/{number}",
                captions=tuple(t.decode("utf-8", "replace").strip() for t in told),
                label=int(row[label]) if label else None,
                source=self.source,
                licence=self.licence,
            )
            media = row[frames]
            yield Item(clip, media if isinstance(media, bytes) else (np.asarray(media), 0.0))


def plan_files(source: Source, per_shard: int) -> list[Task]:
    """Tasks of so many clips each."""
    ids = collections.Counter(clip.id or clip.path for clip in source.clips)
    if twice := [name for name, count in ids.items() if count > 1]:
        raise UserError(f"{len(twice)} ids stand twice, first '{twice[0]}'; each needs its own")
    starts = range(0, len(source.clips), per_shard)
    parts = [tuple(source.clips[i : i + per_shard]) for i in starts]
    return [
        Task(f"{n:06d}.shard", FromFiles(source.root, part), len(part))
        for n, part in enumerate(parts)
    ]


def plan_tars(paths: Sequence[str], field: str, source: str, licence: str) -> list[Task]:
    """A task for each tar, named after it; folders stand for the tars in them. Where two tars have
    samples of one name, all ids begin with the tar's."""
    found: list[Path] = []
    for path in map(Path, paths):
        found += sorted(path.glob("*.tar")) if path.is_dir() else [path]
    for path in found:
        if path.suffix != ".tar" or not path.is_file():
            raise UserError(f"'{path}' is no .tar file; unpack compressed ones first")
    if not found:
        raise UserError(f"no .tar files in {', '.join(map(str, paths))}")
    names = [path.stem for path in found]
    if len(set(names)) < len(names):
        raise UserError("two tars have the same name; a shard is named after its tar")
    counts, hashes = [], []
    for path in found:
        keys = tars.keys(str(path))
        counts.append(len(keys))
        hashes.append(np.unique(np.asarray([hash(key) for key in keys], np.int64)))
    known = np.concatenate(hashes)
    twice = len(np.unique(known)) < len(known)
    return [
        Task(f"{n}.shard", FromTar(str(p), field, source, licence, f"{n}/" if twice else ""), count)
        for n, p, count in zip(names, found, counts, strict=True)
    ]


def plan_tfds(
    name: str,
    split: str,
    data_dir: str | None,
    per_shard: int,
    columns: tuple[str, str, str, str],
    source: str,
    licence: str,
) -> list[Task]:
    """Tasks of so many examples each, of a split or what TFDS makes of one, such as train[:60%]."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError("--tfds needs tensorflow-datasets, which is not installed") from None
    try:
        info = tfds.builder(name, data_dir=data_dir).info
        features: Any = info.features or {}
        parts: Any = tfds.core.ReadInstruction.from_spec(split).to_absolute(info.splits)
        ends = [p.to or info.splits[p.splitname].num_examples for p in parts]  # type: ignore
    except (ValueError, KeyError, AssertionError, tfds.core.DatasetNotFoundError) as error:
        raise UserError(f"TFDS: {' '.join(str(error).split())[:300]}") from None
    if wrong := [c for c in columns if c and c not in features]:
        known = ", ".join(map(str, features))
        raise UserError(f"{name} has no feature '{wrong[0]}'; it has {known}")
    tasks: list[Task] = []
    for part, end in zip(parts, ends, strict=True):
        for start in range(part.from_ or 0, end, per_shard):
            stop = min(start + per_shard, end)
            items = FromTfds(name, data_dir, part.splitname, start, stop, columns, source, licence)
            tasks.append(Task(f"{len(tasks):06d}.shard", items, stop - start))
    return tasks


# One clip, one shard.


def store(item: Item, form: Form) -> tuple[dict[str, Any], int]:
    """What a record has of a clip's media, and how many bytes these had. Raises Unreadable."""
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
        cut = find_part(media, part, form.seconds)
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
    """Some frames of a video that has so many, of so many bytes each, and so many in a second."""

    numbers: range
    frames: int
    size: int
    rate: float


def find_part(media: str | bytes, part: tuple[float, float], seconds: float) -> Cut:
    """The frames shown from one moment until another, by their time stamps, in seconds from the
    first frame on. Raises Unreadable."""
    check = video.start_clock(seconds)
    with video.open_video(media) as (container, stream):
        packets = video.demux(container, stream, check)
        stamps = [p.pts for p in packets if p.size and not p.is_discard]
        video.check_count(len(stamps))
        rate, unit = float(stream.average_rate or 0), float(stream.time_base)
        size = 3 * stream.width * stream.height
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
    media: str | bytes, numbers: range, size: int
) -> Iterator[UInt8[np.ndarray, "h w c"]]:
    """Frames of `size` bytes by their numbers, of which few are held at once."""
    step = max(PIECE // size, 1)
    for start in range(0, len(numbers), step):
        some = np.asarray(numbers[start : start + step])
        yield from video.read_frames(media, lambda n, some=some: np.minimum(some, n - 1))


class Large(Exception):
    """The frames have more bytes than they may."""


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
        for frame in read_part(media, cut.numbers[:: form.every], cut.size):
            use(frame)
    else:
        info = video.scan(media, form.every, use, form.seconds)
        frames, rate = info.frames, info.rate
    if waiting:
        roll_up()
    return dict(frames=frames, rate=rate, height=h, width=w, capacity=capacity, film=made)


def fit(h: int, w: int, short_side: int) -> tuple[int, int]:
    """Sides of a picture, shrunk to a short side if they are larger."""
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
    """Writes a shard, and then its summary.

    removed: ids that must not come into it; skip: numbers of items that are refused, and why;
    tell: called with the number of each item before it is looked for
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
            except Exception as error:  # of one clip among millions: not the others' affair
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
    """What the file itself tells of a shard."""
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
    """Whole or not at all."""
    new = records.temporary(path)
    with new.open("w", encoding="utf-8") as file:
        json.dump(what, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


# All of them.


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
    """Makes a folder, and keeps other runs out of it. Raises UserError where one is at work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}") from None
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UserError(f"another run is at work in {out}; wait for its end") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(folder)


def begin(out: Path, tasks: Sequence[Task], form: Form) -> list[Task]:
    """Writes down what is to be done, and tells what of it is not done yet. Raises UserError where
    something else was begun in this folder."""
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(repr(task).encode("utf-8", "surrogatepass"))
    names = [task.name for task in tasks]
    plan = dict(form=form._asdict(), tasks=names, digest=digest.hexdigest())
    if (out / PLAN).exists() and read_plan(out) != plan:
        raise UserError(
            f"{out} holds shards of another collection, or made with other options; "
            "give the same ones to go on, or another --out"
        )
    write_json(out / PLAN, plan)
    for left in out.glob("*.new"):
        left.unlink()
    return [task for task in tasks if not is_done(out, task)]


def read_plan(out: Path) -> dict[str, Any]:
    try:
        plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
        return dict(form=plan["form"], tasks=list(plan["tasks"]), digest=plan["digest"])
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
            f"{shard.parent} is not finished: {shard.name} is not there, or its summary; "
            "run `prepare shards` to its end first"
        ) from None


def read_removed(out: Path) -> frozenset[str]:
    """The ids that have been taken down."""
    path = out / REMOVED
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return frozenset(filter(None, map(str.strip, lines)))


def finish(out: Path) -> dict[str, Any]:
    """Writes the manifest: what all shards hold, and everything that was refused, by cause. Of
    records with one id the first is kept."""
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


def remove(out: Path, ids: Iterable[str]) -> dict[str, Any]:
    """Takes records out of finished shards; the others stay as they are. A run that goes on later
    does not bring them back. Returns the manifest."""
    names = read_plan(out)["tasks"]
    with hold(out):
        summaries = {out / name: read_summary(out / name) for name in names}
        # All that was ever taken down: a run may have been killed before it was done.
        known = read_removed(out) | set(ids)
        new = records.temporary(out / REMOVED)
        new.write_text("".join(f"{one}\n" for one in sorted(known)), encoding="utf-8")
        os.replace(new, out / REMOVED)
        for path, one in summaries.items():
            take_out(path, one, known, "removed")
        return finish(out)


def take_out(shard: Path, summary: dict[str, Any], ids: AbstractSet[str], cause: str) -> None:
    """Takes the records of these ids out of a shard, if it has any, and of its summary."""
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


# Where it runs.


class Running:
    """A task in a process of its own. at: the item it is at (-1: none yet); quiet: polls since it
    said so."""

    def __init__(self, start: Callable[..., Any], task: Task, skip: Mapping[int, str]):
        self.task, self.skip = task, dict(skip)
        self.at, self.quiet = -1, 0
        self.process, self.connection = start(task, self.skip)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def run(
    tasks: Sequence[Task], out: Path, form: Form, *, workers: int, memory: float
) -> Iterator[int]:
    """Makes shards in so many processes at once; yields how many items have been gone through, now
    and then. memory: GiB that a process may use.

    A process that dies or does not get on is started again without the clip that it was at, which
    is refused as `crashed` or `stuck`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    removed = read_removed(out)

    def start(task: Task, skip: Mapping[int, str]) -> tuple[Any, Connection]:
        ours, theirs = context.Pipe(duplex=False)
        given = (theirs, task, out, form, removed, skip, memory)
        process = context.Process(target=work, args=given, daemon=True)
        process.start()
        theirs.close()
        return process, ours

    waiting = collections.deque((task, {}) for task in tasks)
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(Running(start, *waiting.popleft()))
            ready = wait([one.connection for one in running], timeout=POLL)
            for one in list(running):
                if one.connection in ready:
                    cause, new = listen(one)
                    yield new
                else:
                    one.quiet += 1
                    cause = "stuck" if one.quiet * POLL > PATIENCE + 2 * form.seconds else ""
                if cause:
                    one.end()
                    running.remove(one)
                if cause in ("stuck", "crashed"):
                    if one.at in one.skip or one.at < 0:
                        where = f"twice at clip {one.at}" if one.at >= 0 else "as it started"
                        raise UserError(f"{one.task.name}: the process died {where}")
                    waiting.appendleft((one.task, {**one.skip, one.at: cause}))
    finally:
        for one in running:
            one.end()


def listen(one: Running) -> tuple[str, int]:
    """What a process says: why it has ended (`done`, `crashed`), if it has, and how many items it
    has gone through since."""
    before = one.at
    try:
        while one.connection.poll():
            said = one.connection.recv()
            if isinstance(said, str):
                raise UserError(f"{one.task.name}: {said}")
            one.at, one.quiet = (said, 0) if said is not None else (one.at, 0)
            if said is None:
                return "done", one.at - max(before, 0)
    except EOFError:
        return "crashed", 0
    return "", max(one.at, 0) - max(before, 0)


def work(
    connection: Connection,
    task: Task,
    out: Path,
    form: Form,
    removed: AbstractSet[str],
    skip: Mapping[int, str],
    memory: float,
) -> None:
    """`make_shard` in a process of its own, within its memory."""
    limit_memory(memory)
    die_with(connection)
    try:
        make_shard(task, out, form, removed, skip, connection.send)
        connection.send(None)
    except Exception as error:  # a full disk, say
        known = isinstance(error, OSError | UserError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        connection.send(" ".join(text.split()))


def die_with(connection: Connection) -> None:
    """Ends this process as soon as nobody reads what it says: what an orphan writes could come in
    the way of the next run."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLERR)

    def watch() -> None:
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def limit_memory(gib: float) -> None:
    """What this process may take beside what it has."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return  # not Linux: no limit that works
    most = int(pages * resource.getpagesize() + gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run_beam(tasks: Sequence[Task], out: Path, form: Form, options: Sequence[str]) -> None:
    """The same on Apache Beam, by default on its runner for one machine; all workers must see the
    folder `out`. options: Beam's own, such as --runner=FlinkRunner."""
    try:
        beam = importlib.import_module("apache_beam")
        options_of = importlib.import_module("apache_beam.options.pipeline_options")
    except ImportError:
        raise UserError("--runner beam needs Apache Beam: pip install 'vtp_jax[beam]'") from None
    removed = read_removed(out)
    with beam.Pipeline(options=options_of.PipelineOptions(list(options))) as pipeline:
        make = beam.Map(make_shard, out=out, form=form, removed=removed)
        _ = pipeline | beam.Create(list(tasks)) | beam.Reshuffle() | make
