"""Evaluators: make(*, encode, streams, mesh, **cfg) -> Evaluator. They never see a method."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vtp_jax.types import Batch

ROW_AXES = ("data", "fsdp")  # mesh axes over which the rows of a batch are split


def place(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows of a batch -> global arrays on the mesh, rows split over `ROW_AXES`."""
    axes = tuple(a for a in mesh.axis_names if a in ROW_AXES)
    rows = NamedSharding(mesh, PartitionSpec(axes))
    return {k: jax.make_array_from_process_local_data(rows, v) for k, v in batch.items()}
