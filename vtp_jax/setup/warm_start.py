"""Starting from existing weights: `warm_start=[(path, from, to), ...]`.

path is a folder with a checkpoint: a run's, or one that `vtp convert import` made. from is a
regular expression on the whole names of its arrays, such as
`params/(encoder|patch_embed)/(.*)`; to is the name here, with \\1, \\2 for the groups. Names begin
with `params/` or `extra/`. Parameters that no source fills must be listed in `fresh`: none keeps
its random values silently.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Num

from vtp_jax import tree
from vtp_jax.nn import resize
from vtp_jax.run import checkpoint, paths
from vtp_jax.types import State, UserError, is_teacher

Leaves = dict[str, Num[np.ndarray, "..."]]


class Filled(NamedTuple):
    """The source of one parameter, and what was done to make it fit.

    origin: the path and the step of the checkpoint it came from, and its name there
    """

    name: str
    source: str
    how: str
    origin: tuple[str, int, str] | None = None


def load(
    sources: Sequence[Sequence[str]], fresh: Sequence[str], shapes: State
) -> tuple[Leaves, list[Filled]]:
    """The arrays of `shapes.params` and `shapes.extra` that are loaded, by name, in the dtypes of
    `shapes`; and a row for each of them and for every parameter that stays fresh.

    Raises UserError, listing all of them, on names that the state lacks, on shapes that cannot be
    made to fit and on parameters that nothing fills; and on rules that match nothing.
    """
    if not sources:
        return {}, []
    wanted = tree.flatten(dict(params=shapes.params, extra=shapes.extra))
    arrays: Leaves = {}
    rows: dict[str, Filled] = {}
    faults = []
    for place, source in enumerate(sources):
        path, pattern, template = compiled(source)
        if not paths.path(path).is_dir():
            raise UserError(
                f"warm_start: there is no folder {path}; make it with `vtp convert "
                f"import`, name another, --config.warm_start.{place}.0=DIR, or start without: "
                f"'--config.warm_start=()' '--config.fresh=()'"
            )
        step = checkpoint.find_step(path)
        table = checkpoint.read_meta(path, step).table
        names = {n: m.expand(template) for n in table if (m := pattern.fullmatch(n))}
        if not names:
            raise UserError(
                f"warm_start: '{pattern.pattern}' matches nothing in {path}, "
                f"which has {', '.join(list(table)[:3])}, ..."
            )
        faults += [f"{n} -> {to} (not here)" for n, to in names.items() if to not in wanted]
        for name, array in read(path, step, table, names).items():
            if (to := names[name]) in wanted:
                fitted, how = fit(to, array, wanted)
                if fitted is None:
                    faults.append(f"{name} {array.shape} -> {to} {wanted[to].shape} ({how})")
                else:
                    arrays[to] = fitted.astype(wanted[to].dtype)
                    rows[to] = Filled(to, f"{path}: {name}", how, (path, step, name))
    if faults:
        raise UserError(f"warm_start: {len(faults)} do not fit: {'; '.join(faults)}")
    missing = [n for n in wanted if n.startswith("params/") and n not in arrays]
    patterns = [re.compile(f) for f in fresh]
    if bare := [n for n in missing if not any(p.fullmatch(n) for p in patterns)]:
        raise UserError(
            f"warm_start: nothing fills {', '.join(bare)}; name a source, or list them in 'fresh'"
        )
    if idle := [p.pattern for p in patterns if not any(p.fullmatch(n) for n in missing)]:
        raise UserError(f"fresh: '{idle[0]}' matches no parameter that is without a source")
    rows.update({n: Filled(n, "-", "fresh") for n in missing})
    return arrays, [rows[n] for n in wanted if n in rows]


def teachers(rows: Sequence[Filled]) -> list[checkpoint.Source]:
    """Where the teachers (`types.is_teacher`) among the leaves of a warm start were loaded from."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        if row.origin and is_teacher(row.name):
            path, step, name = row.origin
            found.setdefault((path, step), {})[row.name] = name
    return [
        checkpoint.Source(os.path.abspath(path), step, checkpoint.digest(path, step), names)
        for (path, step), names in found.items()
    ]


def load_teachers(sources: Sequence[checkpoint.Source], shapes: Mapping[str, Any]) -> Leaves:
    """The leaves of teachers by name, in the shapes and dtypes of `shapes`. Raises UserError if a
    checkpoint that they came from is gone or has changed."""
    arrays: Leaves = {}
    for path, step, digest, names in sources:
        what = f"the teacher of this run, checkpoint {step} of {path},"
        try:
            changed = checkpoint.digest(path, step) != digest
        except FileNotFoundError:
            raise UserError(f"{what} is gone; put it back, or start a new run") from None
        if changed:
            raise UserError(f"{what} is not the one that the run began with; put that one back")
        checkpoint.find_step(path, step)  # reads all files: UserError where one is damaged
        table = checkpoint.read_meta(path, step).table
        found = read(path, step, table, set(names.values()))
        for to, name in names.items():
            fitted, how = fit(to, found[name], shapes)
            if fitted is None:
                raise UserError(f"{what} does not fit this config: {to}: {how}")
            arrays[to] = fitted.astype(shapes[to].dtype)
    return arrays


def compiled(source: Sequence[str]) -> tuple[str, re.Pattern[str], str]:
    if len(source) != 3:
        raise UserError(f"warm_start: {source!r} is not (path, from, to)")
    path, pattern, template = source
    try:
        found = re.compile(pattern)
        found.sub(template, "")  # knows the groups
    except re.error as error:
        raise UserError(
            f"warm_start: ('{pattern}', '{template}') is not a regular expression: {error}"
        ) from None
    return path, found, template


def read(path: str, step: int, table: checkpoint.Table, names: Collection[str]) -> Leaves:
    """Some arrays of a checkpoint, by name. It is read by whole fields: params, extra."""
    fields = {name.split("/")[0] for name in names}
    shapes = {
        name: jax.ShapeDtypeStruct(shape, np.dtype(dtype))
        for name, (shape, dtype) in table.items()
        if name.split("/")[0] in fields
    }
    nested = traverse_util.unflatten_dict(shapes, sep="/")
    found = tree.flatten(checkpoint.restore_part(path, step, nested))
    return {name: found[name] for name in names}


def fit(
    name: str, array: Num[np.ndarray, "..."], wanted: Mapping[str, Any]
) -> tuple[Num[np.ndarray, "..."] | None, str]:
    """The array in the wanted shape, and what was done to it; None if it cannot be made to fit.

    Patch kernels are inflated in time, and the position tables next to them are resized; those of
    texts are not grids.
    """
    shape, (parent, _, last) = wanted[name].shape, name.rpartition("/")
    if array.shape == shape:
        return array, "loaded"
    same_but_first = array.shape[1:] == shape[1:]
    if name.endswith("patch_embed/kernel") and same_but_first and len(array) == 1:
        return resize.inflate(array, shape[0], "mean"), f"inflated to {shape[0]} frames"
    if last == "position" and same_but_first and f"{parent}/patch_embed/kernel" in wanted:
        return resize.positions(array, shape[0]), f"resized from {len(array)} to {shape[0]} places"
    return None, "another shape"


def summary(rows: Sequence[Filled]) -> str:
    """The numbers of loaded, resized and fresh parameters, in one line."""
    count: dict[str, int] = {}
    for row in rows:
        count[row.how.split(" ")[0]] = count.get(row.how.split(" ")[0], 0) + 1
    return "warm start: " + ", ".join(f"{n} {how}" for how, n in count.items())


def report(rows: Sequence[Any]) -> str:
    """All rows as a plain table, aligned."""
    width = max((len(r.name) for r in rows), default=0)
    return "\n".join(f"{r.name:{width}}  {r.how:<9}  {r.source}" for r in rows)
