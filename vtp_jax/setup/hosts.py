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

import errno
import functools
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vtp_jax.run import stop
from vtp_jax.run.stop import Exit, Stopped
from vtp_jax.setup import cli
from vtp_jax.types import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
OF_JOB = "JOB_COMPLETION_INDEX"

# Errors of JAX that come from a lost process, device or network, by their status or their text.
# Others, such as RESOURCE_EXHAUSTED and a program that does not compile, come back.
LOST = re.compile(
    r"^(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|DATA_LOSS)|gloo|nccl|heartbeat|"
    r"connection (closed|reset|refused)|CUDA_ERROR_(ECC|LAUNCH_FAILED|UNKNOWN)|core halted",
    re.IGNORECASE,
)
# Errors of file systems and sockets that pass.
PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.ECONNABORTED, errno.ENOTCONN, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH,
}  # fmt: skip
# By platform of JAX: its extra, what is found on a machine that has it, and one of the modules that
# drive it.
ACCELERATORS = {
    "cuda": (
        "NVIDIA GPU",
        "/proc/driver/nvidia/version",
        ("jax_cuda12_plugin", "jax_cuda13_plugin"),
    ),
    "tpu": ("TPU", "/dev/accel0", ("libtpu",)),
}


class Lost(UserError):
    """The other processes of a run were not found: they may be when it is started again."""


def together(main: Callable[[Sequence[str]], Any]) -> Callable[[Sequence[str]], Any]:
    """An entry's main that joins the other processes of its run before it does anything else:
    before JAX is asked for a device. For entries whose work is distributed over processes.

    With several processes, one that fails exits at once. A normal exit would wait for the others,
    and they for it, in the middle of a sum; the launcher sees its exit status and ends them. An
    error that is worth another start (`exit_of`) exits with `Exit.RESTART`.
    """

    @functools.wraps(main)
    def joined(argv: Sequence[str]) -> Any:
        several = False
        try:
            if not {"-h", "--help"} & set(argv):
                check_accelerator()
                several = join()
            return main(argv)
        except Stopped:  # all processes stop at the same step
            raise
        except SystemExit as ended:  # its output is unread; those of the others may not be
            if several and ended.code:
                os._exit(ended.code if isinstance(ended.code, int) else Exit.FAILED)
            raise
        except Exception as error:
            code = exit_of(error)
            if not several and code != Exit.RESTART:
                raise
            line = cli.mistake(error)
            sys.stderr.write(f"error: {line}\n" if line else traceback.format_exc())
            if code == Exit.RESTART:
                sys.stderr.write(f"exit status {code:d}: the same command goes on\n")
            if not several:
                sys.exit(code)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    return joined


def exit_of(error: BaseException) -> Exit:
    """The exit status of a run that an error ends: whether a scheduler should start it again."""
    if isinstance(error, UserError) and not isinstance(error, Lost):
        return Exit.MISTAKE
    return Exit.RESTART if stop.progressed(error) or is_lost(error) else Exit.FAILED


def is_lost(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is that of another process, a device, the
    network or a file system that failed."""
    while error is not None:
        if isinstance(error, Lost):
            return True
        if isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(str(error)):
            return True
        if isinstance(error, OSError) and error.errno in PASSING:
            return True
        error = error.__cause__ or error.__context__
    return False


def check_accelerator(
    environ: Mapping[str, str] = os.environ,
    installed: Callable[[str], Any] = importlib.util.find_spec,
    root: Path = Path("/"),
) -> None:
    """Says how to install JAX for the accelerator of this machine if it runs without it. Raises
    UserError if JAX_PLATFORMS asks for one. JAX itself is not asked: that would start it."""
    wanted = environ.get("JAX_PLATFORMS", "").split(",")
    for platform, (name, file, modules) in ACCELERATORS.items():
        if any(installed(module) for module in modules):
            continue
        how = f"pip install 'vtp_jax[{platform}]'"
        if platform in wanted:
            raise UserError(f"JAX_PLATFORMS={','.join(wanted)}: JAX cannot drive a {name}; {how}")
        if wanted == [""] and (root / file.lstrip("/")).exists():
            sys.stderr.write(
                f"warning: this machine has a {name}, but JAX runs on its CPU; {how}, or set "
                "JAX_PLATFORMS=cpu if that is meant\n"
            )


def join(environ: Mapping[str, str] = os.environ) -> bool:
    """Starts jax.distributed as the environment defines it, and returns whether it defines several
    processes; does nothing for a single one. Raises Lost where they do not answer."""
    given = find(environ)
    if given is None:
        return False
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        kind = Lost if is_lost(error) else UserError
        raise kind(f"the processes of this run did not connect ({given}): {text}") from None
    return True


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
