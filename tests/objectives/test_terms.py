"""Weights, choices and the sum of loss terms."""

import jax.numpy as jnp
import pytest

from vtp_jax.objectives import terms
from vtp_jax.types import Mean, UserError

DEFAULTS = dict(a=1.0, b=2.0)


def test_weights_replace_the_defaults():
    assert terms.weights(None, DEFAULTS) == DEFAULTS
    assert list(terms.weights(dict(b=0.5), DEFAULTS).items()) == [("a", 1.0), ("b", 0.5)]
    with pytest.raises(UserError, match="^method.weights: no loss 'c'; known: a, b$"):
        terms.weights(dict(c=1.0), DEFAULTS)


def test_choices_are_checked():
    assert terms.choose("mask", "tubes", ("tubes", "tokens")) == "tubes"
    with pytest.raises(UserError, match="^method.mask='tube'; known: tubes, tokens$"):
        terms.choose("mask", "tube", dict(tubes=1, tokens=2))
    with pytest.raises(UserError, match="^config.task.pool='x'; known: y$"):
        terms.choose("pool", "x", ["y"], "config.task")


def test_the_total_is_the_weighted_sum_of_the_terms_with_a_weight():
    found = {"loss_a": Mean.of(jnp.array([1.0, 3.0])), "accuracy": Mean.of(jnp.array([100.0]))}
    assert terms.total(found, dict(a=0.5, b=0.0)) == 1.0
    with pytest.raises(KeyError, match="loss_b"):
        terms.total(found, DEFAULTS)
    found["loss_b"] = Mean.of(jnp.array([10.0]))
    assert terms.total(found, dict(a=0.5, b=0.25)) == 3.5
    assert terms.total(found, dict(a=0.0, b=0.0)) == 0.0
