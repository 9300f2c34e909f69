"""Checkpoints that survive a kill and detect damage.

Each is a folder `WORKDIR/checkpoints/STEP`: `state` (step, params, opt, extra; written by orbax),
`meta.json` (the resolved config and a table of names, shapes, dtypes) and `sha256.json` (the hash
of every file). It is written under a temporary name and renamed as a whole, so a folder named after
a step is always complete; in a bucket, where no folder can be renamed, it is complete once it has
the file `commit_success.txt`. Hashes are checked before anything is restored. `metrics.json` (the
results of an evaluation) is added later, if the step is evaluated.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import socket
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple, TextIO, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from vtp_jax import tree
from vtp_jax.run import paths, stop
from vtp_jax.types import State, UserError

META, HASHES, METRICS = "meta.json", "sha256.json", "metrics.json"
COMMITTED = "commit_success.txt"
# Written after the hashes, two of them by orbax at commit time; nothing in them is restored.
UNHASHED = (HASHES, METRICS, "_CHECKPOINT_METADATA", COMMITTED)

T = TypeVar("T")
Path = paths.PathLike
Table = Mapping[str, tuple[tuple[int, ...], str]]


class Source(NamedTuple):
    """Another checkpoint, from which those leaves of a state were loaded that the run's own
    checkpoints do not hold (`types.is_teacher`).

    sha256: of its table of hashes. names: name in the state -> name in that checkpoint
    """

    path: str
    step: int
    sha256: str
    names: Mapping[str, str]


class Meta(NamedTuple):
    """The description of a checkpoint, in its meta.json.

    table: name -> (shape, dtype), with the names of tree.flatten(State)
    metrics: results at this step; best: the metric that ranks checkpoints, and 'max' or 'min'
    teachers: the sources of the leaves that the checkpoint does not hold
    """

    step: int
    config: Mapping[str, Any]
    table: Table
    metrics: Mapping[str, float]
    best: tuple[str, str] | None
    teachers: Sequence[Source] = ()


class Checkpoints:
    """Writes the checkpoints of one run, and restores from them. A workdir is one of run/paths.py.

    every: steps between two checkpoints; keep: the number of newest ones to keep; best: (metric,
    'max' or 'min'), to also keep the best one by that metric. While open, it holds a lock on the
    working directory: a second run there raises UserError. A bucket has no locks, so there a second
    run is only warned.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        every: int,
        keep: int = 3,
        best: Sequence[str] | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        if every < 1 or keep < 1:
            raise UserError(f"checkpoint: every={every}, keep={keep}; both must be at least 1")
        if best is not None and (len(best) != 2 or best[1] not in ("max", "min")):
            raise UserError(f"checkpoint: best={best!r}; write (metric, 'max') or (metric, 'min')")
        self._every, self._config = every, dict(config or {})
        self._best = (best[0], best[1]) if best else None
        self._folder = _folder(workdir)
        paths.need_client(workdir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(workdir) if jax.process_index() == 0 else None
        self.teachers: Sequence[Source] = ()  # of the run; `save` leaves their leaves out
        self._saving = (-1, "")  # step and meta.json of the save that is under way
        self._retention = _Retention(self._folder, keep, self._best)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._retention,
                # Does not read old checkpoints: a damaged one must not prevent the start.
                lightweight_initialize=True,
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    def due(self, step: int) -> bool:
        """Whether the step is a positive multiple of `every`."""
        return step > 0 and step % self._every == 0

    def save(self, step: int, state: State) -> None:
        """Copies the state to the host, then writes it in the background; no-op if already saved.

        The arrays may be donated as soon as this returns. An error of an earlier save is raised
        here, in `wait` or in `close`.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        outside = _outside(self.teachers)
        table = {name: x for name, x in _table(state).items() if name not in outside}
        meta = Meta(step, self._config, table, {}, self._best, self.teachers)
        self._saving = (step, json.dumps(meta._asdict(), indent=1))
        with jax.transfer_guard("allow"):
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(_nested(state, outside))),
                force=True,
            )

    def rank(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the results of a step's evaluation to its checkpoint, if there is one. A checkpoint
        without the ranking metric is never the best; a former best is deleted at the next save."""
        self.wait()
        if step not in self._manager.all_steps():
            return
        numbers = {k: float(v) for k, v in metrics.items() if math.isfinite(float(v))}
        self._retention.metrics[step] = numbers
        if jax.process_index() == 0:
            (self._folder / str(step) / METRICS).write_text(json.dumps(numbers, indent=1))

    def ranked(self, step: int) -> bool:
        """Whether the checkpoint of a step has the results of an evaluation."""
        meta = _try_meta(self._folder, step)
        return meta is not None and bool(meta.metrics)

    def _seal(self) -> None:
        """Adds meta.json and the hashes once orbax's files are complete, before the rename."""
        if jax.process_index():
            return
        step, meta = self._saving
        for path in self._folder.iterdir():
            if path.name == str(step) or path.name.startswith(f"{step}.orbax-checkpoint-tmp"):
                (path / META).write_text(meta)
                hashes = {name: _sha256(file) for name, file in _files(path).items()}
                (path / HASHES).write_text(json.dumps(hashes, indent=1))
                return
        raise FileNotFoundError(
            f"checkpoint {step} vanished from {self._folder} while it was being written"
        )

    def restore_latest(self, shapes: State) -> State | None:
        """The state of the newest good checkpoint, or None if there is none at all.

        `shapes`: ShapeDtypeStructs; a leaf with a sharding becomes an array with that sharding,
        whatever mesh it was saved from, and one without becomes numpy. Damaged checkpoints are
        logged and renamed `broken-STEP`. `teachers` is set from the checkpoint; its leaves are
        returned as they are in `shapes`. Raises UserError if the newest good checkpoint is of
        another network or optimizer, or if all are damaged.
        """
        self.wait()
        if not _steps(self._folder):
            return None
        step = -1
        if jax.process_index() == 0:
            step = _newest_good(self._folder)
            for damaged in [s for s in _steps(self._folder) if s > step > -1]:
                _set_aside(self._folder / str(damaged))
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step < 0:
            raise UserError(
                f"no checkpoint in {self._folder} is usable (the log has the reasons); "
                f"move that folder away to start from scratch"
            )
        self._manager.reload()
        self.teachers = _read_meta(self._folder, step).teachers
        return _restore(self._folder, step, shapes)

    def wait(self) -> None:
        """Blocks until every save has been written to disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the working directory."""
        try:
            self.wait()
            self._manager.close()
        finally:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close()
        if error is not None and self._saving[0] >= 0:
            stop.after_save(error)


class _Retention:
    """Orbax's PreservationPolicy: the newest `keep`, and the best one by a metric."""

    def __init__(self, folder: epath.Path, keep: int, best: tuple[str, str] | None):
        self._keep, self._best = keep, best
        self.metrics = _metrics(folder) if best else {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [c.step for c in checkpoints]
        kept = set(steps[-self._keep :])
        if self._best:
            kept.add(_best_step({s: self.metrics.get(s, {}) for s in steps}, self._best))
        return [s in kept for s in steps]


def steps(workdir: Path) -> list[int]:
    """The steps whose checkpoints are complete, in ascending order."""
    return _steps(_folder(workdir))


def find_step(workdir: Path, which: int | str = "latest") -> int:
    """The step of an undamaged checkpoint, for evaluation and export.

    which: a step, 'latest' (the newest good one), or 'best' (by the run's own `checkpoint.best`).
    Raises UserError if there is none, or if it is damaged.
    """
    folder = _folder(workdir)
    steps = _steps(folder)
    if not steps:
        raise UserError(f"no checkpoint in {folder}")
    if which == "latest":
        step = _newest_good(folder)
        if step < 0:
            raise UserError(f"no checkpoint in {folder} is usable (the log has the reasons)")
        return step
    if which == "best":
        best = next((m.best for s in reversed(steps) if (m := _try_meta(folder, s))), None)
        step = _best_step(_metrics(folder), best) if best else None
        if step is None:
            raise UserError(f"no checkpoint in {folder} is ranked; set checkpoint.best, or a step")
    else:
        step = int(which) if str(which).isdecimal() else -1
    if step not in steps:
        known = ", ".join([*map(str, steps), "latest", "best"])
        raise UserError(f"no checkpoint of step {which} in {folder}; there are {known}")
    if what := fault(folder / str(step)):
        raise UserError(f"checkpoint {folder / str(step)} is damaged: {what}")
    return step


def read_meta(workdir: Path, step: int) -> Meta:
    """The description of the checkpoint of a step."""
    return _read_meta(_folder(workdir), step)


def restore_part(workdir: Path, step: int, shapes: T) -> T:
    """Some fields of the state of a step. `shapes` is a dict such as dict(params=..., extra=...) of
    ShapeDtypeStructs, with shardings for arrays on devices and without for numpy. The leaves of
    the checkpoint's teachers are returned as they are in `shapes`.

    Raises UserError if names, shapes or dtypes within these fields differ.
    """
    return _restore(_folder(workdir), step, shapes)


def restore_params(workdir: Path, which: int | str = "latest") -> dict[str, Any]:
    """The parameters of a checkpoint as nested dicts of numpy arrays, whatever the network."""
    step = find_step(workdir, which)
    shapes = {
        name: jax.ShapeDtypeStruct(shape, np.dtype(dtype))
        for name, (shape, dtype) in read_meta(workdir, step).table.items()
        if name.startswith("params/")
    }
    return restore_part(workdir, step, traverse_util.unflatten_dict(shapes, sep="/"))["params"]


def lock(workdir: Path) -> TextIO | _Notice:
    """Locks a working directory until what is returned is closed, or the process ends.

    Raises UserError if another process holds the lock. It is a POSIX lock, which forked loader
    processes that outlive the run do not hold. In a bucket it is a notice, which a process that was
    killed leaves behind; where there is one, a warning is logged.
    """
    path, own = paths.path(workdir) / "lock", f"process {os.getpid()} on {socket.gethostname()}"
    if paths.in_bucket(path):
        return _Notice(path, own)
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"{os.fspath(workdir)} is in use by {owner}; stop that run or take another workdir"
        ) from None
    file.truncate(0)
    file.write(f"{own}\n")
    file.flush()
    return file


class _Notice:
    """A file that says which process uses a workdir in a bucket; removed when it is closed."""

    def __init__(self, path: epath.Path, own: str):
        self._path = path
        if path.exists():
            logging.warning(
                "%s: %s has not ended in order. If it still runs, stop it: two runs in one workdir "
                "damage each other, and a bucket cannot be locked",
                path, path.read_text().strip(),
            )  # fmt: skip
        path.write_text(own)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)


def fault(path: epath.Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Reads all of them."""
    try:
        hashes = json.loads((path / HASHES).read_text())
        files = _files(path)
        for name, digest in hashes.items():
            if name not in files:
                return f"{name} is missing"
            if _sha256(files[name]) != digest:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{error.filename or HASHES} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{HASHES} or a file it names cannot be read ({error})"
    if foreign := sorted(set(files) - set(hashes)):
        logging.warning("checkpoint %s has a file that is not part of it: %s", path, foreign[0])
    return None


def _newest_good(folder: epath.Path) -> int:
    """The newest step without a fault, or -1; logs the faults of newer ones."""
    for step in reversed(_steps(folder)):
        what = fault(folder / str(step))
        if what is None:
            return step
        logging.error("checkpoint %s is damaged: %s; trying an older one", folder / str(step), what)
    return -1


def _set_aside(path: epath.Path) -> None:
    target, i = path.parent / f"broken-{path.name}", 1
    while target.exists():
        i += 1
        target = path.parent / f"broken-{path.name}-{i}"
    if paths.in_bucket(path):  # file by file
        for name, file in _files(path).items():
            file.copy(target / name)
        path.rmtree()
    else:
        path.rename(target)


def digest(workdir: Path, step: int) -> str:
    """The SHA-256 of a checkpoint's table of hashes, which covers all its files."""
    return _sha256(_folder(workdir) / str(step) / HASHES)


def _outside(teachers: Sequence[Source]) -> set[str]:
    """The names of the leaves that a checkpoint with these teachers does not hold."""
    return {name for source in teachers for name in source.names}


def _restore(folder: epath.Path, step: int, shapes: T) -> T:
    meta, whole = _read_meta(folder, step), tree.flatten(shapes)
    outside = _outside(meta.teachers)
    flat = {name: x for name, x in whole.items() if name not in outside}
    fields = {name.split("/")[0] for name in flat}
    saved = {k: v for k, v in meta.table.items() if k.split("/")[0] in fields}
    if difference := _difference(saved, {k: _table(shapes)[k] for k in flat}):
        raise UserError(f"checkpoint {folder / str(step)} does not fit this config: {difference}")
    arguments = {
        name: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
        if x.sharding is not None
        else ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype)
        for name, x in flat.items()
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        values = reader.restore(
            folder / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                item=_nested(shapes, outside),
                restore_args=traverse_util.unflatten_dict(arguments, sep="/"),
                partial_restore=True,
            ),
        )
    found = {**whole, **traverse_util.flatten_dict(values, sep="/")}
    return jax.tree.unflatten(jax.tree.structure(shapes), [found[name] for name in whole])


def _difference(saved: Table, wanted: Table) -> str:
    """How two tables differ, in one line; empty if they do not."""
    parts = []
    if lacking := [k for k in wanted if k not in saved]:
        parts.append(f"it lacks {len(lacking)} arrays ({', '.join(lacking[:3])})")
    if spare := [k for k in saved if k not in wanted]:
        parts.append(f"it has {len(spare)} more ({', '.join(spare[:3])})")
    if other := [k for k in wanted if k in saved and saved[k] != wanted[k]]:
        name = other[0]
        parts.append(
            f"{len(other)} have another shape or dtype "
            f"({name}: {_shape(saved[name])} there, {_shape(wanted[name])} here)"
        )
    return ", ".join(parts)


def _shape(entry: tuple[tuple[int, ...], str]) -> str:
    return f"{entry[1]}{list(entry[0])}"


def _table(values: Any) -> Table:
    return {k: (tuple(x.shape), str(x.dtype)) for k, x in tree.flatten(values).items()}


def _nested(values: Any, without: Container[str] = ()) -> dict[str, Any]:
    """Nested dicts by name: a layout on disk that needs no class of this project or of optax."""
    flat = {name: x for name, x in tree.flatten(values).items() if name not in without}
    return traverse_util.unflatten_dict(flat, sep="/")


def _folder(workdir: Path) -> epath.Path:
    return paths.absolute(workdir) / "checkpoints"


def _steps(folder: epath.Path) -> list[int]:
    if not folder.exists():
        return []
    found = [p for p in folder.iterdir() if p.name.isdecimal()]
    if paths.in_bucket(folder):
        found = [p for p in found if (p / COMMITTED).exists()]
    return sorted(int(p.name) for p in found)


def _files(path: epath.Path, prefix: str = "") -> dict[str, epath.Path]:
    """Every file below a folder by its relative name."""
    found: dict[str, epath.Path] = {}
    for p in sorted(path.iterdir(), key=lambda p: p.name):
        name = f"{prefix}{p.name}"
        if p.is_dir():
            found |= _files(p, f"{name}/")
        elif name not in UNHASHED:
            found[name] = p
    return found


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _read_meta(folder: epath.Path, step: int) -> Meta:
    meta = Meta(**json.loads((folder / str(step) / META).read_text()))
    table = {k: (tuple(shape), dtype) for k, (shape, dtype) in meta.table.items()}
    # If a kill truncated the results, the checkpoint is still complete, but not ranked.
    with contextlib.suppress(OSError, ValueError):
        metrics = json.loads((folder / str(step) / METRICS).read_text())
        meta = meta._replace(metrics={**meta.metrics, **metrics})
    return meta._replace(
        table=table,
        best=tuple(meta.best) if meta.best else None,
        teachers=[Source(*one) for one in meta.teachers],
    )


def _try_meta(folder: epath.Path, step: int) -> Meta | None:
    """None if it cannot be read: ranking and deleting must survive a damaged checkpoint."""
    try:
        return _read_meta(folder, step)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _metrics(folder: epath.Path) -> dict[int, Mapping[str, float]]:
    return {s: m.metrics for s in _steps(folder) if (m := _try_meta(folder, s))}


def _best_step(metrics: Mapping[int, Mapping[str, float]], best: tuple[str, str]) -> int | None:
    """The step with the best value of the metric, the newer one on a tie; None if none has it."""
    sign = 1 if best[1] == "max" else -1
    ranked = [(sign * m[best[0]], step) for step, m in metrics.items() if best[0] in m]
    return max(ranked)[1] if ranked else None
