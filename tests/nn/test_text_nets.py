"""Laws of CLIP's text tower and of BERT. tests/torch compares their numbers with `transformers`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import fill
from vtp_jax import tree
from vtp_jax.nn import sizes, text
from vtp_jax.types import UserError

KEY = jax.random.key(0)
SIZE = sizes.Size(16, 2, 2, 32)
IDS = jnp.array([[8, 3, 5, 9, 0, 0], [8, 2, 9, 0, 0, 0]])


def but(places, values, ids=IDS):
    """ids with other words at some places."""
    other = np.array(ids)
    other[:, places] = values
    return other


@functools.cache
def called(net):
    return jax.jit(net.apply)


@functools.cache
def clip():
    net = text.CausalText(SIZE, 4, 10, 6)
    return net, jax.tree.map(jnp.asarray, fill(net.init, KEY, IDS))


@functools.cache
def bert():
    net = text.Bert(SIZE, vocab_size=10, length=8)
    return net, jax.tree.map(jnp.asarray, fill(net.init, KEY, IDS))


def test_no_token_of_clip_attends_to_later_ones():
    net, params = clip()
    encode = jax.jit(lambda ids: net.apply(params, ids, method="encode"))
    a, b = np.asarray(encode(IDS)), np.asarray(encode(but(slice(3, None), [4, 7, 1])))
    assert (a[:, :3] == b[:, :3]).all() and not (a[:, 3:] == b[:, 3:]).all(axis=(1, 2)).any()


def test_clip_pools_the_end_token_whatever_padding_follows():
    net, params = clip()
    run, ids = called(net), np.asarray(IDS)
    whole = np.asarray(run(params, ids))
    assert whole.shape == (2, 4)
    np.testing.assert_allclose(run(params, ids[1:, :3]), whole[1:], atol=1e-6)
    named = text.CausalText(SIZE, 4, 10, 6, end_id=9)
    assert (np.asarray(called(named)(params, ids)) == whole).all()
    # With another word as the end, the vector is that of the text up to it.
    third = text.CausalText(SIZE, 4, 10, 6, end_id=5)
    a, b = (np.asarray(called(third)(params, x)) for x in (ids[:1], ids[:1, :3]))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert not (a == whole[:1]).any()


@pytest.mark.parametrize("make", [clip, bert])
def test_every_parameter_is_used(make):
    net, params = make()

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(net.apply(params, IDS) ** 2)

    found = tree.flatten(jax.device_get(gradient(params)["params"]))
    assert all(g.any() for g in found.values()), [n for n, g in found.items() if not g.any()]


def test_bert_attends_in_both_directions_but_to_no_masked_word():
    net, params = bert()
    run = jax.jit(lambda ids, mask: net.apply(params, ids, mask, method="encode"))

    def encode(ids, mask):
        return np.asarray(run(ids, np.asarray(mask)))

    mask = np.asarray(IDS) > 0
    a, b = encode(IDS, mask), encode(but(slice(4, None), 7), mask)
    assert (a[:, :4] == b[:, :4]).all()
    assert not (a[:, 0] == encode(but(2, 7), mask)[:, 0]).any()
    causal = text.causal(IDS.shape[1])
    late = but(slice(3, None), 7)
    assert (encode(IDS, causal)[:, :3] == encode(late, causal)[:, :3]).all()


def test_bert_drops_out_only_with_a_key():
    net, params = bert()
    never = text.Bert(SIZE, vocab_size=10, length=8, dropout=0.0)
    a, b = (np.asarray(called(x)(params, IDS)) for x in (net, never))
    assert (a == b).all()
    run = jax.jit(lambda k: net.apply(params, IDS, rngs={"dropout": k}))
    assert not (np.asarray(run(KEY)) == np.asarray(run(jax.random.key(1)))).any()


def test_bert_has_cross_attention_parameters_if_init_is_given_other_tokens():
    net, params = bert()
    other = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 24)), jnp.float32)
    wider = fill(net.init, KEY, IDS, None, other)
    added = tree.flatten(wider).keys() - tree.flatten(params).keys()
    assert {n.split("/")[3] for n in added} == {"cross", "norm_cross"}
    run, mask = called(net), np.array([[True, True, False]] * 2)
    alone, fused, a, b = (
        np.asarray(run(wider, IDS, *rest))
        for rest in (
            (),
            (None, other, np.ones_like(mask)),
            (None, other, mask),
            (None, but(2, 9.0, other), mask),
        )
    )
    assert not (alone == fused).any()
    assert (a == b).all()


def test_texts_longer_than_the_position_table_are_rejected():
    net, _ = clip()
    with pytest.raises(UserError, match="7 tokens; the table has 6"):
        net.init(KEY, jnp.zeros((1, 7), jnp.int32))


def test_parameter_counts_are_the_published_ones():
    """BERT-base, and CLIP's text tower for B/16: CLIP's 149,620,737 less the image tower's
    86,192,640 and the scale."""
    ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)
    nets = {
        109_482_240: text.Bert(sizes.ENCODERS["B"]),
        63_428_096: text.CausalText(sizes.TEXTS["B"], 512),
    }
    for number, net in nets.items():
        shapes = jax.eval_shape(net.init, KEY, ids)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == number
