"""Several processes as one run, where the environment defines several.

| environment | what defines them |
|---|---|
| plain | JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES, JAX_PROCESS_ID |
| Kubernetes' JobSet | the same; without JAX_PROCESS_ID, JOB_COMPLETION_INDEX of an indexed job |
| SLURM | what `srun` sets for the tasks of a step: SLURM_NTASKS, SLURM_PROCID |
| TPU VM, also GKE's | JAX finds chips, and reads the machine's metadata or TPU_WORKER_HOSTNAMES |

The first that applies is used. A single process starts nothing.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from vtp_jax.run.stop import Exit, Stopped
from vtp_jax.types import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
OF_JOB = "JOB_COMPLETION_INDEX"


def together(main: Callable[[Sequence[str]], Any]) -> Callable[[Sequence[str]], Any]:
    """An entry's main that joins the other processes of its run before it does anything else:
    before JAX is asked for a device. For entries whose work is distributed over processes.

    With several processes, one that fails exits at once. A normal exit would wait for the others,
    and they for it, in the middle of a sum; the launcher sees its exit status and ends them.
    """

    @functools.wraps(main)
    def joined(argv: Sequence[str]) -> Any:
        if not {"-h", "--help"} & set(argv):
            join()
        try:
            return main(argv)
        except Stopped:  # all processes stop at the same step
            raise
        except Exception as error:
            if jax.process_count() == 1:
                raise
            mistake = isinstance(error, UserError)
            sys.stderr.write(f"error: {error}\n" if mistake else traceback.format_exc())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(Exit.MISTAKE if mistake else Exit.FAILED)

    return joined


def join(environ: Mapping[str, str] = os.environ) -> None:
    """Starts jax.distributed as the environment defines it; does nothing for a single process."""
    given = find(environ)
    if given is None:
        return
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"the processes of this run did not connect ({given}): {text}") from None


def find(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of jax.distributed.initialize, or None for a single process.

    Raises UserError if the plain variables are incomplete or not numbers.
    """
    if COUNT in environ or INDEX in environ:
        return _plain(environ)
    if _number(environ, "SLURM_NTASKS", 1) > 1 and "SLURM_STEP_NODELIST" in environ:
        return _slurm(environ)
    # JAX sets this when it is imported and finds chips and the library to drive them.
    if environ.get("TPU_ML_PLATFORM") == "JAX" and not _kept_off(environ):
        return {}
    return None


def _plain(environ: Mapping[str, str]) -> dict[str, Any] | None:
    if (count := _number(environ, COUNT, None)) == 1:
        return None
    if not (address := environ.get(ADDRESS)) or ":" not in address:
        raise UserError(f"{ADDRESS}={address or ''}: {COUNT} is set, so it must be HOST:PORT")
    index = _number(environ, INDEX if INDEX in environ or OF_JOB not in environ else OF_JOB, None)
    if not 0 <= index < count:
        raise UserError(f"{INDEX}={index} is not one of {COUNT}={count} processes, from 0 on")
    return dict(coordinator_address=address, num_processes=count, process_id=index)


def _slurm(environ: Mapping[str, str]) -> dict[str, Any]:
    """JAX gives each task of SLURM one GPU. A task that is alone on its node gets all of them."""
    tasks, nodes = environ["SLURM_NTASKS"], environ.get("SLURM_STEP_NUM_NODES")
    gpus = _number(environ, "SLURM_GPUS_ON_NODE", 0)
    whole = tasks == nodes and gpus > 0
    local = dict(local_device_ids=list(range(gpus))) if whole else {}
    return dict(cluster_detection_method="slurm", **local)


def _kept_off(environ: Mapping[str, str]) -> bool:
    """Whether JAX_PLATFORMS keeps JAX off the TPU."""
    platforms = environ.get("JAX_PLATFORMS", "")
    return bool(platforms) and "tpu" not in platforms.split(",")


def _number(environ: Mapping[str, str], name: str, default: int | None) -> int:
    text = environ.get(name, default)
    try:
        return int(text)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        found = " is not set" if text is None else f"={text!r} is not a number"
        raise UserError(
            f"{name}{found}; a run of several processes needs {ADDRESS}, {COUNT} and {INDEX}"
        ) from None
