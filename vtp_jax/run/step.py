"""One compiled training step: loss, gradients, update, and the handling of non-finite steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vtp_jax import tree
from vtp_jax.progress import duration
from vtp_jax.run import optim, stop
from vtp_jax.types import Batch, Mean, Method, Spec, State, UserError, is_teacher

Numbers = dict[str, Mean]
Step = Callable[[State, Batch], tuple[State, Numbers]]


def make_step(method: Method, optimizer: optim.Optim, seed: int) -> Step:
    """(state, batch) -> (state, numbers): a whole training step, to be jitted.

    Loss, rate and `after_update` get the step count before the update. A step with a non-finite
    loss or gradient keeps the old parameters, optimizer state and extra; only the step count
    advances, and the step is reported as `skipped`.
    """

    def step(state: State, batch: Batch) -> tuple[State, Numbers]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        trainable, frozen = optimizer.split(state.params)

        def loss(trainable: Any) -> Any:
            params = tree.merge(trainable, frozen)
            return method.loss(params, state.extra, batch, rng, state.step)

        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        new, opt, info = optimizer.update(grads, state.opt, trainable, state.step)
        params, extra = method.after_update(tree.merge(new, frozen), out.extra, state.step)
        extra = tree.map_named(  # checkpoints do not hold teachers: a change would be lost
            lambda name, x, old: old if is_teacher(f"extra/{name}") else x, extra, state.extra
        )
        good = optim.finite(value, info["grad_norm"])
        params, opt, extra = optim.keep(
            good, (params, opt, extra), (state.params, state.opt, state.extra)
        )
        scalars = {"loss": value, **info, "skipped": 1.0 - good}
        numbers = {name: Mean(x, jnp.ones(())) for name, x in scalars.items()}
        return State(state.step + 1, params, opt, extra), {**numbers, **out.metrics}

    return step


def jit_step(step: Step, placed: State, mesh: jax.sharding.Mesh) -> Any:
    """The jitted step. The new state has the shardings `placed` and reuses the old state's memory,
    which is donated."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(placed, whole))


class Compiled:
    """A jitted step that is compiled before its first call, once for each structure of batch, and
    says so.

    say:    takes a line
    around: a context manager, entered while it compiles
    before: seconds that the compilation took when this run last started, if known
    """

    def __init__(
        self,
        step: Any,
        say: Callable[[str], None],
        around: Callable[[str], contextlib.AbstractContextManager[None]],
        before: float | None = None,
    ):
        self._step, self._say, self._around = step, say, around
        self._what = "compiling the training step"
        if before:
            self._what += f" (last time it took {duration(before)})"
        self._programs: dict[Any, Any] = {}

    def __call__(self, state: State, batch: Batch) -> tuple[State, Numbers]:
        key = tuple((name, x.shape, x.dtype) for name, x in sorted(batch.items()))
        if key not in self._programs:
            begun = time.monotonic()
            with self._around(self._what):
                self._programs[key] = stop.aside(self._step.lower(state, batch).compile)
            self._say(f"compiled in {time.monotonic() - begun:.1f} s")
        return self._programs[key](state, batch)


def check_step(step: Step, shapes: State, spec: Spec) -> None:
    """Raises UserError unless a step returns the shapes and dtypes of the state that it takes;
    otherwise, every step would be silently recompiled. A jitted step is not traced again later if
    shapes and spec have the shardings of its arguments."""
    new = tree.flatten(jax.eval_shape(step, shapes, dict(spec))[0])
    for name, old in tree.flatten(shapes).items():
        got = new.get(name)
        if got is None or (got.shape, got.dtype) != (old.shape, old.dtype):
            raise UserError(f"a step turns the state's '{name}' from {old} into {got}")
