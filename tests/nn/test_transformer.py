"""Blocks: one layout, masks that mask, precision where it matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax import tree
from vtp_jax.nn import pool, sizes
from vtp_jax.nn.attention import attend
from vtp_jax.nn.transformer import BEIT, BERT, Stack
from vtp_jax.types import UserError

KEY = jax.random.key(0)
SIZE = sizes.Size(32, 3, 2, 48)
X = jax.random.normal(KEY, (2, 7, 32))


def test_attend_is_softmax_attention():
    q, k, v = jax.random.normal(KEY, (3, 2, 5, 4, 8))
    mask = jnp.array([[True] * 5, [True, False, True, True, False]])
    logits = np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(8)
    logits = np.where(mask[:, None, None], logits, -np.inf)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhnm,bmhk->bnhk", weights, v)
    np.testing.assert_allclose(attend(q, k, v, mask), expected, atol=2e-6)


def test_what_stands_behind_a_mask_changes_nothing():
    module, mask = Stack(SIZE), jnp.array([[True] * 5 + [False] * 2] * 2)
    params = module.init(KEY, X)
    y = module.apply(params, X, mask)
    other = module.apply(params, X.at[:, 5:].set(1e3), mask)
    assert (y[:, :5] == other[:, :5]).all()
    np.testing.assert_allclose(y[:, :5], module.apply(params, X[:, :5]), atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [dict(unroll=3), dict(remat="nothing_saveable"), dict(remat="dots_saveable", unroll=2)],
)
def test_unrolling_and_rematerialising_keep_parameters_and_numbers(change):
    plain, other = Stack(SIZE), Stack(SIZE, **change)
    params = plain.init(KEY, X)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, other.init(KEY, X))
    grads = [jax.grad(lambda p, m=m: jnp.sum(m.apply(p, X) ** 2))(params) for m in (plain, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *grads)


@pytest.mark.parametrize("depth, change", [(1, {}), (3, dict(remat="nothing_saveable"))])
def test_a_stack_of_which_some_tokens_are_read_gives_their_numbers_and_gradients(depth, change):
    module, mask = (
        Stack(sizes.Size(32, depth, 2, 48), **change),
        jnp.array([[True] * 6 + [False]] * 2),
    )
    params = module.init(KEY, X)

    def loss(params, x, read):
        y = module.apply(params, x, mask, read=read)
        return jnp.sum(jnp.sin(y[:, -3:])), y.shape

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    (a, shape), grads = run(params, X, 3)
    (b, _), whole = run(params, X, None)
    assert shape == (2, 3, 32)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), grads, whole)


def test_layers_differ_and_start_as_the_reference_draws_them():
    params = tree.flatten(Stack(sizes.Size(768, 2, 12, 3072)).init(KEY, jnp.zeros((1, 1, 768))))
    qkv = params["params/blocks/attn/qkv"]
    bound = np.sqrt(6 / 3072)
    assert qkv.shape == (2, 768, 12, 3, 64) and not (qkv[0] == qkv[1]).all()
    assert 0.99 * bound < jnp.abs(qkv).max() <= bound
    assert abs(float(qkv.std()) * np.sqrt(3) / bound - 1) < 0.01
    assert not params["params/blocks/attn/q_bias"].any()
    assert tree.size(params) == 2 * 7_087_104  # facts 1.9


def test_stochastic_depth_acts_with_a_key_only_and_keeps_the_mean():
    size = sizes.Size(32, 2, 2, 48)
    module = Stack(size, drop_path=0.5)
    params = module.init(KEY, X)
    assert (module.apply(params, X) == Stack(size).apply(params, X)).all()
    run = jax.jit(jax.vmap(lambda k: module.apply(params, X, rngs={"dropout": k})))
    draws = run(jax.random.split(KEY, 400))
    assert len({round(float(d.sum()), 3) for d in draws}) > 1
    # The first block is never dropped (rates rise from 0), the second half the time.
    first = Stack(sizes.Size(32, 1, 2, 48)).apply(jax.tree.map(lambda p: p[:1], params), X)
    whole_steps = jnp.abs(draws - first[None]).max(axis=(2, 3)) < 1e-6
    assert 0.15 < float(whole_steps.mean()) < 0.35  # both branches of the second block dropped


def test_softmax_and_norms_run_in_fp32_under_bf16():
    module = Stack(SIZE, dtype=jnp.bfloat16)
    params = module.init(KEY, X)
    assert module.apply(params, X).dtype == jnp.bfloat16
    text = str(jax.make_jaxpr(lambda x: module.apply(params, x))(X))
    for line in text.splitlines():
        if any(f"= {op}" in line for op in ("exp ", "exp[", "rsqrt", "reduce_max")):
            assert "f32[" in line.split("=")[0] and "bf16" not in line.split("=")[0], line
        if "= dot_general" in line:
            assert "bf16[" in line.split("=")[0], line


OTHER = jax.random.normal(jax.random.key(1), (2, 5, 24))


@pytest.mark.parametrize("style", [BEIT, BERT])
def test_others_are_attended_to_where_they_are_given_and_only_there(style):
    module = Stack(sizes.Size(32, 2, 2, 48), style=style)
    params = jax.jit(module.init)(KEY, X, None, OTHER)
    bare = jax.eval_shape(module.init, KEY, X)["params"]["blocks"]
    blocks = params["params"]["blocks"]
    assert blocks.keys() - bare.keys() == {"cross", "norm_cross"}
    run = jax.jit(module.apply)
    alone = run(params, X)
    assert (alone == run({"params": {"blocks": {k: blocks[k] for k in bare}}}, X)).all()

    mask = jnp.array([[True, False, True, True, False]] * 2)
    y = run(params, X, None, OTHER, mask)
    assert not jnp.allclose(y, alone, atol=1e-3)
    assert (y == run(params, X, None, OTHER.at[:, 1].set(1e3).at[:, 4].set(-7.0), mask)).all()


def test_rematerialised_cross_attention_keeps_its_gradients():
    plain, other = Stack(SIZE), Stack(SIZE, remat="nothing_saveable")
    params = jax.jit(plain.init)(KEY, X, None, OTHER)

    def gradient(module):
        f = jax.grad(lambda p, o: jnp.sum(module.apply(p, X, None, o) ** 2), argnums=(0, 1))
        return jax.jit(f)(params, OTHER)

    found = gradient(plain), gradient(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *found)


def test_post_norm_blocks_end_in_their_norm():
    module = Stack(SIZE, style=BERT)
    y = jax.jit(module.apply)(jax.jit(module.init)(KEY, X), 5 * X)
    np.testing.assert_allclose(y.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(axis=-1), 1, rtol=1e-4)


def test_dropout_acts_with_a_key_only_on_branches_and_on_attention_weights():
    size = sizes.Size(32, 1, 2, 48)
    module, plain = Stack(size, dropout=0.5), Stack(size)
    params = jax.jit(plain.init)(KEY, X)
    assert (jax.jit(module.apply)(params, X) == jax.jit(plain.apply)(params, X)).all()

    # An attention that answers 1 everywhere and an mlp that answers 0: each channel is 1, or less
    # where weights (1/7 of each of 7 tokens) are dropped; doubled by either dropout that keeps.
    zero = jax.tree.map(jnp.zeros_like, params)
    zero["params"]["blocks"]["attn"]["v_bias"] = jnp.ones((1, 2, 16))
    zero["params"]["blocks"]["attn"]["proj"]["kernel"] = jnp.eye(32)[None]
    run = jax.jit(lambda k: module.apply(zero, X, rngs={"dropout": k}) - X)
    added = np.asarray(run(KEY)) / 4 * 7
    assert not (added == np.asarray(run(jax.random.key(1))) / 4 * 7).all()
    np.testing.assert_allclose(added, np.round(added), atol=1e-4)
    assert len(np.unique(np.round(added))) > 3  # weights: other sums than all or nothing
    assert 0.4 < (np.round(added) == 0).mean() < 0.65  # branches: half of the channels


def test_pool_mean_leaves_out_what_is_masked():
    x = jax.random.normal(KEY, (2, 4, 3))
    mask = jnp.array([[True, True, False, False], [False] * 4])
    y = pool.mean(x, mask)
    np.testing.assert_allclose(y[0], x[0, :2].mean(axis=0), rtol=1e-6)
    assert (y[1] == 0).all()
    np.testing.assert_allclose(pool.mean(x), x.mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize("size", ["XXL", (1, 2, 3), (100, 2, 3, 4)])
def test_wrong_sizes_are_named(size):
    with pytest.raises(UserError, match="method.size"):
        sizes.pick(sizes.ENCODERS, size, "method.size")
