"""BERT in two halves, which without other tokens compute what BERT does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import fill
from vtp_jax import tree
from vtp_jax.nn import fusion, sizes, text
from vtp_jax.types import UserError

SIZE = sizes.Size(16, 3, 2, 32)
IDS = jnp.array([[8, 3, 5, 9, 0, 0], [8, 2, 9, 0, 0, 0]])
MASK, KEY = IDS > 0, jax.random.key(0)
SEEN = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 24)), jnp.float32)


@pytest.fixture(scope="module")
def made():
    net = fusion.SplitBert(SIZE, fusion=2, vocab_size=10, length=8)
    return net, jax.tree.map(jnp.asarray, fill(net.init, KEY, IDS, MASK, SEEN))["params"]


def test_without_other_tokens_the_two_halves_equal_bert(made):
    net, params = made
    bert = text.Bert(SIZE, vocab_size=10, length=8)
    whole = fill(bert.init, KEY, IDS)["params"]
    flat = tree.flatten(params)
    for name, x in tree.flatten(whole["encoder"]).items():
        flat[f"encoder/{name}"], flat[f"fuser/{name}"] = x[:1], x[1:]
    words = {f"text_embed/{k}": x for k, x in tree.flatten(whole["text_embed"]).items()}
    params = jax.tree.map(jnp.asarray, tree.replace(params, {**flat, **words}))
    whole = jax.tree.map(jnp.asarray, whole)
    told = jax.jit(lambda p: bert.apply({"params": p}, IDS, MASK, method="encode"))(whole)
    np.testing.assert_allclose(jax.jit(net.apply)({"params": params}, IDS, MASK), told, atol=1e-5)


def test_only_the_second_half_attends_to_other_tokens(made):
    net, params = made
    cross = {name for name in tree.flatten(params) if "cross" in name}
    assert cross and all(name.startswith("fuser/") for name in cross)
    run = jax.jit(lambda seen: net.apply({"params": params}, IDS, MASK, seen))
    assert np.abs(run(SEEN) - run(SEEN + 1)).min(axis=(1, 2)).max() > 0


def test_a_half_without_blocks_is_rejected():
    for wrong in (0, 3):
        with pytest.raises(UserError, match=f"fusion={wrong} of 3 blocks: both halves have some"):
            fusion.SplitBert(SIZE, fusion=wrong).init(KEY, IDS)
