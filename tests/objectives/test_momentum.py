"""Laws of momentum twins and of the soft targets made with them."""

import jax
import jax.numpy as jnp
import numpy as np

from vtp_jax import tree
from vtp_jax.objectives import momentum
from vtp_jax.objectives.classification import cross_entropy


def params(dtype=jnp.bfloat16):
    one = jnp.ones(3, dtype)
    return dict(visual=dict(w=one, cross=one), head=dict(w=one))


def test_a_twin_has_the_parameters_whose_whole_names_match():
    twin = momentum.twin(params(), r"visual/w|head/.*")
    assert tree.flatten(twin).keys() == {"visual/w", "head/w"}
    assert tree.flatten(momentum.twin(params(), r"(?!head/).*")).keys() == {
        "visual/w",
        "visual/cross",
    }


def test_a_twin_is_updated_in_fp32_or_wider_and_in_its_own_parameters_only():
    twin = momentum.twin(params(), "visual/w")
    assert twin["visual"]["w"].dtype == jnp.float32
    new = jax.tree.map(lambda x: 2 * x, params())
    for _ in range(2):
        twin = momentum.follow(twin, new, jnp.float32(0.9998))
    assert tree.flatten(twin).keys() == {"visual/w"}
    np.testing.assert_allclose(twin["visual"]["w"], 2 - 0.9998**2, rtol=1e-7)
    assert twin["visual"]["w"].dtype == jnp.float32
    with jax.enable_x64(True):
        exact = momentum.twin(params(jnp.float64), ".*")
        assert {x.dtype for x in jax.tree.leaves(exact)} == {np.dtype("float64")}


def test_distilled_cross_entropy_is_as_by_hand_without_a_gradient_to_the_twin():
    draw = np.random.default_rng(0)
    logits, twin = (jnp.asarray(draw.standard_normal((2, 3, 5)), jnp.float32) for _ in range(2))
    target = jnp.array([[0, 4, -1], [2, 2, 1]], jnp.int32)
    where = jnp.array([[True, True, False], [True, False, True]])

    def loss(logits, twin, alpha):
        return momentum.distilled(logits, twin, target, where, alpha).value()

    log_p, soft = np.asarray(jax.nn.log_softmax(logits)), np.asarray(jax.nn.softmax(twin))
    places = [(0, 0), (0, 1), (1, 0), (1, 2)]
    hard = np.mean([-log_p[i, j, target[i, j]] for i, j in places])
    told = np.mean([-(soft[i, j] * log_p[i, j]).sum() for i, j in places])
    np.testing.assert_allclose(loss(logits, twin, 0.4), 0.6 * hard + 0.4 * told, rtol=1e-5)
    np.testing.assert_allclose(
        loss(logits, twin, 0.0), cross_entropy(logits, target, where).value(), rtol=1e-6
    )
    grads = jax.grad(loss, (0, 1))(logits, twin, 0.4)
    assert grads[0].any() and not grads[1].any()
