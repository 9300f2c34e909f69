"""One step of training: what it passes to the optimizer, the loss and `after_update`, and what a
step that is not finite keeps."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.run import optim
from vtp_jax.run.step import Compiled, check_step, make_step
from vtp_jax.types import Mean, Method, Out, State, UserError

RATES = np.array([0.1, 0.3, 0.2, 0.6], np.float32)  # no two neighbours are equal
SEED = 7


def slope(bad=(), value=np.nan):
    """A method of one weight w with the loss w, not finite at the steps `bad`. Its extra has what
    the loss and `after_update` were given last, and counts the steps that were taken; a weight that
    leaves `after_update` is 1 less than it came."""

    def loss(params, extra, batch, rng, step):
        total = params["w"] * jnp.where(jnp.isin(step, jnp.asarray(bad, int)), value, 1.0)
        seen = dict(extra, taken=extra["taken"] + 1, loss_step=step, draw=jax.random.bits(rng))
        return total, Out({"loss_w": Mean(total, jnp.ones(()))}, seen)

    def after_update(params, extra, step):
        seen = dict(extra, update_step=step, update_weight=params["w"])
        return {"w": params["w"] - 1}, seen

    def start(rng, spec, params):
        counts = dict.fromkeys(("taken", "loss_step", "update_step"), jnp.int32(-1))
        return dict(counts, draw=jnp.uint32(0), update_weight=params["w"])

    return Method(lambda rng, spec: {"w": jnp.ones(())}, loss, {}, start, after_update)


def run(method):
    """The states before and after each of a few steps, and the numbers of each step."""
    params = method.init(None, {})
    made = optim.make(
        params, rules=[(".*", {})], lr=lambda step: jnp.asarray(RATES)[step], weight_decay=0.0
    )
    step = jax.jit(make_step(method, made, SEED))
    extra = method.start(None, {}, params)
    states, numbers = [State(jnp.int32(0), params, made.init(params), extra)], []
    for _ in RATES:
        state, found = step(states[-1], {})
        states.append(state)
        numbers.append({name: float(x.value()) for name, x in found.items()})
    return jax.device_get(states), numbers


def test_rates_and_after_update_belong_to_the_step_that_is_taken():
    """The rate that is reported and used is schedule(step), of the count before the update; that
    is the step `after_update` is given, with the updated weight; and what it returns is kept."""
    states, numbers = run(slope())
    for step, (old, new, found) in enumerate(zip(states, states[1:], numbers, strict=False)):
        assert found["lr"] == RATES[step] and found["loss"] == old.params["w"]
        updated = old.params["w"] - RATES[step]  # Adam's direction of a constant gradient is 1
        np.testing.assert_allclose(new.extra["update_weight"], updated, rtol=1e-5)
        np.testing.assert_allclose(new.params["w"], updated - 1, rtol=1e-5)
        assert new.extra["update_step"] == new.extra["loss_step"] == step
        assert (old.step, new.step) == (step, step + 1)
        draw = jax.random.bits(jax.random.fold_in(jax.random.key(SEED), step))
        assert new.extra["draw"] == draw


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(value):
    states, numbers = run(slope([1], value))
    assert [one["skipped"] for one in numbers] == [0, 1, 0, 0]
    assert [int(s.step) for s in states] == [0, 1, 2, 3, 4]
    assert [int(s.extra["taken"]) for s in states] == [-1, 0, 0, 1, 2]
    for a, b in zip(jax.tree.leaves(states[1][1:]), jax.tree.leaves(states[2][1:]), strict=True):
        assert (a == b).all()
    # The clock of the rates is the step's: a step that is skipped does not delay it.
    assert [one["lr"] for one in numbers] == RATES.tolist()
    np.testing.assert_allclose(
        states[3].params["w"], states[2].params["w"] - RATES[2] - 1, rtol=1e-5
    )


def test_a_state_whose_types_change_is_rejected():
    shapes = State(
        *(jax.ShapeDtypeStruct((), d) for d in ("int32", "float32", "float32", "float32"))
    )

    def step(state, batch):
        return state._replace(extra=state.extra.astype(jnp.bfloat16)), {}

    with pytest.raises(UserError, match="a step turns the state's 'extra'"):
        check_step(step, shapes, {})


def test_a_step_is_compiled_once_for_each_structure_of_batch():
    told, inside = [], []

    @contextlib.contextmanager
    def around(what):
        told.append(what)
        inside.append(len(told))
        yield

    def add(state, batch):
        rows = Mean(batch["x"].sum(), jnp.ones(()))
        return state._replace(step=state.step + batch["x"].sum()), {"rows": rows}

    update = Compiled(jax.jit(add, donate_argnums=0), told.append, around)
    state = State(jnp.zeros(()), {}, {}, {})
    for rows in (2, 3, 2, 3):
        state, numbers = update(state, {"x": jnp.ones(rows)})
        assert numbers["rows"].total == rows
    assert state.step == 10 and inside == [1, 3]
    assert [line.split(" ")[0] for line in told] == ["compiling", "compiled"] * 2
