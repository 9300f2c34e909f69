"""Names of leaves and rules on them."""

import string

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtp_jax import tree
from vtp_jax.types import State, UserError

words = st.text(string.ascii_lowercase, min_size=1, max_size=3)
trees = st.dictionaries(
    words,
    st.recursive(
        st.integers(), lambda inner: st.dictionaries(words, inner, min_size=1, max_size=3)
    ),
    min_size=1,
    max_size=4,
)


def test_names_are_paths():
    params = {"blocks": {"qkv": {"kernel": 0}}, "tokens": [1, 2]}
    state = State(3, params, optax.adam(1.0).init({"w": jnp.zeros(2)}), {})
    assert list(tree.flatten(state)) == [
        "step",
        "params/blocks/qkv/kernel",
        "params/tokens/0",
        "params/tokens/1",
        "opt/0/count",
        "opt/0/mu/w",
        "opt/0/nu/w",
    ]
    assert tree.names(params) == {
        "blocks": {"qkv": {"kernel": "blocks/qkv/kernel"}},
        "tokens": ["tokens/0", "tokens/1"],
    }


@given(trees)
def test_flatten_has_the_order_of_the_leaves(nested):
    flat = tree.flatten(nested)
    assert list(flat.values()) == jax.tree.leaves(nested)
    assert list(flat) == jax.tree.leaves(tree.names(nested))
    assert tree.map_named(lambda name, leaf: (name, leaf)[1], nested) == nested


@given(trees, st.data())
def test_merge_undoes_split(nested, data):
    names = list(tree.flatten(nested))
    chosen = set(data.draw(st.lists(st.sampled_from(names))))
    took, rest = tree.split(nested, lambda name: name in chosen)
    assert set(tree.flatten(took)) == chosen
    assert set(tree.flatten(rest)) == set(names) - chosen
    assert tree.merge(took, rest) == nested == tree.merge(rest, took)


def test_merging_overlapping_trees_is_an_error():
    with pytest.raises(ValueError, match="a/b"):
        tree.merge({"a": {"b": 1}}, {"a": {"b": 2}})


def test_the_first_rule_wins_and_matches_the_whole_name():
    rules = [("a/.*bias", dict(wd=0.0)), ("a/.*", (None, "fsdp")), (".*", [])]
    nested = {"a": {"bias": 1, "bias2": 2}, "ba": {"bias": 3}}
    assert tree.match(rules, nested) == {
        "a": {"bias": dict(wd=0.0), "bias2": (None, "fsdp")},
        "ba": {"bias": []},
    }


@pytest.mark.parametrize(
    "rules, words",
    [
        ([("a", 0)], "no rule covers 'b'"),
        ([(".*", 0), ("a", 1)], "'a' matches nothing"),
        ([("A", 0), (".*", 1)], "'A' matches nothing"),
        ([("(", 0)], "not a regular expression"),
    ],
)
def test_wrong_rules_are_errors(rules, words):
    with pytest.raises(UserError, match=words) as raised:
        tree.match(rules, {"a": 1, "b": 2}, "config.optim.rules")
    assert str(raised.value).startswith("config.optim.rules: ")


def test_rules_without_a_match_may_be_allowed():
    assert tree.match([("a", 0), ("z", 1)], {"a": 5}, idle_ok=True) == {"a": 0}


def test_size_counts_numbers():
    assert tree.size({"a": jnp.zeros((2, 3)), "b": [np.zeros(4), jnp.zeros(())]}) == 11
