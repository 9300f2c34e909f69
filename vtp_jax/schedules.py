"""Schedules: data from a config -> f(step), traceable, fp32.

Used for learning rates, loss weights, momenta and temperatures. Values that change shapes (mask
ratio, frames, resolution) change between stages, not by schedule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vtp_jax.types import UserError

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


def constant(*, value: float) -> Schedule:
    """`value` at every step."""
    return lambda step: jnp.float32(value)


def linear(*, start: float, end: float, steps: int) -> Schedule:
    """From `start` to `end` in `steps` steps, then `end`."""
    return lambda step: start + (end - start) * jnp.clip(step / jnp.float32(max(steps, 1)), 0, 1)


def cosine(*, start: float, end: float, steps: int) -> Schedule:
    """Half a cosine from `start` to `end` in `steps` steps, then `end`."""

    def f(step: Int[Array, ""] | int) -> Float[Array, ""]:
        done = jnp.clip(step / jnp.float32(max(steps, 1)), 0, 1)
        return end + 0.5 * (start - end) * (1 + jnp.cos(jnp.pi * done))

    return f


def warmup_cosine(*, peak: float, end: float, warmup: int, steps: int) -> Schedule:
    """Linear warm-up and cosine decay as in BEiT, MAE, VideoMAE and SimVTP, equal at every step.

    With W=warmup and T=steps: step s < W has peak * s / (W - 1), so that step 0 has rate 0 and step
    W - 1 has `peak`; step s >= W has end + (peak - end) / 2 * (1 + cos(pi * (s - W) / (T - W))), so
    that step W has `peak` once more and `end` is approached but first reached at step T.
    """
    if warmup > steps:
        raise UserError(f"warmup_cosine: warmup={warmup} is longer than the run, steps={steps}")

    def f(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step)
        rising = peak * step / jnp.float32(max(warmup - 1, 1))
        done = jnp.clip((step - warmup) / jnp.float32(max(steps - warmup, 1)), 0, 1)
        falling = end + 0.5 * (peak - end) * (1 + jnp.cos(jnp.pi * done))
        return jnp.where(step < warmup, rising, falling).astype(jnp.float32)

    return f


def warmup_linear(*, peak: float, end: float, warmup: int, steps: int) -> Schedule:
    """`warmup_cosine` with linear decay: step s >= W has
    peak + (end - peak) * (s - W) / (T - W)."""
    if warmup > steps:
        raise UserError(f"warmup_linear: warmup={warmup} is longer than the run, steps={steps}")
    falling = linear(start=peak, end=end, steps=steps - warmup)

    def f(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step)
        rising = peak * step / jnp.float32(max(warmup - 1, 1))
        return jnp.where(step < warmup, rising, falling(step - warmup)).astype(jnp.float32)

    return f


def stairs(*, value: float, factor: float, at: Sequence[int]) -> Schedule:
    """`value`, multiplied by `factor` once at each of the steps `at`."""

    def f(step: Int[Array, ""] | int) -> Float[Array, ""]:
        passed = sum(jnp.asarray(step) >= s for s in at)
        return jnp.float32(value) * jnp.float32(factor) ** passed

    return f


KINDS = dict(
    constant=constant, linear=linear, cosine=cosine, warmup_cosine=warmup_cosine,
    warmup_linear=warmup_linear, stairs=stairs,
)  # fmt: skip


def make(spec: float | Mapping[str, Any], where: str = "schedule") -> Schedule:
    """The schedule of a number, which is constant, or of a dict with its `kind` and that kind's
    arguments. Raises UserError, which begins with `where`, on others."""
    if isinstance(spec, (int, float)):
        return constant(value=float(spec))
    arguments = dict(spec)
    kind = arguments.pop("kind", None)
    if kind not in KINDS:
        raise UserError(f"{where}: kind={kind!r} is not a schedule; known: {', '.join(KINDS)}")
    known = inspect.signature(KINDS[kind]).parameters
    if wrong := sorted(set(arguments) ^ set(known)):
        raise UserError(f"{where}: {kind} takes {', '.join(known)}; check '{wrong[0]}'")
    return KINDS[kind](**arguments)
