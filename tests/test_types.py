"""The contract's own laws: means that merge, batches that are checked."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtp_jax.types import Mean, Method, UserError, assemble, check_batch, made_of, wide

numbers = st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), max_size=8)


def mean(rows) -> Mean:
    values = jnp.asarray([v for v, _ in rows], jnp.float32)
    return Mean.of(values, jnp.asarray([w for _, w in rows], bool))


@given(numbers, numbers, numbers)
def test_merged_means_are_the_whole(a, b, c):
    """For any partition and order, the mean is that of all counted entries."""
    counted = [v for v, w in a + b + c if w]
    wanted = np.mean(counted) if counted else 0.0
    for merged in (mean(a) + mean(b) + mean(c), mean(c) + (mean(a) + mean(b)), mean(a + b + c)):
        assert merged.count == len(counted)
        np.testing.assert_allclose(merged.value(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_entries_that_are_not_counted_may_hold_anything(bad):
    found = Mean.of(jnp.asarray([1.0, bad, 3.0]), jnp.asarray([True, False, True]))
    assert found.value() == 2.0
    assert Mean.of(jnp.asarray([bad]), jnp.asarray([False])).value() == 0.0


def test_means_are_summed_in_fp32_at_least():
    ones = Mean.of(jnp.ones(4096, jnp.bfloat16))
    assert ones.total.dtype == ones.count.dtype == jnp.float32
    assert ones.total == ones.count == 4096  # bf16 would stop at 256


@pytest.mark.parametrize(
    "given, wanted",
    [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64"), ("int8", "float32")],
)
def test_wide_is_fp32_or_wider(given, wanted):
    with jax.enable_x64(True):
        assert wide(jnp.ones(2, given)).dtype == wanted


def build(*, rate: float, size: int = 3):
    """Some documentation."""
    return ("net", size), ("recipe", rate)


def test_assemble_puts_net_and_recipe_before_the_arguments_of_a_method():
    def echo(*args):
        return args

    @made_of(build)
    def make(**cfg) -> Method:
        return assemble(*build(**cfg), init=echo, loss=echo, encode=dict(video=echo), start=echo)

    both = (("net", 3), ("recipe", 0.5))
    method = make(rate=0.5)
    assert method.init(1, 2) == method.loss(1, 2) == method.encode["video"](1, 2) == (*both, 1, 2)
    assert method.start(1, 2, 3) == (*both, 1, 2, 3)
    assert method.after_update({"w": 1}, {}, jnp.zeros(())) == ({"w": 1}, {})
    with_update = assemble(*both, init=echo, loss=echo, encode={}, after_update=echo)
    assert with_update.after_update(1, 2, 3) == (*both, 1, 2, 3)
    assert with_update.start(jax.random.key(0), {}, {}) == {}


def test_make_has_the_signature_and_the_documentation_of_build():
    @made_of(build)
    def make(**cfg) -> Method:
        """Not this."""
        return cfg

    assert inspect.signature(make).parameters == inspect.signature(build).parameters
    assert make.__doc__ == build.__doc__ and make.__name__ == "make"
    assert make(rate=1, size=2) == dict(rate=1, size=2)


def batch(**changes):
    good = {
        "valid": np.ones(4, bool),
        "video": np.zeros((4, 2, 8, 8, 3), np.uint8),
        "text": np.zeros((4, 6), np.int32),
        "text_mask": np.ones((4, 6), bool),
    }
    return {k: v for k, v in {**good, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(video=np.zeros((4, 3, 2, 8, 8, 3), np.uint8)),  # several views
        dict(video=np.zeros((4, 2, 8, 8, 3), np.float32)),  # pixels of a parity run
        dict(text=np.zeros((4, 5, 6), np.int32), text_mask=np.zeros((4, 5, 6), bool)),
        dict(video=None, text=None, text_mask=None),
        dict(id=np.arange(4, dtype=np.int32), label=np.zeros(4, np.int32)),
    ],
)
def test_good_batches_pass(changes):
    check_batch(batch(**changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(valid=None), "no key 'valid'"),
        (dict(vidoe=np.zeros(4)), "unknown key 'vidoe'"),
        (dict(weight=np.ones(4, np.float32)), "unknown key 'weight'"),  # no loss reads one
        (dict(video=np.zeros((3, 2, 8, 8, 3), np.uint8)), "with 4 rows"),
        (dict(video=np.zeros((4, 8, 8, 3), np.uint8)), "must be uint8 'b \\[v\\] t h w c'"),
        (dict(video=np.zeros((4, 2, 8, 8, 3), np.int32)), "is int32"),
        (dict(text=np.zeros((4, 6), np.int64)), "is int64\\(4, 6\\)"),
        (dict(text=np.zeros((4, 6), np.float32)), "is float32"),
        (dict(text=np.zeros((4, 2, 2, 6), np.int32)), "must be int32"),
        (dict(text_mask=np.ones((4, 6), np.int32)), "must be bool"),
        (dict(valid=np.ones(4, np.float32)), "must be bool"),
    ],
)
def test_bad_batches_are_errors(changes, words):
    with pytest.raises(UserError, match=words) as raised:
        check_batch(batch(**changes), "the train stream")
    assert str(raised.value).startswith("the train stream")
    assert "\n" not in str(raised.value)
