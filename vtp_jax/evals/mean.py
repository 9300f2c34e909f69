"""Means of a method's own metrics, such as its validation losses, over a whole stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vtp_jax import sharding
from vtp_jax.types import Evaluator, State, Stream, UserError


def make(
    *,
    encode: Mapping[str, Callable[..., Mapping[str, Any]]],
    streams: Mapping[str, Stream],
    mesh: Mesh,
    stream: str = "val",
    loss: str = "loss",
    seed: int = 0,
) -> Evaluator:
    """Yields (name, mean) for each metric of `encode[loss]`, which gives {name: Mean}.

    Batch i has the key fold_in(key(seed), i) in every run, so that two checkpoints see the same
    masks. Totals and counts are added up in fp64 over all batches and divided once: the last,
    partly filled batch weighs what it holds. A metric that counted nothing is not yielded.
    """
    if stream not in streams:
        raise UserError(
            f"mean: no stream '{stream}'; the data has {', '.join(sorted(streams)) or 'none'}"
        )
    if loss not in encode:
        raise UserError(
            f"mean: the method has no encode '{loss}'; it has {', '.join(sorted(encode))}"
        )
    measure = jax.jit(encode[loss], out_shardings=NamedSharding(mesh, PartitionSpec()))

    def run(state: State) -> Iterator[tuple[str, float]]:
        totals: dict[str, np.ndarray] = {}
        with sharding.activate(mesh):
            for i, batch in enumerate(streams[stream].batches()):
                key = jax.random.fold_in(jax.random.key(seed), i)
                means = measure(state.params, state.extra, sharding.put(batch, mesh), key)
                for name, mean in jax.device_get(means).items():
                    pair = np.array([mean.total, mean.count], np.float64)
                    totals[name] = totals.get(name, np.zeros(2)) + pair
        for name, (total, count) in sorted(totals.items()):
            if count:
                yield name, float(total / count)

    protocol = (
        f"means of '{loss}' over the {streams[stream].rows} rows of '{stream}', "
        f"batch i with the key fold_in(key({seed}), i), divided once at the end"
    )
    return Evaluator(run, protocol)
