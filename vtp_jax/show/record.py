"""The record that a run left in its folder, read back for a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from vtp_jax.run import metrics, paths
from vtp_jax.types import UserError

Points = list[tuple[int, float]]  # (step, value)


class Record(NamedTuple):
    """The files of a run's folder. Any field may be empty."""

    curves: Mapping[str, Points]  # by the key in metrics.jsonl
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    protocols: Mapping[str, str]  # by evaluator
    parameters: str
    pictures: Mapping[str, Any]  # pictures/index.json
    folder: epath.Path

    def last(self, key: str) -> float | None:
        """The newest value of a curve, or None if there is none."""
        points = self.curves.get(key)
        return points[-1][1] if points else None


def read(workdir: paths.PathLike) -> Record:
    """Reads a run's folder; absent files leave their fields empty. Raises UserError if there is no
    folder or a file is not JSON."""
    folder = paths.path(workdir)
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}'; --workdir is the folder of a run")
    curves: dict[str, Points] = {}
    lines = metrics.read(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    for line in lines:
        for key, value in line.items():
            if isinstance(value, (int, float)) and key not in ("step", "time"):
                curves.setdefault(key, []).append((line["step"], float(value)))
    text = folder / "parameters.txt"
    return Record(
        curves,
        read_json(folder / "config.json"),
        read_json(folder / "summary.json"),
        read_json(folder / "evaluation.json").get("protocols", {}),
        text.read_text(encoding="utf-8") if text.exists() else "",
        read_json(folder / "pictures" / "index.json"),
        folder,
    )


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it or run again") from None
