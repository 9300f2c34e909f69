"""Queues against a list, alone and split over devices; moving averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import hlo
from vtp_jax.objectives import queue
from vtp_jax.run import sharding
from vtp_jax.types import UserError

COLUMNS = dict(
    feature=jax.ShapeDtypeStruct((2,), jnp.float32), label=jax.ShapeDtypeStruct((), jnp.int32)
)


def rows(start, b):
    label = jnp.arange(start, start + b, dtype=jnp.int32)
    return dict(feature=jnp.stack([label, -label], axis=1).astype(jnp.float32), label=label)


@settings(max_examples=10)
@given(st.integers(1, 5), st.lists(st.lists(st.booleans(), min_size=1, max_size=5), max_size=5))
def test_a_queue_is_a_list_of_the_last_rows(size, batches):
    kept, seen, q = [], 1, queue.init(size, **COLUMNS)
    for valid in (v[:size] for v in batches):
        new = rows(seen, len(valid))
        q = queue.push(q, new, jnp.array(valid))
        kept = [*kept, *zip(np.asarray(new["label"]), valid, strict=True)][-size:]
        seen += len(valid)
        # From `next` on, places run from the oldest row to the newest.
        order = (np.arange(size) + int(q["next"])) % size if len(kept) == size else slice(len(kept))
        real = np.asarray(q["real"])[order]
        np.testing.assert_array_equal(real, [v for _, v in kept])
        np.testing.assert_array_equal(
            np.asarray(q["label"])[order], [n if v else 0 for n, v in kept]
        )
        np.testing.assert_array_equal(np.asarray(q["feature"])[order][:, 0], q["label"][order])
    assert int(q["real"].sum()) == sum(v for _, v in kept)


def test_invalid_rows_are_stored_as_zeros_that_are_not_real():
    new = rows(5, 3)
    bad = dict(new, feature=new["feature"].at[1].set(jnp.nan))
    q = queue.push(queue.init(4, **COLUMNS), bad, jnp.array([True, False, True]))
    np.testing.assert_array_equal(q["real"], [True, False, True, False])
    np.testing.assert_array_equal(q["feature"], [[5, -5], [0, 0], [7, -7], [0, 0]])


def test_types_are_kept_and_gradients_are_stopped():
    q = queue.init(6, feature=jax.ShapeDtypeStruct((2,), jnp.float32))

    def f(x):
        pushed = queue.push(q, dict(feature=x), jnp.ones(4, bool))
        return pushed["feature"].sum().astype(jnp.float32), pushed

    x = jnp.ones((4, 2), jnp.bfloat16)
    (_, pushed), gradient = jax.value_and_grad(f, has_aux=True)(x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), pushed) == jax.tree.map(
        lambda a: (a.shape, a.dtype), q
    )
    assert not gradient.any()


def test_groups_are_queues_one_after_another():
    valid = jnp.array([True, True, False, True, True, True])
    both, parts = queue.init(10, **COLUMNS), [queue.init(5, **COLUMNS)] * 2
    for start in (1, 7, 13):  # wraps around
        new = rows(start, 6)
        both = queue.push(both, new, valid, groups=2)
        for i, rank in enumerate((slice(0, 3), slice(3, 6))):
            mine = {name: x[rank] for name, x in new.items()}
            parts[i] = queue.push(parts[i], mine, valid[rank])
    for name in ("feature", "label", "real"):
        np.testing.assert_array_equal(both[name], jnp.concatenate([q[name] for q in parts]))
    assert both["next"] == parts[0]["next"] == parts[1]["next"] == 4
    with pytest.raises(UserError, match="do not divide into groups=4"):
        queue.push(both, rows(0, 6), valid, groups=4)


def test_a_batch_larger_than_the_queue_is_an_error():
    with pytest.raises(UserError, match="3 places cannot take a batch of 4"):
        queue.push(queue.init(3, **COLUMNS), rows(0, 4), jnp.ones(4, bool))


def test_split_over_devices_only_the_new_rows_move():
    mesh, size, d, b = sharding.make_mesh(data=8), 4096, 16, 8
    q = queue.init(size, feature=jax.ShapeDtypeStruct((d,), jnp.float32))
    split = sharding.batch_sharding(mesh)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = dict(feature=split, real=split, next=whole)
    push = jax.jit(queue.push, in_shardings=(placed, split, split), out_shardings=placed)
    new = dict(feature=jnp.arange(b * d, dtype=jnp.float32).reshape(b, d))
    q = {**q, "next": jnp.int32(size - 3)}  # the batch wraps around
    valid = jnp.ones(b, bool)
    compiled = push.lower(q, new, valid).compile()
    assert hlo.most_moved(compiled.as_text()) <= b * d  # the gathered batch, never the queue
    one, many = queue.push(q, new, valid), push(q, new, valid)
    jax.tree.map(np.testing.assert_array_equal, one, many)
