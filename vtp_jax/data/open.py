"""From the sections of `config.data` to sets of clips, a look and a tokenizer.

A set is opened by its kind (`OPENERS`), and several can be mixed into one. Each row opens its clip
once (`Clips.open`): captions, label and frames come from a single read of its record.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import UInt8

from vtp_jax.data import records, sets, shapes, sources, video
from vtp_jax.data import text as tokens
from vtp_jax.data.look import BOXES, SAMPLINGS, Boxes, Look, Reader, cut_frames
from vtp_jax.data.order import Order, mixed_order, shuffled_order
from vtp_jax.types import UserError, at_least, check_values

SAMPLE, ENOUGH = 256, 8  # captions that are tokenised to see whether the tokenizer fits them
RENAMED = dict(captions="list", manual_dir="root")  # keys of a set in older config.json


class Clips(NamedTuple):
    """A source and how its clips are read.

    open:   index -> the clip and its frames; raises video.Unreadable
    pieces: the number of equal parts of a video; a row has one clip of each, in order, "v t h w c",
            and the captions of the parts, "v l", which are all captions of the video; 1: one clip
            of the whole video, and one caption
    every:  distance between stored frames; for the others, the stored one before is shown
    sets:   of a mixture, the number of clips of each set, and its weight
    """

    source: sources.Source
    open: Callable[[int], Reader]
    pieces: int = 1
    every: int = 1
    sets: Sequence[tuple[int, float]] = ()


class Words(NamedTuple):
    """A tokenizer and the number of tokens of a row."""

    tokenizer: tokens.Tokenizer
    length: int


class More(NamedTuple):
    """A further source of training batches. train: as in `make`; video: overrides of `make`'s;
    batch: rows, `make`'s by default; turns: the number of its batches in a round."""

    train: Mapping[str, Any]
    video: Mapping[str, Any] = {}
    batch: int | None = None
    turns: int = 1


def fit(where: str, function: Callable[..., Any], given: Mapping[str, Any], *first: Any) -> Any:
    """function(*first, **given), after checking the names in `given`. Raises UserError."""
    check_names(where, function, given, *first)
    return function(*first, **given)


def check_names(
    where: str, function: Callable[..., Any], given: Mapping[str, Any], *first: Any
) -> None:
    """Raises UserError unless function(*first, **given) is a possible call."""
    try:
        inspect.signature(function).bind(*first, **given)
    except TypeError as error:
        known = list(inspect.signature(function).parameters)[len(first) :]
        raise UserError(f"{where}: {error}; it takes {', '.join(known)}") from None
    check_values(function, where, given)


def open_look(where: str, video: Mapping[str, Any]) -> Look:
    """The `Look` of a section. Raises UserError."""
    look = fit(where, Look, video)
    at_least(where, 1, **{k: getattr(look, k) for k in ("frames", "stride", "size", "repeats")})
    if look.views is not None and not (len(look.views) == 2 and min(look.views) > 0):
        raise UserError(f"{where}.views={look.views}: it must be (segments, crops), or None")
    if look.sampling not in SAMPLINGS:
        raise UserError(f"{where}.sampling={look.sampling!r}; known: {', '.join(SAMPLINGS)}")
    if look.crop not in BOXES:
        raise UserError(f"{where}.crop={look.crop!r} is not known; known: {', '.join(BOXES)}")
    return look


def list_parts(
    train: Mapping[str, Any], also: Mapping[str, Mapping[str, Any]] | None, turns: int = 1
) -> dict[str, More]:
    """Every source of training batches, by its place in the config; `data.train` is the first."""
    parts = {"data.train": More(train, turns=turns)}
    for name, one in (also or {}).items():
        where = f"data.also.{name}"
        parts[where] = fit(where, More, one)
    return parts


# Sets of clips.


def rename(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A set's section under the current names of keys: old names are accepted, with a warning."""
    given = dict(given)
    for old, new in RENAMED.items():
        if old in given and new in given:
            raise UserError(f"{where}: '{old}' is the old name of '{new}'; give only '{new}'")
        if old in given:
            logging.warning("%s: '%s' is now called '%s'", where, old, new)
            given[new] = given.pop(old)
    return given


def open_set(where: str, kind: str, given: Mapping[str, Any], split: str) -> Clips:
    """The clips of one set, or of several that are mixed: see `pipeline.make`."""
    given = rename(where, given)
    kind = given.pop("kind", kind)
    if kind not in OPENERS:
        raise UserError(f"{where}: kind={kind!r} is not known; known: {', '.join(OPENERS)}")
    if "mix" not in given:
        share = float(given.pop("held_out", 0.0))
        if kind == "shards":
            kind, given = choose_kind(where, given)
        return divide(where, fit(where, OPENERS[kind], given, split), split, share)
    parts = {name: dict(one) for name, one in given.pop("mix").items()}
    if given or not parts:
        raise UserError(f"{where}.mix takes sets by name; no other key is allowed next to it")
    weights = [float(one.pop("weight", 1.0)) for one in parts.values()]
    return mix(
        [open_set(f"{where}.mix.{name}", kind, one, split) for name, one in parts.items()], weights
    )


def divide(where: str, clips: Clips, split: str, share: float) -> Clips:
    """The clips of one of the two halves, "train" and "val", into which the hashes of their paths
    divide a set: `share` of it, about, is held out for validation.

    Clips of one path are in the same half, which does not depend on the other clips: it is the same
    when the set grows, and in files and in the shards made of them.
    """
    if not share:
        return clips
    if not 0 < share < 1:
        raise UserError(f"{where}.held_out={share}; it must be a share of the clips, below 1")
    source = clips.source
    chosen = [
        index
        for index in range(len(source.clips))
        if (fraction(name_path(clips, index)) < share) == (split == "val")
    ]
    if not chosen:
        raise UserError(
            f"{where}.held_out={share} of {len(source.clips)} clips leaves none for "
            f"{'validation' if split == 'val' else 'training'}; choose another share for both"
        )
    part = source._replace(clips=Chosen(source.clips, chosen), facts=source.survey())
    return clips._replace(source=part, open=functools.partial(open_chosen, clips.open, chosen))


class Chosen(Sequence[sources.Clip]):
    """Some of the clips of a set, by their indices there."""

    def __init__(self, clips: Sequence[sources.Clip], chosen: Sequence[int]):
        self.clips, self.chosen = clips, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        return self.clips[self.chosen[index]]


def open_chosen(open_clip: Callable[[int], Reader], chosen: Sequence[int], index: int) -> Reader:
    return open_clip(chosen[index])


def fraction(name: str) -> float:
    """A number from 0 to below 1 that depends on a name alone, evenly spread."""
    digest = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def name_path(clips: Clips, index: int) -> str:
    """The path of a clip. Records of shards have the path as their id, or, where they were given
    another, the hash of their video."""
    if isinstance(clips.source.clips, records.Shards):
        try:
            record = clips.source.clips.open(index).header.record
        except video.Unreadable:
            return str(index)
        if Path(record.id).suffix.lower() not in sources.VIDEOS:
            return record.sha256
        return posixpath.normpath(record.id)
    return posixpath.normpath(clips.source.clips[index].path)


def choose_kind(where: str, given: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The kind and arguments of a set in a config whose kind is `shards`.

    The sets of a config name lists of files, and no flag removes a key. Keys that only files have
    are therefore dropped for shards, and an evaluation set without shards is read from files.
    """
    if "list" in given and not where.startswith("data.train") and not holds_shards(given):
        logging.info("%s: no shards in %s, so files are read", where, given.get("root"))
        return "files", given
    files, own = (set(inspect.signature(OPENERS[kind]).parameters) for kind in ("files", "shards"))
    return "shards", {name: value for name, value in given.items() if name not in files - own}


def holds_shards(given: Mapping[str, Any]) -> bool:
    try:
        return "shards" in json.loads((Path(given["root"]) / records.MANIFEST).read_text("utf-8"))
    except (KeyError, OSError, ValueError):
        return False


class File(NamedTuple):
    """A clip in a video file of its own."""

    clip: sources.Clip
    path: str
    limits: video.Limits

    def read(self, choose: video.Choose) -> UInt8[np.ndarray, "t h w c"]:
        return video.read_frames(self.path, choose, self.limits)

    def show(self, choose: video.Choose, boxes: Boxes, out: UInt8[np.ndarray, "v t s s c"]) -> None:
        cut_frames(self.read(choose), boxes, out)


def open_file(source: sources.Source, limits: video.Limits, index: int) -> File:
    return File(source.clips[index], source.file(index), limits)


def from_source(
    source: sources.Source, pieces: int = 1, limits: Mapping[str, Any] | None = None
) -> Clips:
    """The clips of a source of files. limits: the fields of `video.Limits` that differ"""
    known = fit("limits", video.Limits, limits or {})
    return Clips(source, functools.partial(open_file, source, known), pieces)


def open_files(
    split: str,
    *,
    root: str,
    list: str | None = None,
    path_column: str = "path",
    caption_column: str | None = "caption",
    label_column: str | None = None,
    answers: str | None = None,
    max_absent: float = 0.0,
    pieces: int = 1,
    limits: Mapping[str, Any] | None = None,
) -> Clips:
    """The videos that the file `list` names, or those of a folder: see `sources.load`. `split` has
    no effect. pieces: if above 1, the number of captions of each video: those of its equal parts,
    in order. limits: fields of `video.Limits`, such as `pixels`, which a video must not exceed."""
    source = sources.load(
        root,
        list,
        path_column=path_column,
        caption_column=caption_column,
        label_column=label_column,
        answers=answers,
        max_absent=max_absent,
    )
    if pieces > 1 and (odd := [c for c in source.clips if len(c.captions) != pieces]):
        raise UserError(
            f"{list or root}: '{odd[0].path}' has {len(odd[0].captions)} captions; "
            f"pieces={pieces} needs one for each of its parts"
        )
    return from_source(source, pieces, limits)


class Film(NamedTuple):
    """A clip whose frames are in memory."""

    clip: sources.Clip
    frames: UInt8[np.ndarray, "t h w c"]

    def read(self, choose: video.Choose) -> UInt8[np.ndarray, "t h w c"]:
        return self.frames[choose(len(self.frames))]

    def show(self, choose: video.Choose, boxes: Boxes, out: UInt8[np.ndarray, "v t s s c"]) -> None:
        cut_frames(self.read(choose), boxes, out)


def open_given(videos: Sequence[Any], captions: Sequence[str] | None) -> Clips:
    """The clips of files, folders of videos, and frames in memory: uint8 arrays "t h w 3", RGB.

    captions: one for each, or None. Raises UserError.
    """
    if not any(isinstance(one, np.ndarray) for one in videos):
        source = sources.from_files(videos, captions)
    else:
        names = [
            check_frames(one, n) if isinstance(one, np.ndarray) else str(one)
            for n, one in enumerate(videos)
        ]
        if captions is not None and len(captions) != len(names):
            raise UserError(f"{len(captions)} captions for {len(names)} videos; give one for each")
        texts = [()] * len(names) if captions is None else [(text,) for text in captions]
        source = sources.Source("", tuple(map(sources.Clip, names, texts)))
    source = source._replace(
        clips=tuple(clip._replace(captions=clip.captions or ("",)) for clip in source.clips)
    )
    return Clips(source, functools.partial(open_one, source, videos))


def open_one(source: sources.Source, videos: Sequence[Any], index: int) -> Reader:
    if len(videos) == len(source.clips) and isinstance(videos[index], np.ndarray):
        return Film(source.clips[index], videos[index])
    return open_file(source, video.Limits(), index)


def check_frames(frames: np.ndarray, number: int) -> str:
    """The name of a video in memory. Raises UserError."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise UserError(
            f"video {number} is an array of {frames.dtype}{list(frames.shape)}; frames are uint8 "
            "RGB (t, h, w, 3)"
        )
    return f"video {number}"


class Drawing(NamedTuple):
    """A clip of the shapes corpus, or several in order, drawn when read."""

    clip: sources.Clip
    plan: shapes.Plan
    split: str
    numbers: Sequence[int]

    def read(self, choose: video.Choose) -> UInt8[np.ndarray, "t h w c"]:
        film = np.concatenate([shapes.read(self.plan, self.split, i) for i in self.numbers])
        return film[choose(len(film))]

    def show(self, choose: video.Choose, boxes: Boxes, out: UInt8[np.ndarray, "v t s s c"]) -> None:
        cut_frames(self.read(choose), boxes, out)


def open_drawing(
    source: sources.Source, plan: shapes.Plan, split: str, pieces: int, index: int
) -> Drawing:
    numbers = range(index * pieces, (index + 1) * pieces)
    return Drawing(source.clips[index], plan, split, numbers)


def open_shapes(
    split: str,
    *,
    clips: int,
    side: int = 64,
    frames: int = 16,
    seed: int = 0,
    label: str | None = None,
    caption: str = "attributes",
    pieces: int = 1,
) -> Clips:
    """The first `clips` of a split of the shapes corpus.

    label: the attribute that is the class, if any; caption: its kind, see `shapes.source`
    pieces: if above 1, `clips` longer videos, each of `pieces` consecutive clips
    """
    at_least("shapes", 1, clips=clips, side=side, frames=frames, pieces=pieces)
    if pieces > 1 and label is not None:
        raise UserError("shapes: a video of several pieces has no single label; drop one of them")
    count = clips * pieces
    plan = shapes.Plan(train=count, val=count, side=side, frames=frames, seed=seed)
    source = sources.in_a_row(shapes.source(plan, split, label, caption), pieces)
    names = [" ".join(answer) for answer in shapes.ANSWERS] if caption == "question" else ()
    source = source._replace(names=tuple(shapes.ATTRIBUTES[label] if label else names))
    return Clips(source, functools.partial(open_drawing, source, plan, split, pieces), pieces)


def open_community(
    _: str,
    /,
    *,
    set: str,
    split: str,
    root: str,
    answers: int | str = 1500,
    max_absent: float = 0.0,
    limits: Mapping[str, Any] | None = None,
) -> Clips:
    """A split of a public data set, by name: see `sets.load`. limits: as in `open_files`."""
    source = sets.load(set, split, root, answers=answers, max_absent=max_absent)
    return from_source(source, limits=limits)


def open_shards(split: str, *, root: str, pieces: int = 1) -> Clips:
    """The clips of a folder that `vtp_jax.prepare shards` wrote. `split` has no effect; `pieces` is
    as in `open_files`."""
    clips = records.Shards(root)
    if pieces > 1 and (fewest := clips.facts.captions) < pieces:
        raise UserError(
            f"{root}: some clips have {fewest} captions; pieces={pieces} needs one for each part"
        )
    return Clips(clips.source, clips.open, pieces, every=clips.every)


OPENERS: Mapping[str, Callable[..., Clips]] = dict(
    files=open_files, shards=open_shards, shapes=open_shapes, sets=open_community
)


class Member(NamedTuple):
    """A clip of a set that is mixed with others, by its full path."""

    clip: sources.Clip
    reader: Reader

    def read(self, choose: video.Choose) -> UInt8[np.ndarray, "t h w c"]:
        return self.reader.read(choose)

    def show(self, choose: video.Choose, boxes: Boxes, out: UInt8[np.ndarray, "v t s s c"]) -> None:
        self.reader.show(choose, boxes, out)


def open_member(
    find: Callable[[int], tuple[int, int]], parts: Sequence[Clips], index: int
) -> Member:
    part, own = find(index)
    reader = parts[part].open(own)
    path = os.path.join(parts[part].source.root, reader.clip.path)
    return Member(reader.clip._replace(path=path), reader)


def mix(parts: Sequence[Clips], weights: Sequence[float]) -> Clips:
    """Several sets as one."""
    if len({one.pieces for one in parts}) > 1:
        raise UserError("sets that are mixed must have the same number of pieces")
    joined = sources.Joined([one.source for one in parts])
    return Clips(
        sources.join([one.source for one in parts]),
        functools.partial(open_member, joined.find, parts),
        pieces=parts[0].pieces,
        every=math.lcm(*(one.every for one in parts)),
        sets=[(len(one.source.clips), w) for one, w in zip(parts, weights, strict=True)],
    )


def make_order(clips: Clips, rows: int, process: tuple[int, int], seed: int) -> Order:
    """The order of training."""
    if not clips.sets:
        return shuffled_order(rows, process, seed, len(clips.source.clips))
    counts, weights = zip(*clips.sets, strict=True)
    return mixed_order(rows, process, seed, counts, weights)


# Clips whose record cannot be read.


def unknown_clip(index: int, error: video.Unreadable) -> sources.Clip:
    """The clip of a damaged record: only a name for the log."""
    return sources.Clip(f"clip {index} ({error.detail})", ())


def known_clips(source: sources.Source) -> list[sources.Clip]:
    """All clips of a source. For shards, this reads every record's header."""
    return [known_clip(source, index) for index in range(len(source.clips))]


def known_clip(source: sources.Source, index: int) -> sources.Clip:
    try:
        return source.clips[index]
    except video.Unreadable as error:
        return unknown_clip(index, error)


# Words.


def open_text(
    source: sources.Source,
    *,
    kind: str,
    length: int,
    path: str | None = None,
    vocab_size: int | None = None,
) -> Words:
    """The tokenizer at `path`; without a path, SentencePiece trained on the spot on the captions of
    `source`, for small corpora.

    vocab_size: the number of pieces; if the tokenizer is trained, an upper bound, 256 by default.
    If a file has another number, the file's is used, with a warning.
    """
    at_least("data.text", 1, vocab_size=vocab_size)
    if length < 3:
        raise UserError(f"data.text.length={length} leaves no word between [CLS] and [SEP]")
    if path is None:
        if kind != "sentencepiece":
            raise UserError(f"data.text: kind {kind!r} needs a path")
        captions = [caption for clip in known_clips(source) for caption in clip.captions]
        return Words(tokens.train(captions, None, vocab_size or tokens.SMALL), length)
    tokenizer = tokens.make(kind=kind, path=path)
    expected = tokens.expected(kind, vocab_size)
    wrong = [k for k, n in expected.items() if tokenizer.facts.get(k) != n]
    if wrong:
        differ = ", ".join(f"{k}={tokenizer.facts.get(k)} (not {expected[k]})" for k in wrong)
        logging.warning("data.text: %s has %s; its own numbers are used", path, differ)
    check_words(tokenizer, source, path)
    return Words(tokenizer, length)


def check_words(tokenizer: tokens.Tokenizer, source: sources.Source, path: str) -> None:
    """Reports the share of [UNK] in some captions. Raises UserError if most pieces are."""
    some = range(0, len(source.clips), max(len(source.clips) // SAMPLE, 1))
    captions = [text[:1000] for i in some for text in known_clip(source, i).captions[:1]]
    share = tokens.unknown(tokenizer, captions)
    if share > 0.5 and len(captions) >= ENOUGH:
        raise UserError(
            f"data.text.path={path}: {share:.0%} of the pieces of the captions are [UNK]; take a "
            "vocabulary of their language"
        )
    if share > 0.05:
        logging.warning("data.text: %.0f %% of the captions' pieces are [UNK]", 100 * share)


# Consistency checks.


def check_captions(source: sources.Source, where: str) -> None:
    if not source.survey().captions:
        raise UserError(f"{where} has no captions to read; name caption_column, or drop data.text")


def check_views(clips: Clips, where: str, name: str, asked: bool) -> None:
    if clips.pieces > 1 and asked:
        raise UserError(
            f"{where}.pieces={clips.pieces} and data.video.{name} both ask for several clips of a "
            "video; drop one of them"
        )


def check_stride(clips: Clips, where: str, look: Look) -> None:
    if look.sampling == "segments" and clips.every > 1:
        raise UserError(
            f"{where}: data.video.sampling='segments' needs all frames of a video, but the shards "
            f"hold every {clips.every}th; prepare them with --every 1"
        )
    if look.frames > 1 and look.stride % clips.every:
        raise UserError(
            f"{where}: frames {look.stride} apart are requested, but the shards hold every "
            f"{clips.every}th; set data.video.stride to a multiple, or prepare them with "
            f"--every {math.gcd(look.stride, clips.every)}"
        )
