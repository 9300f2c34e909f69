"""What a run keeps of its data: facts, tokenizer and names of classes.

With these files in its folder, a run is evaluated, drawn, exported and called from Python without
its training set, wherever the folder is moved.

    data.json          the facts that methods need, how batches are structured, and fingerprints
                       of the lists of training clips
    tokenizer.model, vocab.txt or merges.txt.gz
                       the tokenizer's own file, if there is text; a vocabulary has its
                       tokenizer_config.json beside it
    labels.txt         the names of the classes, one a line, if they are known
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath

from vtp_jax.data import sources
from vtp_jax.data.open import Chosen, Words
from vtp_jax.data.text import SPELLING
from vtp_jax.types import UserError

FILE, LABELS = "data.json", "labels.txt"
TOKENIZERS = dict(sentencepiece="tokenizer.model", wordpiece="vocab.txt", clip="merges.txt.gz")


class Kept(NamedTuple):
    """The files that a run has kept.

    pieces:    clips of a training row, as in `open.Clips`
    labelled:  whether training batches have labels
    classes:   the number of classes of each source of training batches, in order
    words:     the facts of the tokenizer; empty without text
    tokenizer: its file, or None
    labels:    the names of the classes, empty if unknown
    lists:     `fingerprint` of each source of training batches; empty in runs of older versions
    """

    pieces: int
    labelled: bool
    classes: Mapping[str, int]
    words: Mapping[str, int]
    tokenizer: str | None
    labels: tuple[str, ...]
    lists: Mapping[str, Sequence[Any]] = {}


def write(
    *,
    pieces: int,
    labelled: bool,
    classes: Mapping[str, int],
    words: Words | None,
    kind: str | None,
    labels: Sequence[str],
    lists: Mapping[str, Sequence[Any]] = {},
) -> dict[str, bytes]:
    """The files to keep, by name. kind: of the tokenizer."""
    facts: Mapping[str, int] = words.tokenizer.facts if words else {}
    name = TOKENIZERS[str(kind)] if words else None
    about: dict[str, Any] = dict(
        pieces=pieces, labelled=labelled, classes=dict(classes), words=dict(facts), tokenizer=name
    )
    about["lists"] = {where: list(one) for where, one in lists.items()}
    files = {FILE: json.dumps(about, indent=1).encode()}
    if words and name:
        files |= {name: words.tokenizer.file, **words.tokenizer.beside}
    if labels:
        files[LABELS] = "".join(f"{' '.join(label.split())}\n" for label in labels).encode()
    return files


def save(folder: str | os.PathLike[str], files: Mapping[str, bytes], *, resumed: bool) -> None:
    """Writes the files of `write` into the folder of a run. Raises UserError if a resumed run has
    another tokenizer than it began with, since its tokens would change their meaning; logs a
    warning if its lists of clips are not those of its last start. Every process of a run may call
    it; the first writes."""
    place = epath.Path(folder)
    for name in set(files) & set(TOKENIZERS.values()):
        if resumed and (place / name).exists() and (place / name).read_bytes() != files[name]:
            raise UserError(
                f"config.data.text is not the tokenizer that the run began with; go on with "
                f"--config.data.text.path={place / name}, or start in another workdir"
            )
    if jax.process_index() == 0:
        if resumed and (place / FILE).exists():
            before, now = (
                (json.loads(x).get("lists") or {})
                for x in ((place / FILE).read_text(), files.get(FILE, b"{}"))
            )
            for change in changes(before, now):
                logging.warning(
                    "%s: training goes on with the new one, in another order than before; the "
                    "tokenizer and the values chosen from the data stay",
                    change,
                )
        for name, content in files.items():
            (place / name).write_bytes(content)


def fingerprint(source: sources.Source) -> tuple[int, str]:
    """The number of clips, and a hash of their paths, captions and labels; "" where clips are read
    from disk one by one, as those of shards."""
    clips, chosen = source.clips, None
    if isinstance(clips, Chosen):
        clips, chosen = clips.clips, clips.chosen
    if not isinstance(clips, (list, tuple)):
        return len(source.clips), ""
    found = hashlib.blake2b(digest_size=8)
    for clip in clips if chosen is None else (clips[i] for i in chosen):
        found.update(repr((clip.path, clip.captions, clip.label)).encode(errors="replace"))
    return len(source.clips), found.hexdigest()


def changes(before: Mapping[str, Sequence[Any]], now: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """What has changed between two starts of a run, in words, for each list that both have."""
    for where in before.keys() & now.keys():
        (had, old), (has, new) = before[where], now[where]
        if had != has:
            yield f"{where} has changed since the last start: {had} clips then, {has} now"
        elif old and new and old != new:
            yield f"{where} has changed since the last start: other paths, captions or labels"


def read(folder: str | os.PathLike[str]) -> Kept | None:
    """What the run in `folder` has kept; None for runs of older versions, which kept nothing.
    Raises UserError if a file is missing or damaged."""
    place = epath.Path(folder)
    if not (place / FILE).exists():
        return None
    try:
        about: dict[str, Any] = json.loads((place / FILE).read_text())
        kept = Kept(**about, labels=read_labels(place / LABELS))
    except (TypeError, ValueError):
        raise UserError(f"{place / FILE} is damaged; copy it again from the run") from None
    if kept.tokenizer is None:
        return kept
    file = place / kept.tokenizer
    if not file.exists():
        raise UserError(f"no tokenizer '{file}'; copy the run's folder with all of its files")
    return kept._replace(tokenizer=local(file))


def files(folder: str | os.PathLike[str], known: Kept | None) -> dict[str, bytes]:
    """What the run in `folder` has kept, by name, for a copy in another folder."""
    if known is None:
        return {}
    names = [FILE, LABELS, SPELLING, *TOKENIZERS.values()]
    found = (epath.Path(folder) / name for name in names)
    return {file.name: file.read_bytes() for file in found if file.exists()}


def with_own_words(data: Mapping[str, Any], known: Kept) -> Mapping[str, Any]:
    """`config.data` with the tokenizer that the run has kept."""
    if not data.get("text"):
        return data
    own = dict(path=known.tokenizer, vocab_size=known.words["vocab_size"])
    return {**data, "text": {**data["text"], **own}}


def read_labels(file: epath.Path) -> tuple[str, ...]:
    """One name a line; empty if there is no such file."""
    return tuple(file.read_text().split("\n")[:-1]) if file.exists() else ()


def local(file: epath.Path) -> str:
    """The path of a local copy of a file that is elsewhere, or its own."""
    if "://" not in os.fspath(file):
        return os.fspath(file)
    folder = Path(tempfile.mkdtemp(prefix="vtp_jax_"))
    for one in (file, file.parent / SPELLING):
        if one.exists():
            (folder / one.name).write_bytes(one.read_bytes())
    return str(folder / file.name)
