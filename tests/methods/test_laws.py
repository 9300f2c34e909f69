"""The laws of tests/methods/laws.py for the case of every method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.configs import ROOT
from tests.methods import cases, laws
from tests.methods.cases import CASES
from tests.methods.laws import ROWS, close, draws, mixed
from vtp_jax import tree
from vtp_jax.run import sharding
from vtp_jax.run.checkpoint import Checkpoints
from vtp_jax.types import State

VALID = np.isin(np.arange(ROWS), (2, 5, 6), invert=True)


@pytest.fixture(params=CASES)
def made(request):
    return cases.made(request.param)


def test_every_method_has_a_case():
    methods = {p.stem for p in (ROOT / "vtp_jax/methods").glob("[a-z]*.py")}
    assert methods == {case.make.__module__.rpartition(".")[2] for case in CASES.values()}


def test_an_invalid_row_changes_nothing(made):
    good, other = made.case.batch(), made.case.batch(seed=7)
    zeros = {k: np.zeros_like(v) for k, v in good.items()}
    wanted = made.step({**good, "valid": VALID})
    for filler in (other, zeros):
        found = made.step({**mixed(VALID, good, filler), "valid": VALID})
        close(found, wanted)
    assert abs(made.step(good).value - wanted.value) > 1e-4  # valid rows count


def test_a_batch_without_a_valid_row_has_no_loss_and_finite_gradients(made):
    found = made.step({**made.case.batch(), "valid": np.zeros(ROWS, bool)})
    assert found.value == 0
    for name, leaf in tree.flatten(found).items():
        assert np.isfinite(leaf).all(), name


def test_the_key_determines_all_randomness(made):
    one, same, other = (made.step(made.case.batch(), seed=seed).value for seed in (0, 0, 1))
    assert one == same
    assert (abs(one - other) > 1e-5) == made.case.random


def test_dropout_is_drawn_in_training_and_not_in_encoding(made):
    """A key that is not passed down raises no error; masks alone make two keys' losses differ."""
    rates = [name for name in ("dropout", "drop_path") if made.case.takes(name)]
    on = made.case.build(**dict.fromkeys(rates, 0.3))
    if "dropout" in rates:
        off = made.case.build(dropout=0.0)
        assert draws(made.trace(on)[0]) > draws(made.trace(off)[0])
    if "drop_path" in rates:
        assert draws(made.trace(on)[0], "scan")
    assert draws(jax.make_jaxpr(made.encode)(made.case.batch())) == 0


def test_the_loss_is_the_weighted_sum_of_its_terms(made):
    found = made.step(made.case.batch())
    weights = made.case.cfg.get("weights") or dict.fromkeys(found.losses(), 1.0)
    assert found.losses().keys() == weights.keys()
    told = sum(weights[name] * value for name, value in found.losses().items())
    np.testing.assert_allclose(found.value, told, rtol=1e-5)
    assert all(abs(x) > 1e-3 for x in found.losses().values())


def test_a_loss_of_weight_0_is_not_computed(made):
    weights = made.case.cfg.get("weights", {})
    for off in weights.keys() - set(made.case.always):
        _, metrics = made.trace(made.case.build(weights={**weights, off: 0.0}))
        asked = {name for name in metrics if name.startswith("loss_")}
        assert asked == {f"loss_{name}" for name in weights if name != off}


def test_a_group_equals_a_separate_batch(made):
    assert ("groups" in made.case.cfg) == bool(made.case.grouped)
    if not made.case.grouped:
        return
    batch, first = made.case.batch(), np.arange(ROWS) < ROWS // 2
    each = (first | True, first, ~first)
    whole, *parts = (made.step({**batch, "valid": valid}).out.metrics for valid in each)
    for name in made.case.grouped:
        told = (parts[0][f"loss_{name}"] + parts[1][f"loss_{name}"]).value()
        np.testing.assert_allclose(whole[f"loss_{name}"].value(), told, rtol=1e-5, err_msg=name)


def test_text_padding_changes_nothing(made):
    if not made.case.text:
        return
    batch = made.case.batch()
    other = np.where(batch["text_mask"], batch["text"], laws.WORDS["vocab_size"] - 1)
    assert (other != batch["text"]).any()
    close(made.step({**batch, "text": other.astype(np.int32)}), made.step(batch))
    longer = {k: np.pad(v, [*[(0, 0)] * (v.ndim - 1), (0, 1)]) for k, v in batch.items()
              if k in ("text", "text_mask")}  # fmt: skip
    found = jax.jit(made.method.encode["text"])(made.params, made.extra, longer)
    wanted = made.encode(batch)["text"]
    close(found["embedding"], wanted["embedding"])


def test_an_encoded_row_depends_on_that_row_alone(made):
    batch, other = made.case.batch(), made.case.batch(seed=7)
    own = np.arange(ROWS) == 3
    alone, among = made.encode(batch), made.encode(mixed(own, batch, other))
    for name, found in alone.items():
        assert found["embedding"].dtype == np.float32 and found["embedding"].ndim == 2
        wanted, got = (jax.tree.map(lambda x: x[own], x) for x in (found, among[name]))
        close(got, wanted)
        apart = np.abs(found["embedding"] - among[name]["embedding"])[~own].max(axis=1)
        assert (apart > 1e-5).all(), name


def test_a_step_keeps_types(made):
    found = made.step(made.case.batch())
    for new, old in ((found.params, made.params), (found.extra, made.extra)):
        a, b = (jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in (new, old))
        assert a == b


def test_eight_devices_give_the_loss_of_one(made):
    found, placed = made.on(sharding.make_mesh(data=2, fsdp=2, tensor=2), made.method.loss)
    wanted = made.step(made.case.batch())
    close(found, (wanted.value, wanted.out))
    spread = [x for x in jax.tree.leaves(placed) if not x.sharding.is_fully_replicated]
    assert tree.size(spread) > 0.5 * tree.size(placed)


SLOW = pytest.mark.slow(reason="a gradient over devices compiles for three times as long as a loss")
GRADED = [name if name == "videomae" else pytest.param(name, marks=SLOW) for name in CASES]


@pytest.mark.parametrize("name", GRADED)
def test_eight_devices_give_the_gradients_and_the_update_of_one(name):
    made = cases.made(name)
    found, _ = made.on(sharding.make_mesh(data=2, fsdp=2, tensor=2), made.run)
    close(found, made.step(made.case.batch()), rtol=1e-4, atol=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(made, tmp_path):
    def train(state, seeds):
        for seed in seeds:
            found = made.step(made.case.batch(seed), state.params, state.extra, seed)
            state = State(np.int32(seed + 1), found.params, {}, found.extra)
        return state

    whole = train(half := train(State(np.int32(0), made.params, {}, made.extra), (0, 1)), (2, 3))
    with Checkpoints(tmp_path, every=1) as saved:
        saved.save(2, jax.tree.map(jnp.asarray, half))
    with Checkpoints(tmp_path, every=1) as saved:
        again = saved.restore_latest(jax.eval_shape(lambda: half))
    close(train(again, (2, 3)), whole, rtol=0, atol=0)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole.params, half.params)
    assert max(jax.tree.leaves(moved)) > 1e-4
