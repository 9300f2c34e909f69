"""Transformer blocks: layout, masks, dropout and precision."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import fill
from vtp_jax import tree
from vtp_jax.nn import pool, sizes
from vtp_jax.nn.attention import attend
from vtp_jax.nn.transformer import BEIT, BERT, Stack
from vtp_jax.run import sharding
from vtp_jax.types import UserError

KEY = jax.random.key(0)
SIZE = sizes.Size(32, 3, 2, 48)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


X, OTHER = jnp.asarray(normal(2, 7, 32)), jnp.asarray(normal(2, 5, 24))


def but(x: jax.Array, places: slice | list[int], value: float) -> np.ndarray:
    """x with other tokens at some places."""
    other = np.array(x)
    other[:, places] = value
    return other


def test_attend_is_softmax_attention():
    q, k, v = normal(3, 2, 5, 4, 8)
    mask = np.array([[True] * 5, [True, False, True, True, False]])
    logits = np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(8)
    logits = np.where(mask[:, None, None], logits, -np.inf)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhnm,bmhk->bnhk", weights, v)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v, mask), expected, atol=2e-6)


def test_masked_tokens_change_nothing():
    module, mask = Stack(SIZE), np.array([[True] * 5 + [False] * 2] * 2)
    params, run = fill(module.init, KEY, X), jax.jit(module.apply)
    y, other = (np.asarray(run(params, x, mask)) for x in (X, but(X, slice(5, None), 1e3)))
    assert (y[:, :5] == other[:, :5]).all()
    np.testing.assert_allclose(y[:, :5], run(params, X[:, :5]), atol=1e-5)


@functools.cache
def gradients(module):
    """Gradients of a net that also attends to other tokens."""
    params = fill(module.init, KEY, X, None, OTHER)

    def loss(params, other):
        return jnp.sum(module.apply(params, X, None, other) ** 2)

    return jax.jit(jax.grad(loss, (0, 1)))(params, OTHER)


@pytest.mark.parametrize(
    "change",
    [dict(unroll=3), dict(remat="nothing_saveable"), dict(remat="dots_saveable", unroll=2)],
)
def test_unrolling_and_remat_change_neither_parameters_nor_numbers(change):
    plain, other = Stack(SIZE), Stack(SIZE, **change)
    a, b = (jax.eval_shape(m.init, KEY, X) for m in (plain, other))
    assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)
    found = gradients(plain), gradients(other)
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        # Entries are sums of terms as large as the largest entry, rounded.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=4e-6 * np.abs(a).max())


@pytest.mark.parametrize("depth, change", [(1, {}), (3, dict(remat="nothing_saveable"))])
def test_a_stack_asked_for_some_tokens_has_their_numbers_and_gradients(depth, change):
    module, mask = (
        Stack(sizes.Size(32, depth, 2, 48), **change),
        jnp.array([[True] * 6 + [False]] * 2),
    )
    params = fill(module.init, KEY, X)

    def loss(params, x, read):
        y = module.apply(params, x, mask, read=read)
        return jnp.sum(jnp.sin(y[:, -3:])), y.shape

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    (a, shape), grads = run(params, X, 3)
    (b, _), whole = run(params, X, None)
    assert shape == (2, 3, 32)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), grads, whole)


def test_layers_differ_and_are_initialised_as_in_the_reference():
    base = jax.eval_shape(Stack(sizes.Size(768, 2, 12, 3072)).init, KEY, normal(1, 1, 768))
    assert tree.flatten(base)["params/blocks/attn/qkv"].shape == (2, 768, 12, 3, 64)
    assert tree.size(base) == 2 * 7_087_104  # ViT-B's block; keys have no bias
    narrow = Stack(sizes.Size(192, 2, 3, 64))
    params = tree.flatten(jax.device_get(jax.jit(narrow.init)(KEY, normal(1, 1, 192))))
    qkv = params["params/blocks/attn/qkv"]
    bound = np.sqrt(6 / (4 * 192))
    assert qkv.shape == (2, 192, 3, 3, 64) and not (qkv[0] == qkv[1]).all()
    assert 0.99 * bound < np.abs(qkv).max() <= bound
    assert abs(float(qkv.std()) * np.sqrt(3) / bound - 1) < 0.01
    assert not params["params/blocks/attn/q_bias"].any()


def test_stochastic_depth_needs_a_key_and_keeps_the_mean():
    size = sizes.Size(32, 2, 2, 48)
    module, plain = Stack(size, drop_path=0.5), Stack(size)
    params = fill(plain.init, KEY, X)

    @jax.jit
    def without(params):
        first = Stack(size._replace(depth=1)).apply(jax.tree.map(lambda p: p[:1], params), X)
        return module.apply(params, X), plain.apply(params, X), first

    asked, never, first = map(np.asarray, without(params))
    assert (asked == never).all()
    run = jax.jit(jax.vmap(lambda k: module.apply(params, X, rngs={"dropout": k})))
    draws = np.asarray(run(jax.random.split(KEY, 400)))
    assert len({round(float(d.sum()), 3) for d in draws}) > 1
    # The first block is never dropped (rates rise from 0), the second in half of the draws.
    whole_steps = np.abs(draws - first).max(axis=(2, 3)) < 1e-5
    assert 0.15 < float(whole_steps.mean()) < 0.35  # both branches of the second block dropped


def test_softmax_and_norms_run_in_fp32_under_bf16():
    module = Stack(SIZE, dtype=jnp.bfloat16)
    params = fill(module.init, KEY, X)
    traced = jax.make_jaxpr(lambda x: module.apply(params, x))(X)
    assert [x.dtype for x in traced.out_avals] == [jnp.bfloat16]
    for line in str(traced).splitlines():
        if any(f"= {op}" in line for op in ("exp ", "exp[", "rsqrt", "reduce_max")):
            assert "f32[" in line.split("=")[0] and "bf16" not in line.split("=")[0], line
        if "= dot_general" in line:
            assert "bf16[" in line.split("=")[0], line


@pytest.mark.parametrize("style", [BEIT, BERT])
def test_other_tokens_are_attended_to_only_where_they_are_given(style):
    module = Stack(sizes.Size(32, 2, 2, 48), style=style)
    params = fill(module.init, KEY, X, None, OTHER)
    bare = jax.eval_shape(module.init, KEY, X)["params"]["blocks"]
    blocks = params["params"]["blocks"]
    assert blocks.keys() - bare.keys() == {"cross", "norm_cross"}
    run = jax.jit(module.apply)
    alone = np.asarray(run(params, X))
    assert (alone == run({"params": {"blocks": {k: blocks[k] for k in bare}}}, X)).all()

    mask = np.array([[True, False, True, True, False]] * 2)
    y = np.asarray(run(params, X, None, OTHER, mask))
    assert not np.allclose(y, alone, atol=1e-3)
    assert (y == run(params, X, None, but(OTHER, [1, 4], 1e3), mask)).all()


@pytest.mark.parametrize("n", [8, 7])
def test_splitting_tokens_over_devices_changes_nothing(n):
    """Values and gradients of 7 tokens on 2 devices, with other tokens to attend to and a mask."""
    module, mask = Stack(SIZE), jnp.arange(n) < jnp.array([[n], [4]])
    x = normal(2, n, 32)
    params = fill(module.init, KEY, x, None, OTHER)

    @jax.value_and_grad
    def loss(params, x):
        y = module.apply(params, x, mask, OTHER)
        return jnp.sum(jnp.sin(jnp.where(mask[..., None], y, 0)))

    wanted = jax.jit(loss)(params, x)
    with sharding.activate(sharding.make_mesh(data=2, sequence=4)):
        compiled = jax.jit(loss).lower(params, x).compile()
        got = compiled(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 2e-5), got, wanted)
    hidden = re.findall(r"f32\[1,(\d),48\]", compiled.as_text())
    assert hidden and set(hidden) == {"2"}, "the mlp's tokens are not split in four"


def test_post_norm_blocks_end_with_a_norm():
    module = Stack(SIZE, style=BERT)
    params = fill(module.init, KEY, X)
    norm = params["params"]["blocks"]["norm2"]
    norm.update(scale=np.ones_like(norm["scale"]), bias=np.zeros_like(norm["bias"]))
    y = np.asarray(jax.jit(module.apply)(params, 5 * X))
    np.testing.assert_allclose(y.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(axis=-1), 1, rtol=1e-4)


def test_dropout_needs_a_key_and_acts_on_branches_and_attention_weights():
    size = sizes.Size(32, 1, 2, 48)
    module, plain = Stack(size, dropout=0.5), Stack(size)
    params = fill(plain.init, KEY, X)
    asked, never = jax.jit(lambda p: (module.apply(p, X), plain.apply(p, X)))(params)
    assert (np.asarray(asked) == np.asarray(never)).all()

    # Attention returns 1 everywhere and the MLP returns 0: each channel is 1, or less where
    # weights (1/7 for each of 7 tokens) are dropped; each dropout doubles what it keeps.
    zero = jax.tree.map(np.zeros_like, params)
    zero["params"]["blocks"]["attn"]["v_bias"] = np.ones((1, 2, 16), np.float32)
    zero["params"]["blocks"]["attn"]["proj"]["kernel"] = np.eye(32, dtype=np.float32)[None]
    run = jax.jit(lambda k: module.apply(zero, X, rngs={"dropout": k}) - X)
    added, other = (np.asarray(run(jax.random.key(i))) / 4 * 7 for i in (0, 1))
    assert not (added == other).all()
    np.testing.assert_allclose(added, np.round(added), atol=1e-4)
    assert len(np.unique(np.round(added))) > 3  # weights: sums other than all or nothing
    assert 0.4 < (np.round(added) == 0).mean() < 0.65  # branches: half of the channels


def test_pool_mean_excludes_masked_tokens():
    x, mean = normal(2, 4, 3), jax.jit(pool.mean)
    y = np.asarray(mean(x, np.array([[True, True, False, False], [False] * 4])))
    np.testing.assert_allclose(y[0], x[0, :2].mean(axis=0), rtol=1e-6)
    assert (y[1] == 0).all()
    np.testing.assert_allclose(mean(x), x.mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize("size", ["XXL", (1, 2, 3), (100, 2, 3, 4)])
def test_wrong_sizes_are_reported(size):
    with pytest.raises(UserError, match="method.size"):
        sizes.pick(sizes.ENCODERS, size, "method.size")
