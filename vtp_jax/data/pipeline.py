"""From `config.data` to training batches and evaluation streams: the maker that composes the parts.

open (sets of clips, tokenizer) -> look (frames and crops) -> workers (rows in parallel) -> collect
(words, counts, batches, streams); outline has the spec and the facts.

The order of clips, the frames, the crop and the caption are functions of (seed, epoch, index). A
run that starts at step k therefore gets the same batches as an uninterrupted one, and the global
batches are the same for any number of processes.

Rows continue across epochs: position p = step * batch + row belongs to epoch p // rows, and each
epoch has every clip exactly once; a batch may contain the end of one epoch and the start of the
next. The place of a clip is computed (order.py), not stored.
"""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from vtp_jax import lines
from vtp_jax.data import alternate, kept, outline, sources, traits
from vtp_jax.data.collect import Ledger, open_streams, train_batches
from vtp_jax.data.look import Look
from vtp_jax.data.open import (
    Clips,
    Words,
    check_captions,
    check_names,
    check_stride,
    check_views,
    fit,
    list_parts,
    make_order,
    open_given,
    open_look,
    open_set,
    open_text,
)
from vtp_jax.data.order import Order, list_order
from vtp_jax.data.workers import Run, cores, run_here, run_tfdata, run_threads
from vtp_jax.types import Batch, Data, Stream, UserError, at_least


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
    labels: str | None = None,
    max_failed: float = 0.05,
    workers: int | None = None,
    process: tuple[int, int] = (0, 1),
) -> Data:
    """The training batches and evaluation streams of video files, or of shapes drawn in memory.

    kind:    `files`, `shards` (written by `prepare shards`) or `sets` (public data sets), each by
             tf.data, or `shapes` (without files and TensorFlow); a set may override it. With
             `shards`, sets other than `train` with a `list` but no shards are read as files
    batch:   rows of a global training batch; eval_batch: of an evaluation batch (same by default)
    train:   the arguments of `open_files`, `open_shards`, `open_shapes` or `open_community`, and
             `held_out`, a share of the clips, by a hash of their paths, that training leaves out
             and an evaluation set with the same share consists of; or
             dict(mix={name: as `train`, plus `weight`}): rows of several sets, in proportion
    also:    {name: the fields of `More`}: sources of another structure, such as images, whose
             batches alternate with those of `train`, which has `turns` turns in a round; the order
             is drawn for each round
    evals:   {name: as `train`, plus `of`, the source of `also` whose classes it has, if not those
             of `train`}; each gives two streams, `name` (videos, with their first captions) and
             `name/captions` (every caption, no videos); for shapes, the held-out clips
    video:   the fields of `look.Look`
    text:    the arguments of `open_text`; without it no captions are read
    labels:  a file with the names of the classes, one a line, for people who read results; by
             default those that the data set knows
    max_failed: the run stops when a larger share of its training clips cannot be read. Unless it is
             0, one of several may be unreadable, however few they are
    workers: videos decoded in parallel, by default one per core
    process: (index, count); this process makes its equal share of the rows of each batch, in order

    Raises UserError where arguments are inconsistent.
    """
    at_least("data", 1, batch=batch, eval_batch=eval_batch, workers=workers, turns=turns)
    for name, rows in (("batch", batch), ("eval_batch", eval_batch or batch)):
        if rows < 1 or rows % process[1]:
            raise UserError(f"data.{name}={rows} does not divide over {process[1]} processes")
    run = choose_run(kind, workers)
    look = open_look("data.video", video)
    parts = list_parts(train, also, turns)
    clips = {where: open_set(where, kind, one.train, "train") for where, one in parts.items()}
    words = open_words(clips, text) if text else None
    for where, one in clips.items():
        if words:
            traits.check_length(where, words, one.source)

    def open_training(where: str) -> alternate.Training:
        own, one = clips[where], parts[where]
        look = open_look(f"{where}.video", {**video, **one.video})
        rows = one.batch or batch
        if rows % process[1]:
            raise UserError(f"{where}.batch={rows} does not divide over {process[1]} processes")
        check_views(own, where, "repeats", look.repeats > 1)
        check_stride(own, where, look)
        order, classes = make_order(own, rows, process, seed), own.source.survey().classes
        outline.check_labels(where, kind, one.train, classes)
        ledger = Ledger(own.source, max_failed, " && ".join(check_commands(kind, one.train)))
        return alternate.Training(
            spec=outline.make_spec(
                rows,
                look.train_shape(own.pieces),
                pieces=own.pieces,
                length=words.length if words else 0,
                labelled=classes > 0,
            ),
            batches=functools.partial(train_batches, own, look, words, order, seed, run, ledger),
            rows=len(own.source.clips),
            classes=classes,
            counts=ledger.counts,
        )

    trained = {where: open_training(where) for where in parts}
    training = alternate.alternate(
        list(trained.values()), [one.turns for one in parts.values()], seed
    )
    classes = {where: one.classes for where, one in trained.items()}
    names = read_names(labels, training.classes) if labels else name_classes(clips, classes)
    order = functools.partial(list_order, eval_batch or batch, process)
    streams = {}
    for name, section in (evals or {}).items():
        streams |= open_evaluation(name, section, kind, look, words, classes, order, run)
    first = clips["data.train"]
    # A label that occurs in evaluation alone needs a place in the head too.
    asked = (k for stream in streams.values() for k in stream.table["label"] if k is not None)
    count = training.classes and max(training.classes, max(asked, default=-1) + 1)
    return Data(
        spec=training.spec,
        batches=training.batches,
        rows=training.rows,
        streams=streams,
        facts=outline.make_facts(words.tokenizer.facts if words else {}, count),
        decode=decoder(words),
        counts=training.counts,
        keep=kept.write(
            pieces=first.pieces,
            labelled=classes["data.train"] > 0,
            classes=classes,
            words=words,
            kind=text["kind"] if text else None,
            labels=names,
            lists={where: kept.fingerprint(one.source) for where, one in clips.items()},
        ),
        labels=names,
    )


def check_commands(kind: str, section: Mapping[str, Any]) -> Iterator[str]:
    """The commands that check all files of a section of `config.data`; none of other kinds."""
    for one, given in outline.plain_sets(kind, section):
        if one == "files" and given.get("root"):
            words = ["vtp", "prepare", "check", "--root", str(given["root"])]
            if listed := given.get("list") or given.get("captions"):
                words += ["--list", str(listed)]
                words += ["--path-column", str(given.get("path_column", "path"))]
                words += ["--caption-column", str(given.get("caption_column", "caption")).lower()]
            yield shlex.join(words)


def open_evaluation(
    name: str,
    section: Mapping[str, Any],
    kind: str,
    look: Look,
    words: Words | None,
    classes: Mapping[str, int],
    order: Callable[[int], Order],
    run: Run,
) -> dict[str, Stream]:
    """The streams of an evaluation set of `make`. classes: of each source of training batches."""
    where, section = f"data.evals.{name}", dict(section)
    of = f"data.also.{section.pop('of')}" if "of" in section else "data.train"
    if of not in classes:
        known = ", ".join(one.removeprefix("data.also.") for one in list(classes)[1:]) or "none"
        raise UserError(f"{where}.of: {of} does not exist; data.also has {known}")
    held_out = open_set(where, kind, section, "val")
    check_views(held_out, where, "views", look.views is not None)
    check_stride(held_out, where, look)
    if words:
        check_captions(held_out.source, where)
    found = open_streams(name, held_out, look, words, order, run)
    before = sum(list(classes.values())[: list(classes).index(of)])
    return {**found, name: alternate.label_on(found[name], before)}


def name_classes(clips: Mapping[str, Clips], classes: Mapping[str, int]) -> tuple[str, ...]:
    """The names of the classes of all sources of training batches, in order; empty if no source
    knows any."""
    known = [one.source.names for one in clips.values()]
    if len(known) == 1 or not any(known):
        return known[0]
    return tuple(
        one[n] if n < len(one) else f"class {n}"
        for one, count in zip(known, classes.values(), strict=True)
        for n in range(count)
    )


def read_names(file: str, classes: int) -> tuple[str, ...]:
    """The names of the classes in `config.data.labels`."""
    names = [name for _, name in lines.items(file)]
    if len(names) < classes:
        raise UserError(
            f"data.labels: {file} names {len(names)} of {classes} classes; add the rest"
        )
    return tuple(names)


class Lazy(Mapping[str, Stream]):
    """Evaluation streams by name, each opened when it is first used, so that a set that is absent
    is missed only by what needs it. open: raises KeyError on a name that is not in `names`."""

    def __init__(self, names: Iterable[str], open: Callable[[str], Stream]):
        self.names = tuple(names)
        self.open = functools.cache(open)

    def __getitem__(self, name: str) -> Stream:
        return self.open(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def reopen(
    data: Mapping[str, Any], known: kept.Kept, *, batch: int, process: tuple[int, int] = (0, 1)
) -> Data:
    """The `Data` of a run that has kept what it needs: its training set is not read, and has no
    batches; its evaluation sets are opened when they are used. data: `config.data`; batch:
    `config.batch`. Raises UserError where arguments are inconsistent."""
    check_names("config.data", make, {"batch": batch, "seed": 0, **data})
    kind, text, look = data["kind"], data.get("text"), open_look("data.video", data["video"])
    words = fit("data.text", open_text, text, sources.Source("", ())) if text else None
    order = functools.partial(list_order, data.get("eval_batch") or batch, process)
    run = choose_run(kind, data.get("workers"))
    evals = data.get("evals") or {}
    sets = {name: name for name in evals}
    if words:
        sets |= {f"{name}/captions": name for name in evals}

    @functools.cache
    def open_one(name: str) -> Mapping[str, Stream]:
        return open_evaluation(name, evals[name], kind, look, words, known.classes, order, run)

    def no_training(step: int) -> Iterator[Batch]:
        raise UserError("a run that was restored has no training batches; `vtp train` reads them")

    return Data(
        spec=outline.make_spec(
            batch,
            look.train_shape(known.pieces),
            pieces=known.pieces,
            length=words.length if words else 0,
            labelled=known.labelled,
        ),
        batches=no_training,
        rows=0,
        streams=Lazy(sets, lambda name: open_one(sets[name])[name]),
        facts=outline.make_facts(known.words, sum(known.classes.values())),
        decode=decoder(words),
        labels=known.labels,
    )


def choose_run(kind: str, workers: int | None) -> Run:
    """How the rows of sets of a kind are made."""
    run = run_here if kind == "shapes" else run_tfdata
    return functools.partial(run, workers=workers or cores())


def decoder(words: Words | None) -> Callable[[Any], list[str]]:
    """`Data.decode`."""
    return words.tokenizer.decode if words else lambda ids: [""] * len(ids)


def open_words(clips: Mapping[str, Clips], text: Mapping[str, Any]) -> Words:
    """The tokenizer of `data.text`, for the clips of all sources of training batches."""
    for where, one in clips.items():
        check_captions(one.source, where)
    everything = sources.join([one.source for one in clips.values()])
    return fit("data.text", open_text, text, everything)


def given(
    data: Mapping[str, Any],
    paths: Sequence[str | os.PathLike[str]],
    captions: Sequence[str] | None,
    *,
    at_once: int = 8,
    ways: int = 1,
) -> dict[str, Stream]:
    """Evaluation streams of video files outside any config.

    data:     `config.data` of any kind: its look, with one clip in the middle of each video, and
              its tokenizer are used
    paths:    files, or folders of videos; captions: one for each, or None
    at_once:  rows of a batch, at most the number of videos, rounded up to a multiple of `ways`

    Returns `given` and, if the config has a tokenizer, `given/captions`. Raises UserError.
    """
    clips, look = open_given(paths, captions), look_of(data, views=False)
    rows = -(-min(len(clips.source.clips), at_once) // ways) * ways
    return given_streams(clips, look, words_of(data), rows)


def look_of(data: Mapping[str, Any], *, views: bool) -> Look:
    """The look of `config.data`, with its test views or with one clip in the middle."""
    return open_look("data.video", {**data["video"], **({} if views else dict(views=None))})


def words_of(data: Mapping[str, Any]) -> Words | None:
    """The tokenizer of `config.data`, None if it has no text."""
    text = data.get("text")
    if not text:
        return None
    if text.get("path") is not None:
        return fit("data.text", open_text, text, sources.Source("", ()))
    # It was trained on the captions of training.
    parts = list_parts(data["train"], data.get("also"))
    clips = {w: open_set(w, data["kind"], one.train, "train") for w, one in parts.items()}
    return open_words(clips, text)


def given_streams(clips: Clips, look: Look, words: Words | None, rows: int) -> dict[str, Stream]:
    """The streams `given` and, with a tokenizer, `given/captions`, in batches of `rows`. Videos are
    read by threads: TensorFlow is not needed."""
    order = functools.partial(list_order, rows, (0, 1))
    run = functools.partial(run_threads, workers=cores())
    return open_streams("given", clips, look, words, order, run)
