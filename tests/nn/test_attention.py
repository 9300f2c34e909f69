"""Every way to compute attention gives the same numbers and gradients; which one is chosen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType

from vtp_jax.nn import attention
from vtp_jax.nn.attention import attend, by_xla, choose, split_by_hand
from vtp_jax.run import sharding
from vtp_jax.types import UserError

DRAWN = np.random.default_rng(0).standard_normal((3, 2, 6, 3, 8))
Q, K, V = (jnp.asarray(x, jnp.float32) for x in DRAWN)
SEEN = np.array([[True] * 6, [True, False, True, True, False, False]])
MASK, CAUSAL = (jnp.asarray(x) for x in (SEEN, SEEN[:, None] & np.tri(6, dtype=bool)))


@pytest.mark.parametrize("mask", [None, MASK])
def test_one_head_at_a_time_has_the_plain_values_and_gradients(mask):
    def loss(q, k, v, kernel):
        return jnp.sum(jnp.sin(attend(q, k, v, mask, kernel=kernel)))

    whole = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
    told, expected = (whole(Q[:, :4], K, V, kernel) for kernel in ("heads", "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-6, 2e-6), told, expected)


def test_softmax_is_fp32_where_products_are_bf16():
    for kernel in ("xla", "heads"):
        text = str(
            jax.make_jaxpr(jax.grad(lambda q, kernel=kernel: attend(q, K, V, kernel=kernel).sum()))(
                Q.astype(jnp.bfloat16)
            )
        )
        exps = [line.split("=")[0] for line in text.splitlines() if "= exp " in line]
        assert exps and all("f32[" in e and "bf16" not in e for e in exps)


def test_large_attention_matrices_are_not_stored_for_the_backward_pass():
    """1024 x 1024 weights in each of 6 heads."""
    q = jax.ShapeDtypeStruct((1, 1024, 6, 4), jnp.float32)

    def kept(kernel):
        def loss(q):
            return attend(q, q, q, kernel=kernel).sum()

        run = jax.jit(jax.grad(loss)).lower(q).compile()
        return run.memory_analysis().temp_size_in_bytes

    pairs = 1024 * 1024 * 4
    assert kept("xla") >= 6 * pairs and kept("auto") == kept("heads") < 6 * pairs


def test_the_kernel_is_chosen_by_platform_shapes_and_mesh():
    def chosen(kind, platform, n, dtype=jnp.bfloat16, mask=None, drop=None, ways=1):
        device = jax.sharding.AbstractDevice(kind, None, platform)
        types = (AxisType.Auto,)
        mesh = AbstractMesh((ways,), ("data",), axis_types=types, abstract_device=device)
        q = jax.ShapeDtypeStruct((2, n, 3, 64), dtype)
        found = []
        with jax.sharding.use_abstract_mesh(mesh):
            jax.eval_shape(lambda q, mask: found.append(choose(q, q, mask, drop)), q, mask)
        return found[0]

    by_query = jax.ShapeDtypeStruct((2, 1568, 1568), bool)
    h200, tpu, cpu = ("NVIDIA H200", "gpu"), ("TPU v5e", "tpu"), ("cpu", "cpu")
    assert chosen(*h200, 32) == chosen(*h200, 1568, mask=by_query) == "cudnn"
    assert chosen(*h200, 1568, jnp.float32) == chosen("AMD", "gpu", 1568) == "xla"
    assert chosen(*h200, 1567, mask=by_query) == "xla"
    assert chosen(*tpu, 1568, ways=8) == "flash" and chosen(*tpu, 192) == "xla"
    assert chosen(*cpu, 1568) == "heads" and chosen(*cpu, 1568, ways=8) == "xla"
    assert chosen(*tpu, 1568, mask=by_query) == chosen(*cpu, 1568, drop=lambda w: w) == "xla"


def test_an_unknown_kernel_is_rejected():
    with pytest.raises(UserError, match="attention='fast'; known: auto, xla, heads, cudnn, flash"):
        attend(Q, K, V, kernel="fast")
    with pytest.raises(UserError, match="'heads' takes masks of keys"):
        attend(Q, K, V, jnp.ones((2, 6, 6), bool), kernel="heads")


def test_tokens_are_padded_to_whole_tiles():
    assert attention.fill(Q).shape == (2, 128, 3, 8) and not attention.fill(Q)[:, 6:].any()
    assert attention.fill(MASK, 3).shape == (2, 6)


@pytest.mark.parametrize("mask", [None, MASK])
def test_the_interpreted_tpu_kernel_has_the_plain_values_and_gradients(mask):
    """Values and gradients, with an incomplete tile of tokens and with masked keys."""

    def loss(q, k, v, kernel):
        return jnp.sum(jnp.sin(attend(q, k, v, mask, kernel=kernel)))

    whole = jax.value_and_grad(loss, (0, 1, 2))
    with pltpu.force_tpu_interpret_mode():
        told = jax.jit(partial(whole, kernel="flash"))(Q[:, :4], K, V)
    expected = jax.jit(partial(whole, kernel="xla"))(Q[:, :4], K, V)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), told, expected)


@pytest.mark.parametrize("mask", [None, MASK, CAUSAL])
def test_attention_split_by_hand_over_a_mesh_is_the_plain_one(mask):
    """Rows, queries and heads are split; two devices do not divide three heads."""

    def loss(q, k, v, heads, mesh):
        kernel = by_xla if mesh is None else partial(split_by_hand, by_xla)
        return jnp.sum(jnp.sin(kernel(q[:, :, :heads], k[:, :, :heads], v[:, :, :heads], mask)))

    for heads in (2, 3):
        whole = jax.value_and_grad(partial(loss, heads=heads), (0, 1, 2))
        expected = jax.jit(partial(whole, mesh=None))(Q, K, V)
        mesh = sharding.make_mesh(data=2, sequence=2, tensor=2)
        with sharding.activate(mesh):
            lowered = jax.jit(partial(whole, mesh=mesh)).lower(Q, K, V)
            told = lowered.compile()(Q, K, V)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), told, expected)
        part = "tensor<1x3x1x8xf32>" if heads == 2 else "tensor<1x3x3x8xf32>"
        assert part in lowered.as_text()  # queries of a device: half of 2 rows, of 6 tokens
