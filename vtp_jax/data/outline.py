"""The outline of `config.data`: shapes of its training batches, and the facts that methods need.

`describe` derives it from the config alone, without reading a file: for planning and measuring on
machines without the data, and for tests. The pipeline builds its spec and facts by the same
functions from its files. Moving shapes are drawn, not read, so `describe` opens them as the
pipeline does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging

from vtp_jax.data import sets, sources
from vtp_jax.data import text as tokens
from vtp_jax.data.open import More, fit, list_parts, open_look, open_set, open_text
from vtp_jax.types import KEYS, Spec, UserError

# RGB in [0, 1]: ImageNet's, as in SimVTP and VideoMAE.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Outline(NamedTuple):
    """The batches and facts of a config's data.

    spec:  shapes and dtypes of a global training batch
    facts: mean and std of pixels; vocab_size, pad_id, cls_id and sep_id of the tokenizer, and its
           unk_id and mask_id if it has them; labels, the number of classes: 0 without labels,
           absent if only the files define it
    """

    spec: Spec
    facts: Mapping[str, Any]


def describe(data: Mapping[str, Any], batch: int) -> Outline:
    """The outline of `config.data` for `config.batch`, from the config alone.

    Raises UserError if the config does not define the size of the vocabulary in a file.
    """
    require("config.data", data, "kind", "train", "video")
    parts = list_parts(data["train"], data.get("also"))
    kind, train = data["kind"], data["train"]
    counts = [count_classes(where, kind, one.train) for where, one in parts.items()]
    text = data.get("text") or {}
    if text:
        require("config.data.text", text, "kind", "length")
    pieces = next(plain_sets(kind, train))[1].get("pieces", 1)
    return Outline(
        make_spec(
            batch,
            open_look("data.video", data["video"]).train_shape(pieces),
            pieces=pieces,
            length=text.get("length", 0),
            labelled=is_labelled(kind, train),
        ),
        make_facts(
            describe_words(kind, parts, text) if text else {},
            labels=None if None in counts else sum(n or 0 for n in counts),
        ),
    )


def require(where: str, section: Mapping[str, Any], *keys: str) -> None:
    """Raises UserError unless a section has the keys."""
    if missing := [key for key in keys if key not in section]:
        raise UserError(f"{where}: the key '{missing[0]}' is missing")


def make_spec(
    batch: int, video: Sequence[int] | None, *, pieces: int, length: int, labelled: bool
) -> Spec:
    """Shapes and dtypes of a global batch. video: shape of a row's, None without videos; length:
    tokens of a text, 0 without text."""
    several = () if pieces == 1 else (pieces,)
    rows: dict[str, tuple[int, ...]] = dict(id=(), valid=())
    if video is not None:
        rows["video"] = tuple(video)
    if length:
        rows |= {key: (*several, length) for key in ("text", "text_mask", "maskable")}
    if labelled:
        rows["label"] = ()
    return {k: jax.ShapeDtypeStruct((batch, *s), KEYS[k].dtype) for k, s in rows.items()}


def make_facts(words: Mapping[str, int], labels: int | None) -> dict[str, Any]:
    """The facts that methods need. words: the tokenizer's; labels: None if unknown."""
    known = {} if labels is None else dict(labels=labels)
    return dict(words, mean=MEAN, std=STD, **known)


def plain_sets(kind: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(kind, arguments) of a set, or of each set of a mixture."""
    kind = given.get("kind", kind)
    if "mix" not in given:
        yield kind, given
    for one in given.get("mix", {}).values():
        yield from plain_sets(kind, one)


def is_labelled(kind: str, given: Mapping[str, Any]) -> bool:
    """Whether batches of a set have labels, according to its section. Shards have the labels of the
    files they were made from, so their section has the same `label_column`."""
    for kind_, one in plain_sets(kind, given):
        if kind_ == "shapes":
            found = one.get("label") is not None or one.get("caption") == "question"
        elif kind_ == "sets":
            require("config.data, a set by name", one, "set", "split")
            found = sets.find(one["set"], one["split"]).labelled
        else:
            found = one.get("label_column") is not None
        if found:
            return True
    return False


def check_labels(where: str, kind: str, given: Mapping[str, Any], classes: int) -> None:
    """Logs a warning if a set has labels that its section does not name, or the reverse: a plan or
    measurement of this config then assumes different batches."""
    if is_labelled(kind, given) != (classes > 0):
        found = "labels that it does not name" if classes else "no labels, but names some"
        logging.warning("%s has %s; set label_column to match the data", where, found)


def is_drawn(kind: str, given: Mapping[str, Any]) -> bool:
    """Whether the whole set is drawn in memory."""
    return all(one == "shapes" for one, _ in plain_sets(kind, given))


def count_classes(where: str, kind: str, given: Mapping[str, Any]) -> int | None:
    """The number of classes of a set; None if only its files define it."""
    if not is_labelled(kind, given):
        return 0
    if is_drawn(kind, given):
        return open_set(where, kind, given, "train").source.survey().classes
    return None


def describe_words(
    kind: str, parts: Mapping[str, More], text: Mapping[str, Any]
) -> Mapping[str, int]:
    """The facts of the tokenizer of `data.text`."""
    path, size = text.get("path"), text.get("vocab_size")
    if path is None and all(is_drawn(kind, one.train) for one in parts.values()):
        opened = [open_set(w, kind, one.train, "train").source for w, one in parts.items()]
        return fit("data.text", open_text, text, sources.join(opened)).tokenizer.facts
    facts = tokens.expected(text["kind"], tokens.SMALL if path is None and size is None else size)
    if "vocab_size" not in facts:
        raise UserError(
            f"data.text: only {path} defines the number of pieces; set data.text.vocab_size"
        )
    return facts
