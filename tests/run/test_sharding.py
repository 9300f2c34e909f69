"""Meshes, rules to shardings, batches on a mesh, prefetching."""

import json
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vtp_jax import tree
from vtp_jax.run import sharding
from vtp_jax.types import State, UserError


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def specs(rules, shapes, note=pytest.fail, **sizes):
    """Specs on a mesh of 8; a note fails the test unless one is expected."""
    return sharding.specs(rules, shapes, sharding.make_mesh(**sizes), note)


@pytest.mark.parametrize(
    "asked, sizes",
    [
        (dict(), (8, 1, 1, 1)),
        (dict(fsdp=4), (2, 4, 1, 1)),
        (dict(data=1, fsdp=-1), (1, 8, 1, 1)),
        (dict(data=2, fsdp=2, tensor=2), (2, 2, 1, 2)),
        (dict(fsdp=2, sequence=2), (2, 2, 2, 1)),
    ],
)
def test_axes_of_a_mesh_have_the_requested_sizes(asked, sizes):
    mesh = sharding.make_mesh(**asked)
    assert tuple(mesh.shape.values()) == sizes and mesh.axis_names == sharding.AXES
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_mesh_may_use_some_of_the_devices():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    assert mesh.size == 1 and mesh.devices.item() == jax.devices()[0]


@pytest.mark.parametrize(
    "asked, words",
    [
        (dict(fsdp=3), "does not fit 8 devices"),
        (dict(data=4), "does not fit 8 devices"),
        (dict(data=16), "does not fit 8 devices"),
        (dict(fsdp=16), "does not fit 8 devices"),
        (dict(fsdp=-1), "only one axis"),
        (dict(fsdp=0), "fsdp=0"),
        (dict(data=-2), "data=-2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error(asked, words):
    with pytest.raises(UserError, match=words):
        sharding.make_mesh(**asked)


def test_specs_follow_the_rules():
    shapes = {"a": {"kernel": shape(3, 16, 32), "bias": shape(3, 32)}, "b": shape(8), "c": shape()}
    rules = [
        (".*kernel", (None, "fsdp", "tensor")),
        ("a/bias", "fsdp"),
        ("b", [["data", "fsdp"]]),  # lists, as a JSON config gives them
        (".*", ()),
    ]
    assert specs(rules, shapes, data=2, fsdp=2, tensor=2) == {
        "a": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "fsdp")},
        "b": P(("data", "fsdp")),
        "c": P(),
    }


def test_rules_that_went_through_json_are_the_same():
    rules = [("a", (None, ("data", "fsdp"))), (".*", "fsdp")]
    shapes = {"a": shape(3, 8), "b": shape(8)}
    assert specs(rules, shapes) == specs(json.loads(json.dumps(rules)), shapes)


@given(st.lists(st.integers(1, 24), max_size=4))
def test_fsdp_takes_the_largest_dimension_it_divides(dims):
    notes = []
    spec = specs([(".*", "fsdp")], {"x": shape(*dims)}, notes.append, data=2, fsdp=4)["x"]
    fits = [n for n in dims if n % 4 == 0]
    taken = [dims[i] for i, axis in enumerate(spec) if axis == "fsdp"]
    assert taken == ([max(fits)] if fits else [])
    assert len(notes) == (1 if dims and not fits else 0)


def test_a_dimension_that_does_not_divide_stays_whole_and_is_noted():
    notes = []
    got = specs([(".*", ("tensor", "fsdp"))], {"x": shape(6, 8)}, notes.append, fsdp=2, tensor=4)
    assert got == {"x": P(None, "fsdp")}
    assert notes == [
        "sharding: dimension 0 of x (6, 8) stays whole, tensor=4 does not divide it",
    ]


@pytest.mark.parametrize(
    "rules, words",
    [
        ([(".*", ("fdsp",))], "'fdsp' for a/kernel is not an axis"),
        ([(".*", "tensor")], "'tensor' for a/kernel is not a spec"),
        ([(".*", (None, None, "fsdp"))], "longer than the rank of a/kernel"),
        ([(".*", ("fsdp", "fsdp"))], "uses an axis twice"),
        ([("b/.*", ())], "no rule covers 'a/kernel'"),
        ([(".*", ()), ("a/.*", ("fsdp",))], "'a/.*' matches nothing"),
    ],
)
def test_wrong_rules_are_errors(rules, words):
    with pytest.raises(UserError, match=words) as raised:
        specs(rules, {"a": {"kernel": shape(8, 8)}}, fsdp=8, data=1)
    assert "\n" not in str(raised.value)


def make_state() -> State:
    params = {"net": {"kernel": jnp.zeros((16, 8)), "bias": jnp.zeros(8)}, "kernel": jnp.zeros(16)}
    opt = optax.adam(1e-3).init(params)
    extra = {"twin": params["net"], "queue": jnp.zeros((16, 8))}
    return State(jnp.int32(0), params, opt, extra)


RULES = [("net/kernel", ("fsdp", "tensor")), ("kernel", ("fsdp",)), (".*", ())]


def test_moments_and_twins_follow_their_parameters():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    state = jax.eval_shape(make_state)
    placed = sharding.state_shardings(state, mesh, RULES)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    got = {name: s.spec for name, s in tree.flatten(placed).items() if s.spec != P()}
    assert got == {
        "params/net/kernel": P("fsdp", "tensor"),
        "params/kernel": P("fsdp"),
        "opt/0/mu/net/kernel": P("fsdp", "tensor"),
        "opt/0/mu/kernel": P("fsdp"),
        "opt/0/nu/net/kernel": P("fsdp", "tensor"),
        "opt/0/nu/kernel": P("fsdp"),
    }


def test_extra_has_rules_of_its_own():
    mesh, state = sharding.make_mesh(fsdp=2, tensor=2), jax.eval_shape(make_state)
    followed = sharding.state_shardings(state, mesh, RULES)
    placed = sharding.state_shardings(state, mesh, [("extra/queue", "fsdp"), *RULES])
    assert placed.extra["queue"].spec == P("fsdp") != followed.extra["queue"].spec
    placed.extra["queue"] = followed.extra["queue"]
    assert placed == followed
    everything = sharding.state_shardings(state, mesh, [("extra/.*", ()), *RULES])
    assert {s.spec for s in jax.tree.leaves(everything.extra)} == {P()}
    with pytest.raises(UserError, match="'extra/heap' matches nothing in extra"):
        sharding.state_shardings(state, mesh, [("extra/heap", ()), *RULES])


def test_a_state_is_created_with_its_shardings():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    placed = sharding.state_shardings(jax.eval_shape(make_state), mesh, RULES)
    state = jax.jit(make_state, out_shardings=placed)()
    assert jax.tree.map(lambda x: x.sharding, state) == placed
    assert state.params["net"]["kernel"].addressable_shards[0].data.shape == (8, 4)
    shapes = sharding.with_shardings(jax.eval_shape(make_state), placed)
    assert jax.tree.map(lambda x: x.sharding, shapes) == placed


def test_rows_are_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    batch = {"video": np.arange(8 * 3, dtype=np.uint8).reshape(8, 3), "valid": np.ones(8, bool)}
    with jax.transfer_guard("disallow"):
        placed = sharding.put(batch, mesh)
    for key, x in placed.items():
        assert x.sharding == sharding.batch_sharding(mesh)
        np.testing.assert_array_equal(np.asarray(x), batch[key])
        assert {s.data.shape[0] for s in x.addressable_shards} == {2}
    with pytest.raises(UserError, match="batch=6 does not divide over 4 devices"):
        sharding.put({"valid": np.ones(6, bool)}, mesh)


def test_prefetch_keeps_order_and_ends():
    with sharding.Prefetch(iter(range(20)), lambda i: i * i) as items:
        assert list(items) == [i * i for i in range(20)]
        assert list(items) == []


def test_prefetch_raises_an_error_in_its_place():
    def source():
        yield 1
        raise OSError("the disk is gone")

    items = sharding.Prefetch(source(), lambda i: i)
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)

    with pytest.raises(ZeroDivisionError):
        next(sharding.Prefetch(iter([0]), lambda i: 1 // i))


def test_prefetch_works_ahead_by_its_depth_and_no_further():
    made, third = [], threading.Event()

    def put(i):
        made.append(i)
        if i == 3:  # two wait in the queue, one more is ready
            third.set()
        return i

    with sharding.Prefetch(iter(range(100)), put, depth=2) as items:
        assert next(items) == 0
        assert third.wait(20)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]


def test_prefetch_stops_and_closes_its_source():
    closed = threading.Event()

    def source():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    with sharding.Prefetch(source(), lambda i: i) as items:
        next(items)
    assert closed.wait(20)
    assert threading.active_count() == before
    assert list(items) == []


def test_prefetch_measures_the_waiting_time():
    gate = threading.Event()

    def source():
        yield 0
        gate.wait(20)
        yield 1

    with sharding.Prefetch(source(), lambda i: i) as items:
        next(items)
        before = items.waited
        threading.Timer(0.2, gate.set).start()
        next(items)
        assert items.waited - before > 0.1


def constrained(x):
    return nn.with_logical_constraint(jnp.sin(x), ("act_batch", "act_len", "act_heads", "act_emb"))


def test_activations_are_constrained_while_a_mesh_is_active():
    """In the lowered program and in its output; without an active mesh there is no constraint."""
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    x = jnp.ones((8, 5, 4, 3))
    with sharding.activate(mesh):
        lowered = jax.jit(constrained).lower(x).as_text()
        inside = jax.jit(constrained)(x)
    wanted = 'sharding_constraint %0 <@mesh, [{"data", "fsdp"}, {"sequence"}, {"tensor"}, {}]>'
    assert wanted in lowered
    expected = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    assert inside.sharding.is_equivalent_to(expected, x.ndim)

    assert "sharding_constraint" not in jax.jit(constrained).lower(x).as_text()
    outside = jax.jit(constrained)(x)
    assert len(outside.sharding.device_set) == 1
    np.testing.assert_array_equal(np.asarray(inside), np.asarray(outside))


def test_every_logical_axis_is_one_of_the_mesh():
    for _, axes in sharding.ACTIVATIONS:
        assert set([axes] if isinstance(axes, str) else axes or ()) <= set(sharding.AXES)


def test_one_device_and_every_mesh_give_the_same_gradient():
    """A small network with rows, parameters and heads split in four ways."""

    def loss(w, x):
        h = nn.with_logical_constraint(jnp.tanh(x @ w["a"]), ("act_batch", "act_heads"))
        return jnp.mean((h @ w["b"]) ** 2)

    rng = np.random.default_rng(0)
    draw = lambda *s: rng.standard_normal(s).astype(np.float32)  # noqa: E731
    w, x = {"a": draw(8, 16), "b": draw(16, 4)}, {"x": draw(8, 8)}
    wanted = jax.grad(loss)(w, x["x"])
    for sizes in (dict(), dict(fsdp=8, data=1), dict(fsdp=2, tensor=2), dict(data=1, tensor=8)):
        mesh = sharding.make_mesh(**sizes)
        rules = [("a", ("fsdp", "tensor")), ("b", ("tensor", "fsdp"))]
        placed = sharding.specs(rules, w, mesh, lambda _: None)
        put = jax.tree.map(lambda v, s, m=mesh: jax.device_put(v, NamedSharding(m, s)), w, placed)
        with sharding.activate(mesh):
            got = jax.jit(jax.grad(loss))(put, sharding.put(x, mesh)["x"])
        for k in w:
            np.testing.assert_allclose(np.asarray(got[k]), wanted[k], rtol=1e-5, atol=1e-6)


def test_the_table_lists_shapes_dtypes_shardings_and_rates():
    shapes = {"a": {"kernel": shape(8, 8)}, "scale": shape()}
    placed = specs([("a/.*", (("data", "fsdp"), None)), (".*", ())], shapes)
    rates = {"a": {"kernel": 0.5}, "scale": 1.0}
    assert sharding.table(shapes, sharding=placed, lr=rates).splitlines() == [
        "name      shape   dtype    sharding      lr",
        "a/kernel  8x8     float32  data*fsdp, -  0.5",
        "scale     scalar  float32  replicated    1.0",
    ]


def test_prefetched_batches_land_on_the_mesh():
    mesh = sharding.make_mesh()
    batches = ({"valid": np.full(8, i % 2 == 0)} for i in range(3))
    with sharding.Prefetch(batches, partial(sharding.put, mesh=mesh)) as items:
        seen = [bool(b["valid"].all()) for b in items]
    assert seen == [True, False, True]
