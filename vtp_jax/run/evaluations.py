"""Evaluations of a run, kept side by side in WORKDIR/evaluations.jsonl, and never overwritten.

A line is what one evaluator found on the weights of one step, with all that its numbers depend on:
training writes one for each of its evaluations, and `vtp evaluate` adds its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from vtp_jax.run import jsonl, paths
from vtp_jax.types import UserError

FILE = "evaluations.jsonl"


class Subject(NamedTuple):
    """What the numbers of an evaluator are of (`setup.subjects`).

    evaluator: its name in `config.evals`; type: its file in `evals`
    stream:    the evaluation stream; set, split: where its rows come from
    protocol:  how the numbers are computed, in words, with the set and what the net was trained on
    settings:  the values of the config that decide the numbers: two evaluations with equal ones
               differ in their weights alone
    """

    evaluator: str
    type: str = ""
    stream: str = ""
    set: str = ""
    split: str = ""
    protocol: str = ""
    settings: Mapping[str, Any] = {}


class Evaluation(NamedTuple):
    """The numbers of one evaluator on the weights of one step.

    checkpoint: of the step, relative to the workdir; "" if none was kept
    time:       seconds since 1970
    by:         "training" or "vtp evaluate"
    """

    subject: Subject
    step: int
    numbers: Mapping[str, float]
    checkpoint: str = ""
    time: float = 0.0
    by: str = ""


def write(
    workdir: paths.PathLike, subject: Subject, step: int, numbers: Mapping[str, float], by: str
) -> Evaluation:
    """Adds a line, on process 0, and returns what it says. Numbers that are not finite become
    null."""
    kept = f"checkpoints/{step}"
    folder = paths.path(workdir)
    made = Evaluation(
        subject=subject,
        step=step,
        numbers={name: float(value) for name, value in numbers.items()},
        checkpoint=kept if (folder / kept).exists() else "",
        time=time.time(),
        by=by,
    )
    if jax.process_index() == 0:
        values = {k: v if math.isfinite(v) else None for k, v in made.numbers.items()}
        line = {**subject._asdict(), **made._asdict(), "numbers": values}
        del line["subject"]
        jsonl.append(folder / FILE, line)
    return made


def read(workdir: paths.PathLike) -> list[Evaluation]:
    """The evaluations of a run, in the order of their making, without a last line that was cut off
    by a kill. Raises UserError on a line that is no evaluation."""
    path = paths.path(workdir) / FILE
    found, damaged = jsonl.read(path, _evaluation)
    for line in damaged:
        raise UserError(f"{path}, line {line.number} is no evaluation ({line.why}); delete it")
    return found


def _evaluation(line: dict[str, Any]) -> Evaluation:
    subject = Subject(**{k: line.pop(k) for k in Subject._fields if k in line})
    numbers = {k: math.nan if v is None else float(v) for k, v in line.pop("numbers").items()}
    return Evaluation(subject, numbers=numbers, **line)
