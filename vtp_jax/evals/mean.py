"""Means of a method's own metrics, such as its validation losses, over a whole stream."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vtp_jax import evals
from vtp_jax.types import Evaluator, State, Stream


def make(
    *,
    encode: Mapping[str, Callable[..., Mapping[str, Any]]],
    streams: Mapping[str, Stream],
    mesh: Mesh,
    check: evals.Check = evals.unchecked,
    stream: str = "val",
    loss: str = "loss",
    seed: int = 0,
) -> Evaluator:
    """Yields (name, mean) for each metric of `encode[loss]`, which returns {name: Mean}.

    Batch i has the key fold_in(key(seed), i) in every run, so that two checkpoints are measured
    with the same masks. Totals and counts are added up in fp64 over all batches and divided once:
    the weight of the last, partly filled batch is the number of its rows. A metric with a count of
    0 is not yielded.
    """
    evals.need("mean", streams, stream)
    measure = evals.jitted(evals.verb("mean", encode, loss), mesh)
    check("mean", lambda *args: measure(*args, jax.random.key(seed)), stream)

    def run(state: State) -> Iterator[tuple[str, float]]:
        totals: dict[str, np.ndarray] = {}
        keys = (jax.random.fold_in(jax.random.key(seed), i) for i in itertools.count())

        def f(*args: Any) -> Mapping[str, Any]:
            return measure(*args, next(keys))

        for _, means in evals.over("mean", streams, stream, f, state, mesh):
            for name, mean in means.items():
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
