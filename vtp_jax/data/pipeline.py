"""From a list of clips to batches: the order, the choices, the decoding, the counting.

Everything is a function of (seed, epoch, index): which clip stands where, which frames, which crop,
which caption. So a run that starts at step k sees what an uninterrupted one sees there, and the
global batches are the same for one process and for many.

Rows run on over the ends of epochs: position p = step * batch + row belongs to epoch p // rows, and
each epoch shows every clip exactly once; a batch may hold the end of one and the start of the next.
Where a clip stands is computed (order.py), not remembered.
"""

from __future__ import annotations

import collections
import functools
import inspect
import itertools
import json
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Int, UInt8

from vtp_jax.data import alternate, ops, records, sets, shapes, sources, video
from vtp_jax.data import text as tokens
from vtp_jax.data.order import Order, list_order, mixed_order, rows_of, shuffled_order
from vtp_jax.types import Batch, Data, Spec, Stream, UserError

# RGB in [0, 1]: ImageNet's, as SimVTP and VideoMAE.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AHEAD = 2  # batches made before they are asked for
JUDGED = 100  # rows (or an epoch, if that is less) before too many failures stop a run
CHANCE = 5  # standard deviations
LOOK, CAPTION = 2, 3  # what a random generator is for, beside those of order and alternate
CAUSES = tuple(video.CAUSES)
GOOD, PADDING = -1, -2  # beside the numbers of causes

Pixels = UInt8[np.ndarray, "..."]
Ints = Int[np.ndarray, "n"]
# (place, where its pixels go) -> GOOD, PADDING or a cause
Attempt = Callable[[int, Pixels], np.int32]
Boxes = Callable[[int, int], Sequence[ops.Box]]  # height and width of a picture -> parts of it
Run = Callable[..., Iterator[tuple[Pixels, Int[np.ndarray, "b"]]]]


class Clips(NamedTuple):
    """A source and how its frames are read; `read` and `cut` raise video.Unreadable.

    read:   (index, choose) -> the chosen frames "t h w c"
    cut:    (index, choose, boxes, out) writes what `boxes(h, w)` choose of them to `out`, for a
            reader that need not make whole frames for it
    every:  only every such frame can be had; others show the one before
    sets:   of a mixture, how many clips each set has, and its weight
    pieces: of how many equal parts a row shows a clip each, in order, "v t h w c", with the parts'
    captions "v l", which are all captions of a video; 1 shows one clip of the whole, and one
    caption.
    """

    source: sources.Source
    read: Callable[[int, video.Choose], UInt8[np.ndarray, "t h w c"]]
    pieces: int = 1
    every: int = 1
    sets: Sequence[tuple[int, float]] = ()
    cut: Callable[[int, video.Choose, Boxes, UInt8[np.ndarray, "v t s s c"]], None] | None = None

    def show(
        self, index: int, choose: video.Choose, boxes: Boxes, out: UInt8[np.ndarray, "v t s s c"]
    ) -> None:
        """Writes parts of the chosen frames of a clip to `out`, at its size."""
        if self.cut is not None:
            return self.cut(index, choose, boxes, out)
        frames = self.read(index, choose)
        for box, clip in zip(boxes(*frames.shape[1:3]), out, strict=True):
            clip[...] = ops.cut(frames, box, clip.shape[1])


class Words(NamedTuple):
    """A tokenizer and how many tokens a row has."""

    tokenizer: tokens.Tokenizer
    length: int


class Look(NamedTuple):
    """What of a video is shown.

    frames, stride: how many frames, and how far apart; size: pixels of the square picture; crop:
    `multiscale` (random, SimVTP's), `resized` (random, Inception's), `window` (random, in the size
    that it has) or `centre`, in training;
    repeats: crops of one decoded clip, in training, as views "v t h w c" if more than one; views:
    (segments, crops) of SimVTP's test, or None for one clip in the middle, in evaluation; sampling:
    `windows` of frames that are `stride` apart, or `segments`, a frame from each of so many equal
    parts of the whole video, whatever the stride.
    """

    frames: int
    stride: int
    size: int
    crop: str = "multiscale"
    repeats: int = 1
    views: Sequence[int] | None = None
    sampling: str = "windows"

    @property
    def picture(self) -> tuple[int, ...]:
        """The shape of one clip."""
        return (self.frames, self.size, self.size, 3)

    @property
    def shown(self) -> tuple[int, ...]:
        """The shape of a training row's video."""
        return self.picture if self.repeats == 1 else (self.repeats, *self.picture)


def make(
    *,
    kind: str,
    batch: int,
    seed: int,
    train: Mapping[str, Any],
    video: Mapping[str, Any],
    text: Mapping[str, Any] | None = None,
    also: Mapping[str, Mapping[str, Any]] | None = None,
    turns: int = 1,
    evals: Mapping[str, Mapping[str, Any]] | None = None,
    eval_batch: int | None = None,
    max_failed: float = 0.05,
    workers: int | None = None,
    process: tuple[int, int] = (0, 1),
) -> Data:
    """The training batches and evaluation streams of video files, or of shapes drawn in memory.

    kind:    `files`, `shards` (what `prepare shards` wrote), `sets` (the community's), each by
             tf.data, or `shapes` (without files and TensorFlow); a set may say its own. With
             `shards`, sets beside `train` that name captions and have no shards are files
    batch:   rows of a global training batch; eval_batch: of an evaluation batch (same by default)
    train:   the arguments of `open_files`, `open_shards`, `open_shapes`, `open_community`; or
             dict(mix={name: as `train`, and its `weight`}): rows of several sets, in proportion
    also:    {name: the fields of `More`}: sources of another structure, such as images, whose
             batches alternate with those of `train`, which has `turns` turns in a round; the order
             is drawn anew for each round
    evals:   {name: as `train`, and `of`, the source of `also` whose classes it has, where it is not
             `train`'s}; each gives two streams, `name` (videos, with their first captions)
             and `name/captions` (every caption, no videos); of shapes, the held-out clips
    video:   the fields of `Look`
    text:    the arguments of `open_text`; without it no captions are read
    max_failed: the run stops when a larger share of its training clips cannot be read
    workers: videos decoded side by side, by default one for each core
    process: (index, count); this process gives its equal share of the rows of each batch, in order

    Raises UserError on what does not fit together.
    """
    for name, rows in (("batch", batch), ("eval_batch", eval_batch or batch)):
        if rows < 1 or rows % process[1]:
            raise UserError(f"data.{name}={rows} does not divide over {process[1]} processes")
    run = run_here if kind == "shapes" else run_tfdata
    run = functools.partial(run, workers=workers or os.cpu_count() or 1)
    look = open_look("data.video", video)
    parts = {"data.train": More(train, turns=turns)}
    parts |= {f"data.also.{k}": fit(f"data.also.{k}", More, one) for k, one in (also or {}).items()}
    clips = {where: open_set(where, kind, one.train, "train") for where, one in parts.items()}
    if text:
        for where, one in clips.items():
            check_captions(one.source, where)
    everything = sources.join([one.source for one in clips.values()])
    words = fit("data.text", open_text, text, everything) if text else None

    def open_training(where: str) -> alternate.Training:
        look = open_look(f"{where}.video", {**video, **parts[where].video})
        rows = parts[where].batch or batch
        if rows % process[1]:
            raise UserError(f"{where}.batch={rows} does not divide over {process[1]} processes")
        check_views(clips[where], where, "repeats", look.repeats > 1)
        check_stride(clips[where], where, look)
        source = clips[where].source
        order = make_order(clips[where], rows, process, seed)
        ledger, classes = Ledger(source, max_failed), source.survey().classes
        return alternate.Training(
            spec=make_spec(rows, clips[where], look, words, classes),
            batches=functools.partial(
                train_batches, clips[where], look, words, order, seed, run, ledger
            ),
            rows=len(source.clips),
            classes=classes,
            counts=ledger.counts,
        )

    trained = {where: open_training(where) for where in parts}
    training = alternate.alternate(
        list(trained.values()), [one.turns for one in parts.values()], seed
    )
    streams = {}
    for name, given in (evals or {}).items():
        given = dict(given)
        of = f"data.also.{given.pop('of')}" if "of" in given else "data.train"
        if of not in trained:
            known = ", ".join(also or {}) or "none"
            raise UserError(f"data.evals.{name}.of: there is no {of}; data.also has {known}")
        before = list(trained.values())[: list(trained).index(of)]
        held_out = open_set(f"data.evals.{name}", kind, given, "val")
        check_views(held_out, f"data.evals.{name}", "views", look.views is not None)
        check_stride(held_out, f"data.evals.{name}", look)
        order = functools.partial(list_order, eval_batch or batch, process)
        streams[name] = alternate.label_on(stream_videos(held_out, look, words, order, run), before)
        if words:
            check_captions(held_out.source, f"data.evals.{name}")
            streams[f"{name}/captions"] = stream_captions(held_out.source, words, order)
    facts = dict(mean=MEAN, std=STD, labels=training.classes)
    return Data(
        spec=training.spec,
        batches=training.batches,
        rows=training.rows,
        streams=streams,
        facts=dict(words.tokenizer.facts, **facts) if words else facts,
        decode=words.tokenizer.decode if words else lambda ids: [""] * len(ids),
        counts=training.counts,
    )


# Parts, from the sub-dicts of a config.


def fit(where: str, function: Callable[..., Any], given: Mapping[str, Any], *first: Any) -> Any:
    """function(*first, **given), after checking the names in `given`."""
    try:
        inspect.signature(function).bind(*first, **given)
    except TypeError as error:
        known = list(inspect.signature(function).parameters)[len(first) :]
        raise UserError(f"{where}: {error}; it takes {', '.join(known)}") from None
    return function(*first, **given)


def open_set(where: str, kind: str, given: Mapping[str, Any], split: str) -> Clips:
    """The clips of one set, or of several that are mixed: see `make`."""
    given = dict(given)
    kind = given.pop("kind", kind)
    if kind not in OPENERS:
        raise UserError(f"{where}: kind={kind!r} is not known; known: {', '.join(OPENERS)}")
    if "mix" not in given:
        if kind == "shards":
            kind, given = choose_kind(where, given)
        return fit(where, OPENERS[kind], given, split)
    parts = {name: dict(one) for name, one in given.pop("mix").items()}
    if given or not parts:
        raise UserError(f"{where}.mix takes sets by name, and nothing beside it")
    weights = [float(one.pop("weight", 1.0)) for one in parts.values()]
    return mix(
        [open_set(f"{where}.mix.{name}", kind, one, split) for name, one in parts.items()], weights
    )


def choose_kind(where: str, given: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """A config's sets name caption files, which no command line takes out again. Of shards such
    names mean nothing; a set beside those of training that has no shards is read from files."""
    if "captions" in given and not where.startswith("data.train") and not holds_shards(given):
        logging.info("%s: no shards in %s, so files are read", where, given.get("root"))
        return "files", given
    files, own = (set(inspect.signature(OPENERS[kind]).parameters) for kind in ("files", "shards"))
    return "shards", {name: value for name, value in given.items() if name not in files - own}


def holds_shards(given: Mapping[str, Any]) -> bool:
    try:
        return "shards" in json.loads((Path(given["root"]) / records.MANIFEST).read_text("utf-8"))
    except (KeyError, OSError, ValueError):
        return False


def mix(parts: Sequence[Clips], weights: Sequence[float]) -> Clips:
    """Several sets as one."""
    if len({one.pieces for one in parts}) > 1:
        raise UserError("sets that are mixed must have the same number of pieces")
    source = sources.join([one.source for one in parts])
    starts = sources.Joined([one.source for one in parts])

    def read(index: int, choose: video.Choose) -> UInt8[np.ndarray, "t h w c"]:
        part, own = starts.find(index)
        return parts[part].read(own, choose)

    def show(
        index: int, choose: video.Choose, boxes: Boxes, out: UInt8[np.ndarray, "v t s s c"]
    ) -> None:
        part, own = starts.find(index)
        parts[part].show(own, choose, boxes, out)

    return Clips(
        source,
        read,
        pieces=parts[0].pieces,
        every=math.lcm(*(one.every for one in parts)),
        cut=show,
        sets=[(len(one.source.clips), w) for one, w in zip(parts, weights, strict=True)],
    )


def make_order(clips: Clips, rows: int, process: tuple[int, int], seed: int) -> Order:
    """The order of training."""
    if not clips.sets:
        return shuffled_order(rows, process, seed, len(clips.source.clips))
    counts, weights = zip(*clips.sets, strict=True)
    return mixed_order(rows, process, seed, counts, weights)


def check_stride(clips: Clips, where: str, look: Look) -> None:
    if look.sampling == "segments" and clips.every > 1:
        raise UserError(
            f"{where}: data.video.sampling='segments' takes any frame of a video, and the shards "
            f"hold every {clips.every}th; prepare them with --every 1"
        )
    if look.frames > 1 and look.stride % clips.every:
        raise UserError(
            f"{where}: frames {look.stride} apart are asked for, of shards that hold every "
            f"{clips.every}th; set data.video.stride to a multiple, or prepare them with "
            f"--every {math.gcd(look.stride, clips.every)}"
        )


class More(NamedTuple):
    """A further source of training batches. train: as `make`'s; video: what differs from `make`'s;
    batch: rows, by default as many; turns: how many of its batches come in a round."""

    train: Mapping[str, Any]
    video: Mapping[str, Any] = {}
    batch: int | None = None
    turns: int = 1


def open_look(where: str, video: Mapping[str, Any]) -> Look:
    look = fit(where, Look, video)
    if look.sampling not in SAMPLINGS:
        raise UserError(f"{where}.sampling={look.sampling!r}; known: {', '.join(SAMPLINGS)}")
    if look.crop not in BOXES:
        raise UserError(f"{where}.crop={look.crop!r} is not known; known: {', '.join(BOXES)}")
    return look


def open_files(
    split: str,
    *,
    root: str,
    captions: str,
    path_column: str = "path",
    caption_column: str | None = "caption",
    label_column: str | None = None,
    answers: str | None = None,
    max_absent: float = 0.0,
    pieces: int = 1,
) -> Clips:
    """The videos that a caption file names: see `sources.load`. `split` changes nothing. pieces:
    more than 1 where the captions of a video, as many, are those of its equal parts, in order."""
    source = sources.load(
        root,
        captions,
        path_column=path_column,
        caption_column=caption_column,
        label_column=label_column,
        answers=answers,
        max_absent=max_absent,
    )
    if pieces > 1 and (odd := [c for c in source.clips if len(c.captions) != pieces]):
        raise UserError(
            f"{captions}: '{odd[0].path}' has {len(odd[0].captions)} captions; "
            f"pieces={pieces} needs one for each of its parts"
        )
    return Clips(source, lambda i, choose: video.read_frames(source.file(i), choose), pieces)


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
    """The first `clips` of a split of the shapes corpus, drawn when asked for.

    label: the attribute that is the class, if any; caption: what is said, see `shapes.source`.
    pieces: longer videos instead, as many, each of so many clips that follow each other.
    """
    if pieces > 1 and label is not None:
        raise UserError("shapes: a video of several pieces has no one label; drop label or pieces")
    count = clips * pieces
    plan = shapes.Plan(train=count, val=count, side=side, frames=frames, seed=seed)
    source = sources.in_a_row(shapes.source(plan, split, label, caption), pieces)

    def read(index: int, choose: video.Choose) -> UInt8[np.ndarray, "t h w c"]:
        parts = range(index * pieces, (index + 1) * pieces)
        film = np.concatenate([shapes.read(plan, split, i) for i in parts])
        return film[choose(len(film))]

    return Clips(source, read, pieces)


def open_community(
    _: str,
    /,
    *,
    set: str,
    split: str,
    manual_dir: str,
    answers: int | str = 1500,
    max_absent: float = 0.0,
) -> Clips:
    """A split of one of the community's data sets, by name: see `sets.load`."""
    source = sets.load(set, split, manual_dir, answers=answers, max_absent=max_absent)
    return Clips(source, lambda i, choose: video.read_frames(source.file(i), choose))


def open_shards(split: str, *, root: str, pieces: int = 1) -> Clips:
    """The clips of a folder that `vtp_jax.prepare shards` wrote. `split` changes nothing; `pieces`
    as of `open_files`."""
    clips = records.Shards(root)
    if pieces > 1 and (fewest := clips.facts.captions) < pieces:
        raise UserError(
            f"{root}: some clips have {fewest} captions; pieces={pieces} needs one for each part"
        )
    return Clips(clips.source, clips.read, pieces, every=clips.every, cut=clips.cut)


OPENERS: Mapping[str, Callable[..., Clips]] = dict(
    files=open_files, shards=open_shards, shapes=open_shapes, sets=open_community
)


def open_text(
    source: sources.Source,
    *,
    kind: str,
    length: int,
    path: str | None = None,
    vocab_size: int = 256,
) -> Words:
    """The tokenizer at `path`; without one, SentencePiece trained here and now on the training
    captions, which is for small corpora."""
    if length < 3:
        raise UserError(f"data.text.length={length} holds no word between [CLS] and [SEP]")
    if path is not None:
        return Words(tokens.make(kind=kind, path=path), length)
    if kind != "sentencepiece":
        raise UserError(f"data.text: kind {kind!r} needs a path")
    captions = [caption for clip in known_clips(source) for caption in clip.captions]
    return Words(tokens.train(captions, None, vocab_size), length)


def check_captions(source: sources.Source, where: str) -> None:
    if not source.survey().captions:
        raise UserError(f"{where} has no captions to read; name caption_column, or drop data.text")


def check_views(clips: Clips, where: str, name: str, asked: bool) -> None:
    if clips.pieces > 1 and asked:
        raise UserError(
            f"{where}.pieces={clips.pieces} and data.video.{name} both ask for several clips of a "
            "video; drop one of them"
        )


# The pixels. What is made for a row is a partial and no function of its own: shapes are checked by
# decorating functions, which is slow, and not safe in several threads at once.

SAMPLINGS = ("windows", "segments")
BOXES: Mapping[str, Callable[..., ops.Box]] = dict(
    multiscale=ops.box_multiscale,
    resized=ops.box_resized,
    window=ops.box_window,
    centre=ops.box_centre,
)


def show_random(clips: Clips, look: Look, seed: int, epoch: int, index: int, out: Pixels) -> None:
    """A training clip "[v] t h w c"; which part of the video it shows depends on all three numbers.
    Of several views each is a crop of its own."""
    rng = np.random.default_rng([LOOK, seed, epoch, index])
    choose = functools.partial(draw_frames, look, rng)
    boxes = functools.partial(draw_boxes, look, rng)
    show_parts(clips, look, index, choose, boxes, look.repeats, out)


def draw_frames(look: Look, rng: np.random.Generator, n: int) -> Ints:
    if look.sampling == "segments":
        return ops.segment_frames(n, look.frames, rng)
    return ops.sample_frames(n, look.frames, look.stride, rng)


def draw_boxes(look: Look, rng: np.random.Generator, h: int, w: int) -> list[ops.Box]:
    return [BOXES[look.crop](h, w, look.size, rng) for _ in range(look.repeats)]


def show_centre(clips: Clips, look: Look, index: int, out: Pixels) -> None:
    """The clip in the middle, "[v] t h w c"."""
    choose, boxes = functools.partial(middle_frames, look), functools.partial(middle_boxes, look)
    show_parts(clips, look, index, choose, boxes, 1, out)


def middle_frames(look: Look, n: int) -> Ints:
    if look.sampling == "segments":
        return ops.segment_views(n, look.frames, 1)[0]
    return ops.centre_frames(n, look.frames, look.stride)


def middle_boxes(look: Look, h: int, w: int) -> list[ops.Box]:
    return [ops.box_centre(h, w, look.size)]


def show_parts(
    clips: Clips,
    look: Look,
    index: int,
    choose: video.Choose,
    boxes: Boxes,
    views: int,
    out: Pixels,
) -> None:
    """Frames of all pieces, which follow each other, of so many views."""
    side = look.size
    into = out.reshape(views, clips.pieces * look.frames, side, side, 3)
    clips.show(index, functools.partial(ops.in_parts, clips.pieces, choose), boxes, into)


def show_views(clips: Clips, look: Look, index: int, out: Pixels) -> None:
    """SimVTP's test views, "v t h w c", v = segments * crops, crops fastest."""
    segments, crops = look.views or (1, 1)
    frames = clips.read(index, functools.partial(view_frames, look, segments))
    views = ops.crop_views(frames, look.size, crops)  # crops (segments t) h w c
    views = views.reshape(crops, segments, look.frames, *views.shape[2:])
    out[...] = views.swapaxes(0, 1).reshape(-1, *views.shape[2:])


def view_frames(look: Look, segments: int, n: int) -> Ints:
    if look.sampling == "segments":
        return ops.segment_views(n, look.frames, segments).reshape(-1)
    return ops.view_frames(n, look.frames, look.stride, segments).reshape(-1)


def attempt(
    show: Callable[[int, int, Pixels], None], order: Order, place: int, out: Pixels
) -> np.int32:
    """Writes the pixels of a row, or zeros, and says why. Whatever else goes wrong is an error of
    ours."""
    step, row = divmod(place, order.rows)
    epoch, index = (column[row] for column in rows_of(order, step))
    cause = PADDING
    if index >= 0:
        try:
            show(int(epoch), int(index), out)
            return np.int32(GOOD)
        except video.Unreadable as error:
            cause = CAUSES.index(error.cause)
    out[...] = 0
    return np.int32(cause)


def run_here(
    attempt: Attempt, shape: Sequence[int], rows: int, first: int, stop: int | None, workers: int
) -> Iterator[tuple[Pixels, Int[np.ndarray, "b"]]]:
    """Batches of `rows` places from `first` (to `stop`), one after the other, when asked for."""
    for start in itertools.count(first, rows) if stop is None else range(first, stop, rows):
        batch = np.empty((rows, *shape), np.uint8)
        yield batch, np.asarray([attempt(start + n, row) for n, row in enumerate(batch)])


def run_tfdata(
    attempt: Attempt, shape: Sequence[int], rows: int, first: int, stop: int | None, workers: int
) -> Iterator[tuple[Pixels, Int[np.ndarray, "b"]]]:
    """As `run_here`, by tf.data: `workers` rows at a time, `AHEAD` batches before they are due.

    Rows are written into arrays of whole batches, and TensorFlow is handed the causes alone: its
    own copies would cost up to 2 ms a clip. Holds at most AHEAD + 2 batches, and what `workers`
    videos need while they are decoded.
    """
    tf = import_tensorflow()
    held = (AHEAD + 2) * rows * math.prod(shape) / 2**20
    logging.info("tf.data: %d workers, at most %.0f MiB of batches", workers, held)
    batches: dict[int, Pixels] = {}
    lock = threading.Lock()

    def row(place: Any) -> np.int32:
        number, at = divmod(int(place) - first, rows)
        with lock:
            if number not in batches:
                batches[number] = np.empty((rows, *shape), np.uint8)
            out = batches[number][at]
        return attempt(int(place), out)

    data = tf.data.Dataset.range(first, np.iinfo(np.int64).max if stop is None else stop)
    data = data.map(
        lambda place: tf.numpy_function(row, [place], tf.int32),
        num_parallel_calls=workers,
        deterministic=True,
    )
    data = data.batch(rows, drop_remainder=True).prefetch(AHEAD)
    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = workers + 1
    holder = [iter(data.with_options(options))]
    made = hand_out(holder, batches)
    # TensorFlow's threads call Python; the interpreter would wait for them for ever at its end.
    weakref.finalize(made, holder.clear)
    return made


def hand_out(
    holder: list[Any], batches: dict[int, Pixels]
) -> Iterator[tuple[Pixels, Int[np.ndarray, "b"]]]:
    """The batches of the iterator in `holder`, until they end or it is taken away."""
    for number in itertools.count():
        causes = next(holder[0], None) if holder else None
        if causes is None:
            return
        yield batches.pop(number), causes.numpy()


@functools.cache
def import_tensorflow() -> Any:
    """TensorFlow, kept off the accelerators: JAX needs their memory."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf


# What is known of clips.


def known_clip(source: sources.Source, index: int) -> sources.Clip:
    """A clip, with nothing but a name where the shard that tells of it has rotted."""
    try:
        return source.clips[index]
    except video.Unreadable as error:
        return sources.Clip(f"clip {index} ({error.detail})", ())


def known_clips(source: sources.Source) -> Iterator[sources.Clip]:
    return (known_clip(source, index) for index in range(len(source.clips)))


# The batches.


def encode(words: Words | None, captions: Sequence[str], pieces: int = 1) -> dict[str, Any]:
    """The ids "b l" of captions; "b k l" where each row has so many pieces, one after the other."""
    if words is None:
        return {}
    ids, mask, maskable = words.tokenizer.encode(captions, words.length)
    found = dict(text=ids, text_mask=mask, maskable=maskable)
    if pieces == 1:
        return found
    return {key: x.reshape(-1, pieces, words.length) for key, x in found.items()}


def row_shape(clips: Clips, look: Look) -> tuple[int, ...]:
    """The shape of a training row's video."""
    return look.shown if clips.pieces == 1 else (clips.pieces, *look.picture)


def classify(labels: Sequence[int | None], classes: int) -> dict[str, Any]:
    """The classes of clips, -1 of those that have none; nothing where none of the source has."""
    if not classes:
        return {}
    return dict(label=np.asarray([-1 if k is None else k for k in labels], np.int32))


def make_spec(batch: int, clips: Clips, look: Look, words: Words | None, classes: int) -> Spec:
    """Shapes and dtypes of a global training batch."""
    told = encode(words, [""] * clips.pieces, clips.pieces)
    sample = dict(
        video=np.zeros(row_shape(clips, look), np.uint8),
        id=np.int32(0),
        valid=np.bool_(True),
        **{key: rows[0] for key, rows in told.items()},
        **(dict(label=np.int32(0)) if classes else {}),
    )
    return {k: jax.ShapeDtypeStruct((batch, *x.shape), x.dtype) for k, x in sample.items()}


def train_batches(
    clips: Clips,
    look: Look,
    words: Words | None,
    order: Order,
    seed: int,
    run: Run,
    ledger: Ledger,
    first_step: int,
) -> Iterator[Batch]:
    """Endless training batches from a step on; nothing before it is decoded."""
    shape, classes = row_shape(clips, look), clips.source.survey().classes
    show = functools.partial(show_random, clips, look, seed)
    first = first_step * order.rows
    ledger.clear()
    pieces = run(functools.partial(attempt, show, order), shape, order.rows, first, None)
    for step, (pixels, causes) in enumerate(pieces, first_step):
        epochs, indices = rows_of(order, step)
        known = [known_clip(clips.source, int(i)) for i in indices]
        captions = [
            caption
            for e, i, clip in zip(epochs, indices, known, strict=True)
            for caption in choose_captions(clip, clips.pieces, seed, int(e), int(i))
        ]
        ledger.enter(indices, causes)
        yield dict(
            video=pixels,
            **encode(words, captions, clips.pieces),
            **classify([clip.label for clip in known], classes),
            id=indices.astype(np.int32),
            valid=causes == GOOD,
        )


def choose_captions(
    clip: sources.Clip, pieces: int, seed: int, epoch: int, index: int
) -> Sequence[str]:
    """One of a video's captions, or those of its pieces, which are all."""
    captions = clip.captions
    if pieces > 1:
        if len(captions) not in (0, pieces):
            raise UserError(f"'{clip.path}' has {len(captions)} captions, of pieces={pieces}")
        return captions or [""] * pieces
    if len(captions) < 2:
        return captions or [""]
    rng = np.random.default_rng([CAPTION, seed, epoch, index])
    return [captions[int(rng.integers(len(captions)))]]


class Ledger:
    """What became of the rows handed out: counts by cause, each failure named once in the log."""

    def __init__(self, source: sources.Source, max_failed: float):
        self.source = source
        self.max_failed = max_failed
        self.named: dict[int, str] = {}
        self.clear()

    def clear(self) -> None:
        self.rows = 0
        self.failed: collections.Counter[str] = collections.Counter()

    def counts(self) -> dict[str, int]:
        """rows, failed, and failed/<cause> for the causes that occurred."""
        by_cause = {f"failed/{cause}": n for cause, n in sorted(self.failed.items())}
        return dict(rows=self.rows, failed=self.failed.total(), **by_cause)

    def enter(self, indices: Int[np.ndarray, "b"], causes: Int[np.ndarray, "b"]) -> None:
        """Counts a batch. Raises UserError when too large a share of all rows has failed."""
        self.rows += int((causes != PADDING).sum())
        for index, number in zip(indices.tolist(), causes.tolist(), strict=True):
            if number >= 0:
                self.failed[CAUSES[number]] += 1
                self.name(index, CAUSES[number])
        if self.rows >= min(JUDGED, len(self.source.clips)) and self.too_many():
            by_cause = ", ".join(f"{n} {cause}" for cause, n in self.failed.most_common())
            first = ", ".join(map(repr, list(self.named.values())[:3]))
            raise UserError(
                f"{self.failed.total()} of {self.rows} rows cannot be read ({by_cause}), more than "
                f"max_failed={self.max_failed}; first {first}; look with vtp_jax.prepare check"
            )

    def too_many(self) -> bool:
        """Whether more clips have failed than may at all, or more rows than can be chance where as
        many clips fail as may."""
        clips, rows = (self.max_failed * n for n in (len(self.source.clips), self.rows))
        return len(self.named) > clips or self.failed.total() > rows + CHANCE * math.sqrt(rows)

    def name(self, index: int, cause: str) -> None:
        if index not in self.named:
            self.named[index] = path = known_clip(self.source, index).path
            logging.warning("unreadable video %s: %s (%s)", path, cause, video.CAUSES[cause])


# The evaluation streams.


def stream_videos(
    clips: Clips, look: Look, words: Words | None, make_order: Callable[[int], Order], run: Run
) -> Stream:
    """Every video once with its first caption; an unreadable one is `valid=False`."""
    count = len(clips.source.clips)
    order = make_order(count)
    shape = look.picture
    if look.views is not None:
        shape = (look.views[0] * look.views[1], *shape)
    elif clips.pieces > 1:
        shape = (clips.pieces, *shape)
    table, classes = make_table(clips.source), clips.source.survey().classes
    look_at = show_centre if look.views is None else show_views
    ledger = Ledger(clips.source, max_failed=1.0)

    def show(epoch: int, index: int, out: Pixels) -> None:
        look_at(clips, look, index, out)

    def batches() -> Iterator[Batch]:
        stop = order.rows * -(-count // order.batch)
        made = run(functools.partial(attempt, show, order), shape, order.rows, 0, stop)
        for step, (pixels, causes) in enumerate(made):
            _, indices = rows_of(order, step)
            ledger.enter(indices, causes)
            blank, told = [""] * clips.pieces, table["captions"]
            rows = [told[i] or blank if i >= 0 else blank for i in indices]
            captions = [c for row in rows for c in row[: clips.pieces]]
            labels = [table["label"][i] if i >= 0 else None for i in indices]
            yield dict(
                video=pixels,
                **encode(words, captions, clips.pieces),
                **classify(labels, classes),
                id=indices.astype(np.int32),
                valid=causes == GOOD,
            )

    return Stream(batches, count, table)


def stream_captions(
    source: sources.Source, words: Words, make_order: Callable[[int], Order]
) -> Stream:
    """Every caption once; `id` says of which video it is."""
    pairs = [(i, text) for i, clip in enumerate(known_clips(source)) for text in clip.captions]
    order = make_order(len(pairs))

    def batches() -> Iterator[Batch]:
        for start in range(0, order.rows * -(-len(pairs) // order.batch), order.rows):
            _, ranks = order.at(np.arange(start, start + order.rows))
            chosen = [pairs[r] if r >= 0 else (-1, "") for r in ranks]
            yield dict(
                encode(words, [text for _, text in chosen]),
                id=np.asarray([i for i, _ in chosen], np.int32),
                valid=ranks >= 0,
            )

    return Stream(batches, len(pairs), make_table(source))


def make_table(source: sources.Source) -> dict[str, Any]:
    """By id: `caption` (the first), `captions` (all), `label` (None where it has none), `path`."""
    known = list(known_clips(source))
    return dict(
        caption=[clip.captions[0] if clip.captions else "" for clip in known],
        captions=[clip.captions for clip in known],
        label=[clip.label for clip in known],
        path=[os.path.join(source.root, clip.path) for clip in known],
    )
