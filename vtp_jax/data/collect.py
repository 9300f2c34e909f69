"""From rows to batches: their words and labels, the count of failures, and evaluation streams."""

from __future__ import annotations

import collections
import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int

from vtp_jax.data import look as looks
from vtp_jax.data import sources, video
from vtp_jax.data.look import Drawn, Look, Middle, Pixels
from vtp_jax.data.open import Clips, Words, known_clips, unknown_clip
from vtp_jax.data.order import Order, rows_of
from vtp_jax.data.outline import make_spec
from vtp_jax.data.workers import Run
from vtp_jax.types import Batch, Stream, UserError

JUDGED = 100  # rows (or an epoch, if that is less) before too many failures stop a run
CHANCE = 5  # standard deviations
CAPTION = 3  # purpose of a random generator; those of the other modules differ
CAUSES = tuple(video.CAUSES)
GOOD, PADDING = -1, -2  # codes of rows, in addition to the numbers of causes


# Rows.


class TrainingRow(NamedTuple):
    """Makes a training row. The part of the clip depends only on (seed, epoch, index)."""

    clips: Clips
    look: Look
    order: Order
    seed: int

    def __call__(self, place: int, out: Pixels) -> tuple[int, sources.Clip | None, str]:
        return attempt(self, self.clips, self.order, place, out)

    def show(self, reader: looks.Reader, epoch: int, index: int, out: Pixels) -> None:
        rng = np.random.default_rng([looks.LOOK, self.seed, epoch, index])
        looks.show(reader, Drawn(self.look, self.clips.pieces, rng), out)


class EvalRow(NamedTuple):
    """Makes an evaluation row: the middle of its clip, or all test views."""

    clips: Clips
    look: Look
    order: Order

    def __call__(self, place: int, out: Pixels) -> tuple[int, sources.Clip | None, str]:
        return attempt(self, self.clips, self.order, place, out)

    def show(self, reader: looks.Reader, epoch: int, index: int, out: Pixels) -> None:
        if self.look.views is None:
            looks.show(reader, Middle(self.look, self.clips.pieces), out)
        else:
            looks.show_views(reader, self.look, out)


def attempt(
    row: TrainingRow | EvalRow, clips: Clips, order: Order, place: int, out: Pixels
) -> tuple[int, sources.Clip | None, str]:
    """Opens the clip of a place, once, and writes its pixels, or zeros; returns (code, clip, what
    is wrong). Whatever a clip raises is counted: one of a million must not end a run, and if there
    are many, the ledger ends it."""
    step, at = divmod(place, order.rows)
    epoch, index = (int(column[at]) for column in rows_of(order, step))
    if index < 0:
        out[...] = 0
        return PADDING, None, ""
    clip = None
    try:
        reader = clips.open(index)
        clip = reader.clip
        row.show(reader, epoch, index, out)
        return GOOD, clip, ""
    except UserError:  # of the config, not of this clip
        raise
    except Exception as error:
        out[...] = 0
        error = as_unreadable(error)
        return CAUSES.index(error.cause), clip or unknown_clip(index, error), error.detail


def as_unreadable(error: Exception) -> video.Unreadable:
    if isinstance(error, video.Unreadable):
        return error
    if isinstance(error, MemoryError):
        return video.Unreadable("too_large", "out of memory")
    at = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(at.filename)}, line {at.lineno}"
    told = " ".join(str(error).split())
    return video.Unreadable("failed", f"{type(error).__name__}: {told} ({where})")


def encode(words: Words | None, captions: Sequence[str], pieces: int = 1) -> dict[str, Any]:
    """text, text_mask and maskable "b l" of captions; "b k l" if each row has k = `pieces`
    consecutive captions."""
    if words is None:
        return {}
    ids, mask, maskable = words.tokenizer.encode(captions, words.length)
    found = dict(text=ids, text_mask=mask, maskable=maskable)
    if pieces == 1:
        return found
    return {key: x.reshape(-1, pieces, words.length) for key, x in found.items()}


def count_cut(
    words: Words | None, captions: Sequence[str], written: Mapping[str, Any]
) -> tuple[int, int] | None:
    """(captions, those among them that lost words at `text.length`) of what `encode` wrote."""
    if words is None:
        return None
    full = written["text_mask"].reshape(-1, words.length)[:, -1]
    may = [text for text, whole in zip(captions, full, strict=True) if whole]
    cut = (words.tokenizer.count(may) > words.length).sum() if may else 0
    return sum(map(bool, captions)), int(cut)


def classify(clips: Sequence[sources.Clip | None], classes: int) -> dict[str, Any]:
    """The labels "b" of clips, -1 for those without; empty if the source has no classes."""
    if not classes:
        return {}
    labels = (None if clip is None else clip.label for clip in clips)
    return dict(label=np.asarray([-1 if k is None else k for k in labels], np.int32))


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
    row, shape = TrainingRow(clips, look, order, seed), look.train_shape(clips.pieces)
    classes = clips.source.survey().classes
    ledger.clear()
    for step, (pixels, codes, found, faults) in enumerate(
        run(row, shape, order.rows, first_step * order.rows, None), first_step
    ):
        epochs, indices = rows_of(order, step)
        captions = [
            caption
            for e, i, clip in zip(epochs, indices, found, strict=True)
            for caption in choose_captions(clip, clips.pieces, seed, int(e), int(i))
        ]
        written = encode(words, captions, clips.pieces)
        cut = count_cut(words, captions, written)
        ledger.enter(step, indices, codes, found, faults, cut)
        yield dict(
            video=pixels,
            **written,
            **classify(found, classes),
            id=indices.astype(np.int32),
            valid=codes == GOOD,
        )


def choose_captions(
    clip: sources.Clip | None, pieces: int, seed: int, epoch: int, index: int
) -> Sequence[str]:
    """One of a video's captions, or all of them, one for each piece."""
    captions = () if clip is None else clip.captions
    if pieces > 1:
        if clip is not None and len(captions) not in (0, pieces):
            raise UserError(f"'{clip.path}' has {len(captions)} captions, but pieces={pieces}")
        return captions or [""] * pieces
    if len(captions) < 2:
        return captions or [""]
    rng = np.random.default_rng([CAPTION, seed, epoch, index])
    return [captions[int(rng.integers(len(captions)))]]


class Ledger:
    """Counts rows, failures by cause, and captions that were cut; logs each unreadable clip
    once.

    max_failed: the share of clips that may fail; unless it is 0, one of several may in any case
    check:      the command that checks all files of the source, if there is one
    """

    def __init__(self, source: sources.Source, max_failed: float, check: str = ""):
        self.source, self.max_failed, self.check = source, max_failed, check
        count = len(source.clips)
        least = 1 if max_failed > 0 and count > 1 else 0
        self.most = max(max_failed * count, least)  # clips that may fail
        self.named: dict[int, str] = {}
        self.clear()

    def clear(self) -> None:
        self.rows = 0
        self.odd: collections.Counter[str] = collections.Counter()  # `failed`, by type of error
        self.failed: collections.Counter[str] = collections.Counter()
        # Batches are made ahead in another thread; each entry waits here until its step is used.
        self.waiting: collections.deque[tuple[int, dict[str, int], Sequence[str]]] = (
            collections.deque()
        )
        self.used: collections.Counter[str] = collections.Counter(rows=0)
        self.used_failed: collections.Counter[str] = collections.Counter()

    def counts(self, step: int) -> dict[str, int]:
        """rows, failed, and failed/<cause> for the causes that occurred; with text also captions,
        and cut, those longer than `text.length`; in the batches of the steps before `step`, which
        must not decrease between calls."""
        while self.waiting and self.waiting[0][0] < step:
            _, used, causes = self.waiting.popleft()
            self.used.update(used)
            self.used_failed.update(causes)
        by_cause = {f"failed/{cause}": n for cause, n in sorted(self.used_failed.items())}
        return dict(self.used, failed=self.used_failed.total(), **by_cause)

    def enter(
        self,
        step: int,
        indices: Int[np.ndarray, "b"],
        codes: Int[np.ndarray, "b"],
        clips: Sequence[sources.Clip | None],
        faults: Sequence[str],
        texts: tuple[int, int] | None = None,
    ) -> None:
        """Counts the batch of a step. texts: its captions, and how many were cut. Raises UserError
        when too large a share of all rows made so far has failed."""
        rows, causes = int((codes != PADDING).sum()), [CAUSES[code] for code in codes if code >= 0]
        self.rows += rows
        self.failed.update(causes)
        used = dict(rows=rows) | ({} if texts is None else dict(captions=texts[0], cut=texts[1]))
        self.waiting.append((step, used, causes))
        found = zip(indices.tolist(), codes.tolist(), clips, faults, strict=True)
        for index, code, clip, fault in found:
            if code >= 0:
                self.name(index, CAUSES[code], clip, fault)
        if self.too_many():
            by_cause = ", ".join(f"{n} {cause}" for cause, n in self.failed.most_common())
            if self.odd:
                by_cause += f"; errors {', '.join(self.odd)}"
            first, more = list(self.named.values())[:3], len(self.named) - 3
            named = "; ".join(first) + (f"; and {more} more" if more > 0 else "")
            raise UserError(
                f"{self.failed.total()} of {self.rows} rows cannot be read ({by_cause}), more than "
                f"data.max_failed={self.max_failed} allows of {len(self.source.clips)} clips: "
                f"{named}" + (f". This checks all files: {self.check}" if self.check else "")
            )

    def too_many(self) -> bool:
        """Whether more clips have failed than may, which is certain at once; or, from JUDGED rows
        on, more rows than chance explains if the share of failing clips is the allowed one."""
        if len(self.named) > self.most:
            return True
        count = len(self.source.clips)
        rows = self.rows * self.most / max(count, 1)
        late = self.rows >= min(JUDGED, count)
        return late and self.failed.total() > rows + CHANCE * math.sqrt(rows)

    def name(self, index: int, cause: str, clip: sources.Clip | None, fault: str) -> None:
        if index not in self.named:
            path = str(index) if clip is None else clip.path
            meaning = f"{video.CAUSES[cause]}: {fault}" if fault else video.CAUSES[cause]
            self.named[index] = f"{path}: {cause} ({meaning})"
            logging.warning("unreadable video %s", self.named[index])
            if cause == "failed":
                self.odd[fault.partition(":")[0]] += 1


# The evaluation streams.


def open_streams(
    name: str,
    clips: Clips,
    look: Look,
    words: Words | None,
    make_order: Callable[[int], Order],
    run: Run,
) -> dict[str, Stream]:
    """`name`: every video once; `name/captions`, if there is a tokenizer: every caption once.
    Records of shards are read once for the table of both, and once per row."""
    known = known_clips(clips.source)
    table = make_table(clips.source, known)
    streams = {name: stream_videos(clips, look, words, make_order, run, table)}
    if words:
        streams[f"{name}/captions"] = stream_captions(known, words, make_order, table)
    return streams


def stream_videos(
    clips: Clips,
    look: Look,
    words: Words | None,
    make_order: Callable[[int], Order],
    run: Run,
    table: dict[str, Any],
) -> Stream:
    """Every video once with its first caption; an unreadable one is `valid=False`."""
    count, pieces = len(clips.source.clips), clips.pieces
    order = make_order(count)
    row, shape = EvalRow(clips, look, order), look.eval_shape(pieces)
    classes = clips.source.survey().classes
    ledger = Ledger(clips.source, max_failed=1.0)

    def batches() -> Iterator[Batch]:
        ledger.clear()
        stop = order.rows * -(-count // order.batch)
        for step, (pixels, codes, found, faults) in enumerate(run(row, shape, order.rows, 0, stop)):
            _, indices = rows_of(order, step)
            ledger.enter(step, indices, codes, found, faults)
            texts = ((clip.captions if clip else ()) or [""] * pieces for clip in found)
            yield dict(
                video=pixels,
                **encode(words, [c for row in texts for c in row[:pieces]], pieces),
                **classify(found, classes),
                id=indices.astype(np.int32),
                valid=codes == GOOD,
            )

    length = words.length if words else 0
    spec = make_spec(order.batch, shape, pieces=pieces, length=length, labelled=classes > 0)
    return Stream(batches, count, table, spec)


def stream_captions(
    known: Sequence[sources.Clip],
    words: Words,
    make_order: Callable[[int], Order],
    table: dict[str, Any],
) -> Stream:
    """Every caption once; `id` is that of its video."""
    pairs = [(i, text) for i, clip in enumerate(known) for text in clip.captions]
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

    spec = make_spec(order.batch, None, pieces=1, length=words.length, labelled=False)
    return Stream(batches, len(pairs), table, spec)


def make_table(source: sources.Source, known: Sequence[sources.Clip]) -> dict[str, Any]:
    """Columns by id: `caption` (the first), `captions` (all), `label` (None without), `path`."""
    return dict(
        caption=[clip.captions[0] if clip.captions else "" for clip in known],
        captions=[clip.captions for clip in known],
        label=[clip.label for clip in known],
        path=[os.path.join(source.root, clip.path) for clip in known],
    )
