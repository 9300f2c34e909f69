"""Joint sequences of video and text: which tokens attend to which, and several passes
in one batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import fill
from vtp_jax.nn import joint, sizes
from vtp_jax.nn.transformer import Stack

K, L = 3, 4


@functools.cache
def given():
    """(run, video, text, text_mask); row 0 has two words of padding."""
    rng = np.random.default_rng(0)
    video, text = (jnp.asarray(rng.standard_normal((2, n, 16)), jnp.float32) for n in (K, L))
    stack = Stack(sizes.Size(16, 2, 2, 24))
    params = fill(stack.init, jax.random.key(0), video)
    run = jax.jit(lambda x, mask: stack.apply(params, x, mask))
    return run, video, text, jnp.array([[True, True, False, False], [True] * 4])


def encoded(mask, video=None, text=None):
    run, v, t, words = given()
    video, text = v if video is None else video, t if text is None else text
    return np.asarray(run(joint.join(video, text), mask(K, words)))


def test_apart_encodes_each_modality_alone():
    run, video, text, words = given()
    found = encoded(joint.apart)
    np.testing.assert_allclose(found[:, :K], run(video, None), atol=1e-5)
    own = np.asarray(run(text, words))
    np.testing.assert_allclose(found[:, K:][words], own[words], atol=1e-5)


@pytest.mark.parametrize("mask", [joint.together, joint.apart, joint.prefix])
def test_padding_changes_no_real_token(mask):
    _, _, text, words = given()
    real = np.asarray(joint.real(K, words))
    other = jnp.where(words[..., None], text, 9.0)
    np.testing.assert_array_equal(encoded(mask)[real], encoded(mask, text=other)[real])


def test_together_every_token_depends_on_both_modalities():
    _, video, text, _ = given()
    a = encoded(joint.together)
    assert (a != encoded(joint.together, video=-video)).any(axis=-1).all()
    assert (a != encoded(joint.together, text=-text)).any(axis=-1)[1].all()


def test_prefix_is_causal_in_the_text_and_hides_text_from_the_video():
    _, video, text, _ = given()
    a = encoded(joint.prefix)
    for j in range(L):
        b = encoded(joint.prefix, text=text.at[1, j].set(5.0))
        same = (a == b).all(axis=-1)[1]
        assert same[: K + j].all() and not same[K + j :].any()
    assert (a != encoded(joint.prefix, video=-video)).any(axis=-1).all()


def test_passes_in_one_batch_equal_separate_passes():
    run, video, text, words = given()
    passes = {
        "pair": (video, text, joint.together(K, words)),
        "apart": (video, text, joint.apart(K, words)),
        "wrong": (video[::-1], text, joint.together(K, words)),
    }
    found = joint.encode_passes(run, passes)
    assert found.keys() == passes.keys()
    for name, (v, t, mask) in passes.items():
        np.testing.assert_allclose(found[name], run(joint.join(v, t), mask), atol=1e-5)
