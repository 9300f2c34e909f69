"""The laws of tests/methods/laws.py for the case of every method."""

from inspect import signature

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

TEXTS = [name for name, case in CASES.items() if case.text]
WEIGHTED = [name for name, case in CASES.items() if "weights" in signature(case.make).parameters]
GROUPED = [name for name, case in CASES.items() if case.grouped or "groups" in case.cfg]
VALID = np.isin(np.arange(ROWS), (2, 5, 6), invert=True)


@pytest.fixture(params=CASES)
def made(request):
    return cases.made(request.param)


def test_every_method_has_a_case():
    methods = {p.stem for p in (ROOT / "vtp_jax/methods").glob("[a-z]*.py")}
    without = methods - {case.method for case in CASES.values()}
    assert not without, f"add a Case to tests/methods/cases.py for {sorted(without)}"


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
    if made.case.random:
        lacking = "random=False in the Case if the loss draws nothing; otherwise it ignores its key"
        assert abs(one - other) > 1e-5, f"two keys give one loss: {lacking}"
    else:
        assert abs(one - other) <= 1e-5, "two keys give two losses, in spite of random=False"


def test_every_rate_acts_in_training(made):
    """A key that is not passed down raises no error; masks alone make two keys' losses differ."""
    rates = made.case.rates()
    on = made.training(made.case.dropping()) if rates else ""
    for rate in rates:
        same = on == made.training(made.case.dropping(rate))
        assert not same, (
            f"{rate} does not act in training: the net needs it and a key, drop path two blocks "
            "(DEEP); what is no rate of dropping needs a name without 'drop'"
        )


def test_every_rate_acts_in_a_verb_that_is_given_a_key(made):
    """Tasks train through the verbs. Where a rate acts on a verb's net once this has a key, it acts
    without that help."""
    rates = made.case.rates()
    off, acting = {rate: made.case.dropping(rate) for rate in rates}, set()
    for verb in made.verbs if rates else ():
        alone, helped = (made.verb(made.case.dropping(), verb, helped=h) for h in (False, True))
        for rate in rates:
            if helped != made.verb(off[rate], verb, helped=True):
                acting.add(rate)
                same = alone == made.verb(off[rate], verb)
                assert not same, f"encode[{verb!r}] ignores its rng: {rate} does not act there"
    assert acting or not rates, f"{rates} act in none of {made.verbs}"


def test_nothing_is_drawn_without_a_key(made):
    assert draws(jax.make_jaxpr(made.encoders)(*made.encoder_args())) == 0


def test_the_loss_is_the_weighted_sum_of_its_terms(made):
    found = made.step(made.case.batch())
    weights = made.case.cfg.get("weights") or dict.fromkeys(found.losses(), 1.0)
    wrong = f"each loss needs a metric `loss_<name>`; the metrics are {sorted(found.out.metrics)}"
    assert weights and found.losses().keys() == weights.keys(), wrong
    told = sum(weights[name] * value for name, value in found.losses().items())
    np.testing.assert_allclose(found.value, told, rtol=1e-5, err_msg=wrong)
    assert all(abs(x) > 1e-3 for x in found.losses().values())


@pytest.mark.parametrize("made", WEIGHTED, indirect=True)
def test_a_loss_of_weight_0_is_not_computed(made):
    weights = made.case.cfg.get("weights", {})
    asked = weights.keys() - set(made.case.always)
    assert asked, "give the Case `weights`, of which some loss is not in `always`"
    for off in asked:
        metrics = made.metrics(made.case.build(weights={**weights, off: 0.0}))
        told = {name for name in metrics if name.startswith("loss_")}
        assert told == {f"loss_{name}" for name in weights if name != off}


@pytest.mark.parametrize("made", GROUPED, indirect=True)
def test_a_group_equals_a_separate_batch(made):
    assert "groups" in made.case.cfg and made.case.grouped, "a Case has both or neither"
    batch, first = made.case.batch(), np.arange(ROWS) < ROWS // 2
    each = (first | True, first, ~first)
    whole, *parts = (made.step({**batch, "valid": valid}).out.metrics for valid in each)
    for name in made.case.grouped:
        told = (parts[0][f"loss_{name}"] + parts[1][f"loss_{name}"]).value()
        np.testing.assert_allclose(whole[f"loss_{name}"].value(), told, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("made", TEXTS, indirect=True)
def test_text_padding_changes_nothing(made):
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
