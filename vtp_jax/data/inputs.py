"""Inputs of shards: the clips of file lists, tars and TFDS, divided into tasks.

A task makes one shard. Tasks depend only on the collection, so the same command always gives the
same tasks.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vtp_jax.data import tars
from vtp_jax.data.sources import VIDEOS, Clip, Source
from vtp_jax.types import UserError


class Item(NamedTuple):
    """A clip to be stored. media: its file, the bytes of one, or (frames uint8 "t h w c", frames
    per second)."""

    clip: Clip
    media: str | bytes | tuple[np.ndarray, float]


Items = Callable[[], Iterator[Item | tars.Refused]]


class Task(NamedTuple):
    """A shard to be made. name: of its file; items: its candidates; count: their approximate
    number."""

    name: str
    items: Items
    count: int


class FromFiles(NamedTuple):
    """Clips of a source, by their files."""

    root: str
    clips: Sequence[Clip]

    def __call__(self) -> Iterator[Item | tars.Refused]:
        for clip in self.clips:
            yield Item(clip, os.path.join(self.root, clip.path))


class FromTar(NamedTuple):
    """The samples of a tar. field: the key of captions in the .json, if there is no .txt; prefix:
    of all ids."""

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
        except (ValueError, RecursionError, MemoryError) as error:
            return tars.Refused(sample.key, "damaged_text", str(error) or type(error).__name__)
        known = known if isinstance(known, Mapping) else {}
        texts = text or known.get(self.field) or []
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            return tars.Refused(sample.key, "damaged_text", f"'{self.field}' is not text")

        def get(name: str) -> str:
            return one if isinstance(one := known.get(name), str) else ""

        clip = Clip(
            path=sample.key,
            captions=tuple(filter(None, map(str.strip, texts))),
            source=get("url") or self.source,
            licence=get("license") or self.licence,
        )
        return Item(clip, media[0])


class FromTfds(NamedTuple):
    """Examples `start` to `stop` of a TFDS set that has been prepared. columns: the features with
    frames, caption, label and id, "" if there is none."""

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
            texts = np.ravel(row[caption]) if caption else ()
            clip = Clip(
                path=row[key].decode("utf-8", "replace") if key else f"{self.split}/{number}",
                captions=tuple(t.decode("utf-8", "replace").strip() for t in texts),
                label=int(row[label]) if label else None,
                source=self.source,
                licence=self.licence,
            )
            media = row[frames]
            yield Item(clip, media if isinstance(media, bytes) else (np.asarray(media), 0.0))


def plan_files(source: Source, per_shard: int) -> list[Task]:
    """Tasks of `per_shard` clips each. Raises UserError on ids that repeat."""
    ids = collections.Counter(clip.id or clip.path for clip in source.clips)
    if twice := [name for name, count in ids.items() if count > 1]:
        raise UserError(f"{len(twice)} ids are repeated, such as '{twice[0]}'; make them unique")
    starts = range(0, len(source.clips), per_shard)
    parts = [tuple(source.clips[i : i + per_shard]) for i in starts]
    return [
        Task(f"{n:06d}.shard", FromFiles(source.root, part), len(part))
        for n, part in enumerate(parts)
    ]


def plan_tars(paths: Sequence[str], field: str, source: str, licence: str) -> list[Task]:
    """A task for each tar, named after it; for a folder, one for each tar in it. If two tars have
    samples of the same name, all ids are prefixed with the tar's name."""
    found: list[Path] = []
    for path in map(Path, paths):
        found += sorted(path.glob("*.tar")) if path.is_dir() else [path]
    for path in found:
        if path.suffix != ".tar" or not path.is_file():
            raise UserError(f"'{path}' is not a .tar file; decompress compressed ones first")
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
    """Tasks of `per_shard` examples each, for a split or a part of one, such as train[:60%]."""
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
