"""Schedules against their formulas, at every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtp_jax import schedules
from vtp_jax.types import UserError


def reference(peak, end, warmup, steps):
    """The table of SimVTP's official code: linspace, then half a cosine over the other steps."""
    rising = np.linspace(0, peak, warmup) if warmup else np.array([])
    k = np.arange(steps - warmup)
    falling = end + 0.5 * (peak - end) * (1 + np.cos(np.pi * k / max(steps - warmup, 1)))
    return np.concatenate([rising, falling])


@given(st.data())
def test_warmup_cosine_is_the_reference_table(data):
    steps = data.draw(st.integers(1, 40))
    warmup = data.draw(st.integers(0, steps))
    assert_table(warmup, steps)


@pytest.mark.parametrize("warmup, steps", [(0, 7), (1, 7), (2, 7), (6, 7), (7, 7), (1, 1), (0, 1)])
def test_warmup_cosine_is_the_reference_table_at_the_extremes(warmup, steps):
    assert_table(warmup, steps)


def assert_table(warmup, steps, peak=6e-4, end=4e-5):
    f = schedules.make(dict(kind="warmup_cosine", peak=peak, end=end, warmup=warmup, steps=steps))
    got = jax.vmap(f)(jnp.arange(40))[:steps]  # one shape for all: compiled once
    np.testing.assert_allclose(got, reference(peak, end, warmup, steps), rtol=2e-6, atol=1e-10)
    assert got.dtype == jnp.float32


def test_fp32_steps_do_not_drift_over_the_official_run():
    """488k steps of the paper's recipe: fp32 steps must not drift from the table."""
    warmup, steps = 97_640, 488_200
    f = schedules.make(dict(kind="warmup_cosine", peak=6e-4, end=4e-5, warmup=warmup, steps=steps))
    table = reference(6e-4, 4e-5, warmup, steps)
    at = np.r_[0, 1, warmup - 1, warmup, warmup + 1, steps - 1, np.arange(0, steps, 997)]
    np.testing.assert_allclose(jax.vmap(f)(at), table[at], rtol=2e-6, atol=1e-10)
    assert f(0) == 0 and f(warmup - 1) == f(warmup) == np.float32(6e-4)
    np.testing.assert_allclose(f(steps), 4e-5, rtol=1e-5)
    np.testing.assert_allclose(f(2 * steps), 4e-5, rtol=1e-5)


@pytest.mark.parametrize("warmup, steps", [(0, 7), (1, 7), (3, 7), (6, 7), (0, 1)])
def test_warmup_linear_rises_as_warmup_cosine_and_falls_straight(warmup, steps):
    arguments = dict(peak=6e-4, end=4e-5, warmup=warmup, steps=steps)
    f, like = (schedules.make(dict(kind=f"warmup_{k}", **arguments)) for k in ("linear", "cosine"))
    at = jnp.arange(steps)
    falling = 6e-4 + (4e-5 - 6e-4) * (np.arange(steps) - warmup) / max(steps - warmup, 1)
    table = np.where(np.arange(steps) < warmup, jax.vmap(like)(at), falling)
    np.testing.assert_allclose(jax.vmap(f)(at), table, rtol=2e-6)
    np.testing.assert_allclose([f(steps), f(2 * steps)], 4e-5, rtol=1e-6)


def test_stairs_drop_at_their_steps_and_stay():
    f = schedules.make(dict(kind="stairs", value=2.0, factor=0.1, at=[3, 5]))
    got = jax.jit(jax.vmap(f))(jnp.arange(8))
    np.testing.assert_allclose(got, [2, 2, 2, 0.2, 0.2, 0.02, 0.02, 0.02], rtol=1e-6)
    assert got.dtype == jnp.float32 and f(4) == got[4]


@given(st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 30), st.integers(0, 60))
def test_linear_and_cosine_go_from_start_to_end(start, end, steps, step):
    done = min(step / max(steps, 1), 1)
    arguments = dict(start=start, end=end, steps=steps)
    linear = schedules.make(dict(kind="linear", **arguments))(step)
    cosine = schedules.make(dict(kind="cosine", **arguments))(step)
    np.testing.assert_allclose(linear, start + (end - start) * done, rtol=1e-5, atol=1e-6)
    half = 0.5 * (1 + np.cos(np.pi * done))
    np.testing.assert_allclose(cosine, end + (start - end) * half, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(schedules.KINDS))
def test_every_schedule_returns_fp32_scalars_for_ints_arrays_and_under_jit(kind):
    arguments = dict(value=0.5, start=0.0, end=1.0, peak=2.0, warmup=2, steps=5, factor=0.1, at=[2])
    known = {
        "constant": ("value",),
        "linear": ("start", "end", "steps"),
        "cosine": ("start", "end", "steps"),
        "warmup_cosine": ("peak", "end", "warmup", "steps"),
        "warmup_linear": ("peak", "end", "warmup", "steps"),
        "stairs": ("value", "factor", "at"),
    }[kind]
    f = schedules.make({"kind": kind, **{k: arguments[k] for k in known}})
    for value in (f(3), f(jnp.int32(3)), jax.jit(f)(jnp.int32(3))):
        assert value.dtype == jnp.float32 and value.shape == ()
        np.testing.assert_allclose(value, f(3), rtol=1e-6)


def test_a_number_is_constant():
    assert schedules.make(0.25)(10_000) == 0.25


@pytest.mark.parametrize(
    "spec, words",
    [
        (dict(kind="cosin", start=0.0, end=1.0, steps=3), "'cosin' is not a schedule"),
        (dict(start=0.0), "kind=None"),
        (dict(kind="cosine", start=0.0, end=1.0), "check 'steps'"),
        (dict(kind="constant", value=1.0, step=3), "check 'step'"),
        (dict(kind="warmup_cosine", peak=1.0, end=0.0, warmup=9, steps=5), "longer than the run"),
    ],
)
def test_wrong_specs_are_errors(spec, words):
    with pytest.raises(UserError, match=words):
        schedules.make(spec, "config.optim.lr")
