"""Decoding with a made-up net whose logits depend on all previous tokens through the cache alone: a
cache that is lost, late or another line's changes them."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtp_jax.nn import generate

V, LENGTH, END, PAD = 4, 5, 1, 0


def make_weights(seed):
    rng = np.random.default_rng(seed)
    table = jnp.asarray(rng.normal(size=(LENGTH, V, 6)), jnp.float32)
    return table, jnp.asarray(2 * rng.normal(size=(6, V)), jnp.float32)


def step(weights, cache, token, place):
    """The cache holds a vector for each position; their sum determines the next logits."""
    table, out = weights
    own = jnp.arange(LENGTH)[:, None] == place[:, None, None]
    said = jnp.where(own, table[place, token][:, None], cache["said"])
    before = jnp.where(jnp.arange(LENGTH)[:, None] <= place[:, None, None], said, 0)
    return jnp.tanh(before.sum(axis=1)) @ out, dict(said=said)


@jax.jit
def greedy(weights, *begun):
    return generate.greedy(partial(step, weights), *begun, end_id=END, pad_id=PAD)


@partial(jax.jit, static_argnames=("beams", "penalty"))
def beam(weights, *begun, beams, penalty=1.0):
    more = dict(beams=beams, penalty=penalty, end_id=END, pad_id=PAD)
    return generate.beam(partial(step, weights), *begun, **more)


def log_p(weights, ids):
    """Log probabilities after the tokens `ids`, without a cache."""
    table, out = (np.asarray(w, np.float64) for w in weights)
    logits = np.tanh(sum(table[i, t] for i, t in enumerate(ids))) @ out
    return logits - np.log(np.exp(logits).sum())


def begin(weights, prompts):
    """The rows, the lengths of their prompts, and a cache of every prompt token but the last; the
    rest of the cache is garbage."""
    ids = np.full((len(prompts), LENGTH), 3, np.int32)
    said = np.full((len(prompts), LENGTH, 6), 7.0, np.float32)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)] = prompt
        for j, token in enumerate(prompt[:-1]):
            said[i, j] = weights[0][j, token]
    start = jnp.asarray([len(p) for p in prompts], jnp.int32)
    return dict(said=jnp.asarray(said)), jnp.asarray(ids), start


def lines(prompt):
    """Every continuation of a prompt: those that end, and those that fill the row."""
    words = [w for w in range(V) if w != END]
    for n in range(LENGTH - len(prompt) + 1):
        for middle in itertools.product(words, repeat=n):
            if n < LENGTH - len(prompt):
                yield (*prompt, *middle, END)
            else:
                yield (*prompt, *middle)


def score(weights, prompt, line, penalty):
    n = len(line) - len(prompt)
    total = sum(log_p(weights, line[:i])[line[i]] for i in range(len(prompt), len(line)))
    return total / n**penalty if n else 0.0


def padded(line):
    return [*line, *[PAD] * (LENGTH - len(line))]


PROMPTS = st.lists(
    st.lists(st.integers(2, V - 1), min_size=1, max_size=LENGTH).map(tuple), min_size=3, max_size=3
)


@given(seed=st.integers(0, 10**6), prompts=PROMPTS)
def test_greedy_takes_the_most_likely_token_at_every_position(seed, prompts):
    weights = make_weights(seed)
    said = greedy(weights, *begin(weights, prompts))
    for i, prompt in enumerate(prompts):
        line = tuple(prompt)
        while len(line) < LENGTH and line[-1] != END:
            line = (*line, int(np.argmax(log_p(weights, line))))
        assert said.ids[i].tolist() == padded(line)
        assert float(said.score[i]) == pytest.approx(score(weights, prompt, line, 0), abs=1e-4)


@given(seed=st.integers(0, 10**6), prompts=PROMPTS, penalty=st.sampled_from([0.0, 0.7, 1.0]))
def test_with_enough_beams_the_search_is_exhaustive(seed, prompts, penalty):
    weights = make_weights(seed)
    said = beam(weights, *begin(weights, prompts), beams=3**3, penalty=penalty)
    for i, prompt in enumerate(prompts):
        scores = {line: score(weights, prompt, line, penalty) for line in lines(prompt)}
        found = tuple(int(t) for t in said.ids[i])
        (line,) = [x for x in scores if padded(x) == list(found)]
        assert float(said.score[i]) == pytest.approx(max(scores.values()), abs=1e-4)
        assert float(said.score[i]) == pytest.approx(scores[line], abs=1e-4)


@given(seed=st.integers(0, 10**6), prompts=PROMPTS, beams=st.integers(1, 4))
def test_few_beams_find_what_a_plain_beam_search_finds(seed, prompts, beams):
    weights = make_weights(seed)
    said = beam(weights, *begin(weights, prompts), beams=beams)
    for i, prompt in enumerate(prompts):
        live, best = [(0.0, prompt)], (-np.inf if len(prompt) < LENGTH else 0.0)
        for n in range(1, LENGTH - len(prompt) + 1):
            after = [(total, line, log_p(weights, line)) for total, line in live]
            best = max([best, *((total + p[END]) / n for total, _, p in after)])
            onward = [
                (total + p[w], (*line, w)) for total, line, p in after for w in range(V) if w != END
            ]
            live = sorted(onward, reverse=True)[:beams]
        if len(prompt) < LENGTH:
            best = max([best, *(total / (LENGTH - len(prompt)) for total, _ in live)])
        assert float(said.score[i]) == pytest.approx(best, abs=1e-4)


def test_a_row_depends_on_itself_alone_and_rows_may_be_any_axis_of_the_cache():
    weights = make_weights(5)
    cache, ids, start = begin(weights, [(2,), (3, 2), (2, 3, 3)])

    def stacked(cache, token, place):
        logits, new = step(weights, dict(said=cache["said"][0]), token, place)
        return logits, dict(said=new["said"][None])

    whole = beam(weights, cache, ids, start, beams=2)
    more = dict(beams=2, end_id=END, pad_id=PAD, axis=1)
    layers = generate.beam(stacked, dict(said=cache["said"][None]), ids, start, **more)
    assert whole.ids.tolist() == layers.ids.tolist()
    for i in range(3):
        row = dict(said=cache["said"][i : i + 1])
        alone = beam(weights, row, ids[i : i + 1], start[i : i + 1], beams=2)
        assert alone.ids[0].tolist() == whole.ids[i].tolist()
        np.testing.assert_allclose(alone.score[0], whole.score[i], rtol=1e-6)
