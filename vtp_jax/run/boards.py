"""Boards: the curves, pictures and settings of a run in TensorBoard and in Weights & Biases.

Both have the interface of `clu.metric_writers`, as far as it is used here. A run that is resumed
goes on in the same curve: what was written after the restored step is gone.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8

from vtp_jax.run import paths
from vtp_jax.types import UserError

# Numbers that are no curves, such as the sizes of evaluation sets, have a folder of their own,
# which TensorBoard sorts after the others.
CONSTANT = re.compile(r"(?:^|/)n_\w+$|^data/")
CONSTANTS = "~constants"


@runtime_checkable
class Board(Protocol):
    """The methods of `clu.metric_writers.MetricWriter` that a run calls."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def write_images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w c"]]) -> None: ...

    def write_hparams(self, hparams: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def check(wandb: Mapping[str, Any] | None) -> None:
    """Raises UserError if a run is to be shown in W&B, which is not installed."""
    if wandb is None:
        return
    try:
        import wandb as _  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("config.log.wandb needs Weights & Biases: pip install wandb") from None


def start(
    workdir: paths.PathLike,
    step: int,
    config: Mapping[str, Any],
    wandb: Mapping[str, Any] | None = None,
) -> Sequence[Board]:
    """The boards of a run that starts at `step`, or is resumed there: on process 0, TensorBoard
    where TensorFlow is installed, and W&B if `wandb` has its arguments."""
    if jax.process_index():
        return []
    folder = paths.path(workdir)
    found: list[Board] = []
    if (board := tensorboard(folder / "tensorboard", step)) is not None:
        found.append(board)
    if wandb is not None:
        found.append(Wandb(folder, wandb))
    for board in found:
        if step == 0 or isinstance(board, Wandb):
            board.write_hparams(dict(flat(config)))
    return found


def tag(name: str) -> str:
    """The name of a number on a board."""
    return f"{CONSTANTS}/{name}" if CONSTANT.search(name) else name


def flat(section: Any, prefix: str = "") -> Any:
    """(name, value) of every number, switch and word in a config; other values as text."""
    if isinstance(section, Mapping):
        for key, value in section.items():
            yield from flat(value, f"{prefix}{key}.")
    else:
        plain = isinstance(section, (bool, int, float, str))
        yield prefix.removesuffix("."), section if plain else str(section)


def tensorboard(folder: epath.Path, step: int) -> Board | None:
    """The writer of clu; None where TensorFlow is not installed, which clu imports."""
    try:
        from clu import metric_writers
    except ImportError:
        logging.info("no TensorBoard files: TensorFlow is not installed (metrics.jsonl has it all)")
        return None
    if folder.exists():
        purge(folder, step)
    return TensorBoard(metric_writers.SummaryWriter(str(folder)))


def purge(folder: epath.Path, step: int) -> None:
    """Tells TensorBoard that what was written after `step` is to be forgotten: the event by which
    it recognises a process that was restarted. The first such event of a folder tells it of no
    restart, and clu writes none: so there are two. It reads the files of a folder by their names,
    which begin with the second: the next one is awaited, or what is written now might be read
    before it is purged, and be gone too."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    pb: Any = event_pb2  # made when imported: no checker sees its names
    session = pb.SessionLog(status=pb.SessionLog.START)
    for _ in range(2):
        writer.add_event(pb.Event(wall_time=time.time(), step=step + 1, session_log=session))
    writer.close()
    time.sleep(1 - time.time() % 1)


class TensorBoard:
    """clu's writer, with the names of `tag`."""

    def __init__(self, writer: Any):
        self._writer = writer
        self.write_images = lambda step, images: writer.write_images(
            step, {name: image[None] for name, image in images.items()}
        )
        self.write_hparams, self.flush, self.close = (
            writer.write_hparams,
            writer.flush,
            writer.close,
        )

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._writer.write_scalars(step, {tag(name): x for name, x in scalars.items()})


class Wandb:
    """Weights & Biases. The name of the run there is kept in WORKDIR/wandb.txt, by which a resumed
    run goes on in it; W&B takes no step twice, so what a restart repeats is shown once."""

    def __init__(self, workdir: epath.Path, arguments: Mapping[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb, file = wandb, workdir / "wandb.txt"
        known = file.read_text().strip() if file.exists() else None
        local = {} if paths.in_bucket(workdir) else dict(dir=str(workdir))
        self._run = wandb.init(**{**local, **dict(id=known, resume="allow"), **arguments})
        if known is None:
            file.write_text(f"{self._run.id}\n")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        finite = {tag(name): x for name, x in scalars.items() if math.isfinite(x)}
        self._run.log(finite, step=step)

    def write_images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w c"]]) -> None:
        self._run.log({name: self._wandb.Image(x) for name, x in images.items()}, step=step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self._run.config.update(dict(hparams), allow_val_change=True)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()
