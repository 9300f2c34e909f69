"""The record that a run left in its folder, read back for a report."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from vtp_jax.run import checkpoint, evaluations, goodput, metrics, paths
from vtp_jax.run.evaluations import Evaluation, Subject
from vtp_jax.types import UserError

Points = list[tuple[int, float]]  # (step, value)


class Series(NamedTuple):
    """Evaluations of one subject, which differ in their weights alone: by step, then time."""

    subject: Subject
    evaluations: Sequence[Evaluation]

    @property
    def last(self) -> Evaluation:
        """That of the highest step, and of those the newest."""
        return self.evaluations[-1]

    @property
    def names(self) -> list[str]:
        """The names of its numbers, in their order."""
        return list(dict.fromkeys(name for one in self.evaluations for name in one.numbers))

    def curve(self, name: str) -> Points:
        """A number over steps; of several at one step, the newest."""
        found = {one.step: one.numbers[name] for one in self.evaluations if name in one.numbers}
        return list(found.items())


class Steps(NamedTuple):
    """How far a run is. done: the last step that it logged or saved; asked: `config.steps`; saved:
    the step of the newest checkpoint. None: unknown."""

    done: int | None
    asked: int | None
    saved: int | None

    @property
    def finished(self) -> bool:
        return self.done is not None and self.asked is not None and self.done >= self.asked


class Record(NamedTuple):
    """The files of a run's folder. Any field may be empty.

    curves:   numbers of training, by their key in metrics.jsonl; those of data/ are of the whole
              run
    series:   what was evaluated: each number with its step, set and protocol
    replaced: evaluations that are not in `series`, because training went back and replaced the
              weights that they are of
    """

    curves: Mapping[str, Points]
    series: Sequence[Series]
    replaced: int
    steps: Steps
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    parameters: str
    pictures: Mapping[str, Any]  # pictures/index.json
    spent: goodput.Spent | None  # the wall time of training
    folder: epath.Path

    def last(self, key: str) -> tuple[int, float] | None:
        """(step, value) at the end of a curve, or None if there is none."""
        points = self.curves.get(key)
        return points[-1] if points else None


def read(workdir: paths.PathLike) -> Record:
    """Reads a run's folder; absent files leave their fields empty. Raises UserError if there is no
    folder or a file is not JSON."""
    folder = paths.path(workdir)
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}'; --workdir is the folder of a run")
    lines = metrics.read(folder / "metrics.jsonl")
    curves: dict[str, Points] = {}
    for line in lines:
        for key, value in line.items():
            number = isinstance(value, (int, float)) and key not in ("step", "time")
            if number and not key.startswith("eval/"):
                curves.setdefault(key, []).append((line["step"], float(value)))
    curves = {k: in_all(p) if k.startswith("data/") else p for k, p in curves.items()}
    found = [*evaluations.read(folder), *of_older_runs(folder, lines)]
    trained = [line for line in lines if "train/loss" in line]
    times = [line["time"] for line in trained]
    valid = [one for one in found if not is_replaced(one, trained, times)]
    config = read_json(folder / "config.json")
    text = folder / "parameters.txt"
    return Record(
        curves,
        in_series(of_training_once(valid)),
        len(found) - len(valid),
        steps_of(folder, config, lines),
        config,
        read_json(folder / "summary.json"),
        text.read_text(encoding="utf-8") if text.exists() else "",
        read_json(folder / "pictures" / "index.json"),
        goodput.read(folder),
        folder,
    )


def steps_of(
    folder: epath.Path, config: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]
) -> Steps:
    """How far the run in a folder is. lines: of metrics.jsonl."""
    asked, kept = config.get("steps"), checkpoint.steps(folder)
    logged = [int(line["step"]) for line in lines if "train/loss" in line]
    reached = [*logged[-1:], *kept]
    return Steps(max(reached, default=None), asked, max(kept, default=None))


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it or run again") from None


def in_all(points: Points) -> Points:
    """A count over all restarts: older runs began again at 0 with each."""
    found: Points = []
    total = before = 0.0
    for step, value in points:
        total += value if value < before else value - before
        before = value
        found.append((step, total))
    return found


def of_older_runs(folder: epath.Path, lines: Iterable[Mapping[str, Any]]) -> list[Evaluation]:
    """Evaluations as older versions left them: numbers of training in metrics.jsonl, whose protocol
    is unknown, and those of the last `vtp evaluate` in evaluation.json, with their protocols."""
    found: list[Evaluation] = []
    for line in lines:
        for name, numbers in by_evaluator(line, "eval/").items():
            found.append(
                Evaluation(Subject(name), line["step"], numbers, "", line["time"], "training")
            )
    path = folder / "evaluation.json"
    old = read_json(path)
    for name, numbers in by_evaluator(old.get("numbers", {}), "").items():
        subject = Subject(name, protocol=old.get("protocols", {}).get(name, ""))
        time = float(path.stat().mtime)
        found.append(Evaluation(subject, old.get("step", 0), numbers, "", time, "vtp evaluate"))
    return found


def by_evaluator(numbers: Mapping[str, Any], prefix: str) -> dict[str, dict[str, float]]:
    """{prefix + "<evaluator>/<number>": value} by evaluator and number."""
    found: dict[str, dict[str, float]] = {}
    for key, value in numbers.items():
        name, slash, number = key.removeprefix(prefix).partition("/")
        if key.startswith(prefix) and slash and isinstance(value, (int, float)):
            found.setdefault(name, {})[number] = float(value)
    return found


def of_training_once(found: Sequence[Evaluation]) -> list[Evaluation]:
    """Without the lines of metrics.jsonl that evaluations.jsonl has too, with all that is known."""
    known = {
        (one.subject.evaluator, one.step)
        for one in found
        if one.by == "training" and one.subject.protocol
    }
    return [
        one
        for one in found
        if one.by != "training"
        or one.subject.protocol
        or (one.subject.evaluator, one.step) not in known
    ]


def is_replaced(
    one: Evaluation, trained: Sequence[Mapping[str, Any]], times: Sequence[float]
) -> bool:
    """Whether training took a step before that of the evaluation after it was made: it had gone
    back to an older checkpoint. trained: the lines of training in metrics.jsonl, which are in the
    order of steps and of time; times: theirs."""
    later = bisect.bisect_right(times, one.time)
    return later < len(trained) and trained[later]["step"] < one.step


def in_series(found: Iterable[Evaluation]) -> list[Series]:
    """Evaluations by their subjects: those of training first, in the order of their first ones."""
    groups: dict[str, list[Evaluation]] = {}
    for one in found:
        of = one.subject
        key = [of.evaluator, of.settings or of.protocol]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(one)
    made = [
        Series(group[-1].subject, sorted(group, key=lambda one: (one.step, one.time)))
        for group in groups.values()
    ]
    return sorted(made, key=lambda one: all(e.by != "training" for e in one.evaluations))
