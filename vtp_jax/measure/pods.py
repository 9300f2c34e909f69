"""Pods: the devices that a step is compiled for, local or remote, and their specifications."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from vtp_jax.types import UserError

GIB = 2**30


class Chip(NamedTuple):
    """A device of a kind of TPU, from its maker's documentation.

    memory: GiB; rate: bf16 TFLOP/s; bandwidth: GB/s of its memory; link: GB/s to its neighbours,
    all links together; clock: GHz of the cycles that the compiler counts; cores: of the host, per
    device; devices: of a chip: one, or two halves that JAX sees as devices of their own
    """

    memory: int
    rate: float
    bandwidth: float
    link: float
    clock: float
    cores: float
    devices: int = 1

    @property
    def unit(self) -> str:
        """What a device is called."""
        return "chip" if self.devices == 1 else "device"


# clock: the rate divided by the products that the matrix units start per cycle. For a large matrix
# product, the estimated time is 1.14 (v5e), 1.42 (v6e), 1.11 (v5p) and 1.18 (tpu7x) times that at
# the rate.
CHIPS = dict(
    v5e=Chip(16, 197, 819, 200, 1.5, 28),
    v6e=Chip(32, 918, 1640, 448, 1.75, 22.5),
    v5p=Chip(95, 459, 2765, 600, 1.75, 52),
    tpu7x=Chip(96, 1153.5, 3690, 600, 2.2, 28, devices=2),
)


class Pod(NamedTuple):
    """Devices, local or remote. chip: their specification, if known."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None

    @property
    def memory(self) -> int | None:
        """Bytes of one device; None if unknown."""
        if self.chip:
            return self.chip.memory * GIB
        device = self.devices[0]
        stats = device.memory_stats() if device.platform != "cpu" else None
        return (stats or {}).get("bytes_limit")


def find_pod(topology: str, slices: int = 1) -> Pod:
    """The devices of a topology: `v5e:4x4` (TPUs, which need not be present), `cpu:8`, or `local`.

    slices: the number of slices of that topology in the run. Raises UserError on a topology that
    does not exist.
    """
    if topology == "local":
        return Pod(topology, jax.devices(), None)
    kind, _, layout = topology.partition(":")
    if kind == "cpu" and re.fullmatch("[1-9][0-9]*", layout):
        return Pod(topology, _cpus(int(layout)), None)
    if kind not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", layout):
        raise UserError(
            f"no topology '{topology}'; write CHIP:AxB as in v5e:4x4 with CHIP of "
            f"{', '.join(CHIPS)} (v5p and tpu7x have three numbers), cpu:N, or local"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"planning for {kind} needs the TPU compiler, which runs anywhere: "
            "pip install 'jax[tpu]' (Linux, x86-64)"
        )
    return Pod(topology, _tpus(topology, slices), CHIPS[kind])


def _cpus(count: int) -> Sequence[Any]:
    # The number of devices is fixed once JAX has started.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"topology cpu:{count}: this process has {len(devices)} CPU devices")
    return devices[:count]


def _tpus(topology: str, slices: int) -> Sequence[Any]:
    # The library queries its machine, and complains if that is not a TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # only the compiler is used, no chip
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    more = {} if slices == 1 else dict(num_slices=slices)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"the TPU compiler rejects {topology} x {slices}: {text}") from None
    return found.devices
