"""What the numbers of evaluators are of, by the config: set, split, and the net's training.

Whether a number is zero-shot does not depend on how it is computed, but on what the net was trained
on; an evaluator does not know that, a config does.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vtp_jax.data import sets
from vtp_jax.run import paths
from vtp_jax.run.evaluations import Subject
from vtp_jax.setup import cli
from vtp_jax.setup.config import Config, Section
from vtp_jax.types import Evaluator

# The last parts of a folder's path that name a part of a set, and not the set.
PART = re.compile(r"(?:^|[/_-])(?:train|training|val|valid|validation|test|shards)$")
HERE = ("--config.evals.", "--config.data.evals.", "--config.data.video.")
COMPARED = ("retrieval", "rerank")  # types whose numbers papers call zero-shot or fine-tuned


class Part(NamedTuple):
    """The part of a set that a section of `config.data` reads. set: its name or folder; split: the
    split or list, "" if all of the folder is read."""

    set: str
    split: str

    def __str__(self) -> str:
        return f"{self.set}, {self.split}" if self.split else self.set


class Training(NamedTuple):
    """What a net was trained on. unknown: weights that it started from, of which nothing is known
    here."""

    parts: list[Part]
    unknown: list[str]


def subjects(
    cfg: Config, made: Mapping[str, tuple[int, Evaluator]], overrides: Sequence[str] = ()
) -> dict[str, Subject]:
    """The subject of each evaluator of `made` (build.evaluators). overrides: the `--config.x=y`
    that the run was not trained with."""
    return {name: subject(cfg, name, check, overrides) for name, (_, check) in made.items()}


def subject(cfg: Config, name: str, check: Evaluator, overrides: Sequence[str] = ()) -> Subject:
    """The subject of the evaluator `name` of `config.evals`."""
    given = {k: v for k, v in cfg.evals[name].items() if k != "every"}
    takes = inspect.signature(cli.find("evals", given["type"])).parameters
    stream = given.get("stream", takes["stream"].default if "stream" in takes else "")
    streams = cfg.data.get("evals") or {}
    # The tokenizer's own path is not among them: a run keeps a copy, and a workdir may move.
    text = {k: v for k, v in (cfg.data.get("text") or {}).items() if k != "path"}
    settings: dict[str, Any] = dict(evaluator=given, video=cfg.data.get("video"), text=text)
    if elsewhere := [one for one in overrides if not one.startswith(HERE)]:
        settings["overrides"] = elsewhere
    words, part = [], Part("", "")
    if stream in streams:
        settings["data"], part = streams[stream], part_of(cfg.data.get("kind", ""), streams[stream])
        words += [f"'{stream}' is {part}.", trained(cfg, part, given["type"])]
    for key, other in given.items():
        if key != "stream" and isinstance(other, str) and other in streams:
            settings[key] = streams[other]
            words.append(f"The {key} '{other}' is {part_of(cfg.data['kind'], streams[other])}.")
    words.append(f"{check.protocol[:1].upper()}{check.protocol[1:].rstrip('.')}.")
    if given["type"] == "mean":  # of losses, of which some compare the rows of a batch
        settings["rows"] = cfg.data.get("eval_batch") or cfg.batch
        words.append(f"Batches of {settings['rows']} rows.")
    if weights := given.get("weights"):
        words.append(f"Weights: {weights}, the moving average.")
    return Subject(
        evaluator=name,
        type=given["type"],
        stream=stream,
        set=part.set,
        split=part.split,
        protocol=" ".join(words),
        settings=settings,
    )


def part_of(kind: str, section: Section, drawn: str = "held-out clips") -> Part:
    """The set and the split that a section of `config.data` names. drawn: the clips of the corpus
    of shapes, where a section does not name them."""
    kind = section.get("kind", kind)
    if mixed := section.get("mix"):
        return Part(" + ".join(str(part_of(kind, one, drawn)) for one in mixed.values()), "")
    if kind == "sets":
        return Part(str(section.get("set", "")), str(section.get("split", "")))
    if kind == "shapes":
        seed = section.get("seed", 0)
        return Part("moving shapes", drawn + (f" of seed {seed}" if seed else ""))
    root = str(section.get("root", section.get("manual_dir", "")))
    listed = str(section.get("list", section.get("captions", "")) or "")
    return Part(root, os.path.relpath(listed, root) if root and inside(listed, root) else listed)


def inside(path: str, folder: str) -> bool:
    return os.path.normpath(path).startswith(os.path.normpath(folder) + os.sep)


def trained_on(data: Section, warm_start: Sequence[Sequence[str]] = (), depth: int = 8) -> Training:
    """The parts of sets that a net was trained on, by its config and by those of the runs whose
    weights it started from."""
    kind, sections = data.get("kind", ""), [data.get("train") or {}]
    sections += [more.get("train") or {} for more in (data.get("also") or {}).values()]
    found = Training([], [])
    if depth < 1:
        raise ValueError("a run that starts from itself")
    for section in sections:
        parts = section["mix"].values() if "mix" in section else [section]
        found.parts.extend(
            part_of(section.get("kind", kind), one, "training clips") for one in parts
        )
    for path in dict.fromkeys(str(source[0]) for source in warm_start):
        try:
            before = json.loads((paths.path(path) / "config.json").read_text())
            more = trained_on(before["data"], before.get("warm_start") or (), depth - 1)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not a run's folder
            more = Training([], [path])
        found.parts.extend(more.parts)
        found.unknown.extend(more.unknown)
    return found


def trained(cfg: Config, part: Part, type: str) -> str:
    """What the net was trained on, in relation to the part of a set that it is evaluated on."""
    found = trained_on(cfg.data, cfg.warm_start)
    own = [one for one in found.parts if same_set(one.set, part.set)]
    others = list(dict.fromkeys(str(one) for one in found.parts if one not in own))
    how = f"fine-tuned (task {cfg.task['name']})" if cfg.task else "trained"
    if part in own:
        text = f"The net was {how} on these very rows, which are not held out."
    elif own:
        splits = ", ".join(dict.fromkeys(one.split for one in own if one.split))
        text = f"The net was {how} on {splits or 'the training half'} of this set"
        text += ": not zero-shot." if type in COMPARED else "."
    else:
        text = f"The net was {how} on {', '.join(others)}, not on this set"
        text += ": zero-shot." if type in COMPARED and not found.unknown else "."
    if found.unknown:
        started = ", ".join(found.unknown)
        text += f" What the weights it started from ({started}) were trained on is not known here."
    return text


def same_set(a: str, b: str) -> bool:
    """Whether two names or folders are of one set: the same after words such as train or val at
    their ends, or with the name of a known set in both."""

    def stem(name: str) -> str:
        name = os.path.normpath(name)
        while (short := PART.sub("", name)) and short != name:
            name = short
        return name

    def known(name: str) -> set[str]:
        return set(re.split(r"[^a-z0-9]+", name.lower())) & set(sets.SETS)

    return stem(a) == stem(b) or bool(known(a) & known(b))
