"""AdamW against a plain restatement of torch's, and the rules on names."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtp_jax import schedules, tree
from vtp_jax.run import optim
from vtp_jax.types import UserError

# Shaped like a pretraining net: stacked blocks (depth 3), norms, a token, embedding tables.
DIMS = {
    "encoder/blocks/attn/qkv/kernel": (3, 4, 12),
    "encoder/blocks/attn/qkv/bias": (3, 12),
    "encoder/blocks/norm/scale": (3, 4),
    "encoder/blocks/norm/bias": (3, 4),
    "encoder/patch/kernel": (6, 4),
    "decoder/mask_token": (1, 1, 4),
    "text/word/embedding": (9, 4),
    "text/position/embedding": (5, 4),
    "text/type/embedding": (2, 4),
    "temperature": (),
}

# SimVTP (its official code): biases, norms and the mask token are not decayed; the three BERT
# tables and all kernels are. By name: in stacked blocks a bias has two dimensions.
NO_DECAY = ".*/(bias|scale|mask_token)"
RULES = [(NO_DECAY, dict(wd=0.0)), (".*", {})]


def draw(seed: int, dims=DIMS, dtype=np.float32) -> dict:
    rng = np.random.default_rng(seed)
    flat = {k: jnp.asarray(rng.standard_normal(s), dtype) for k, s in dims.items()}
    out: dict = {}
    for name, x in flat.items():
        *path, last = name.split("/")
        node = out
        for key in path:
            node = node.setdefault(key, {})
        node[last] = x
    return out


LR = schedules.make(1e-3)


def make(rules=RULES, lr=LR, weight_decay=0.05, **rest):
    return optim.make(
        jax.eval_shape(lambda: draw(0)), rules=rules, lr=lr, weight_decay=weight_decay, **rest
    )


def first_step(optimizer, grads, params):
    return optimizer.update(grads, optimizer.init(params), params, jnp.int32(0))


class Torch:
    """torch.optim.AdamW of one tensor, by the algorithm in its documentation, in fp64."""

    def __init__(self, p, betas, eps, wd):
        self.p, self.betas, self.eps, self.wd = np.float64(p), betas, eps, wd
        self.m, self.v, self.t = np.zeros_like(self.p), np.zeros_like(self.p), 0

    def step(self, g, lr):
        (b1, b2), g = self.betas, np.float64(g)
        self.t += 1
        self.p = self.p - lr * self.wd * self.p
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        corrected = np.sqrt(self.v) / np.sqrt(1 - b2**self.t) + self.eps
        self.p = self.p - lr / (1 - b1**self.t) * self.m / corrected


@pytest.mark.parametrize("betas, eps", [((0.9, 0.95), 1e-8), ((0.9, 0.999), 1e-3)])
def test_ten_steps_are_torchs(betas, eps):
    """With warm-up (lr 0 at step 0, where nothing moves), decay, and exclusions by name."""
    lr = schedules.make(dict(kind="warmup_cosine", peak=1e-2, end=1e-4, warmup=3, steps=10))
    optimizer = make(lr=lr, betas=betas, eps=eps, weight_decay=0.05)
    params = draw(0)
    opt = optimizer.init(params)
    update = jax.jit(optimizer.update)
    excluded = ("bias", "scale", "mask_token")
    torch = {
        name: Torch(p, betas, eps, 0.0 if name.endswith(excluded) else 0.05)
        for name, p in tree.flatten(draw(0)).items()
    }
    for step in range(10):
        grads = draw(100 + step)
        params, opt, info = update(grads, opt, params, jnp.int32(step))
        for name, g in tree.flatten(grads).items():
            torch[name].step(g, float(lr(step)))
        flat = tree.flatten(params)
        for name, oracle in torch.items():
            np.testing.assert_allclose(flat[name], oracle.p, rtol=2e-6, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(info["lr"], lr(step), rtol=1e-6)
    moved = [np.abs(flat[k] - v).max() for k, v in tree.flatten(draw(0)).items()]
    assert min(moved) > 0.01


def test_in_fp64_it_is_torchs_to_rounding():
    with jax.enable_x64(True):
        optimizer = make(lr=lambda step: 1e-2)
        params = draw(0, dtype=np.float64)
        opt, update = optimizer.init(params), jax.jit(optimizer.update)
        torch = Torch(
            draw(0, dtype=np.float64)["text"]["word"]["embedding"], (0.9, 0.999), 1e-8, 0.05
        )
        for step in range(10):
            grads = draw(100 + step, dtype=np.float64)
            params, opt, _ = update(grads, opt, params, jnp.int32(step))
            torch.step(grads["text"]["word"]["embedding"], 1e-2)
        np.testing.assert_allclose(params["text"]["word"]["embedding"], torch.p, rtol=1e-13)


def test_decay_is_excluded_by_name():
    shapes = jax.eval_shape(lambda: draw(0))
    decayed = {k for k, s in tree.flatten(optim.settings(RULES, shapes)).items() if s.wd}
    assert decayed == {
        "encoder/blocks/attn/qkv/kernel",
        "encoder/patch/kernel",
        "text/word/embedding",
        "text/position/embedding",
        "text/type/embedding",
        "temperature",
    }


def test_a_config_that_went_through_json_is_the_same():
    rules = [("encoder/blocks/.*", dict(lr=(0.5, 1.0, 2.0))), (NO_DECAY, dict(wd=0.0)), (".*", {})]
    shapes = jax.eval_shape(lambda: draw(0))
    again = json.loads(json.dumps(rules))
    one, two = (make(r, betas=b) for r, b in ((rules, (0.9, 0.95)), (again, [0.9, 0.95])))
    results = [jax.jit(first_step, static_argnums=0)(o, draw(1), draw(0)) for o in (one, two)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert jax.tree.structure(shapes) == jax.tree.structure(results[0].params)


def test_each_stacked_layer_is_trained_with_its_own_rate():
    """Layer i of the blocks is trained as if alone with its own rate."""
    scales = [0.25, 0.5, 1.0]
    rules = [("encoder/blocks/.*", dict(lr=scales)), ("text/.*", dict(lr=0.0)), (".*", {})]
    params, grads = draw(0), draw(1)
    got, base = (
        tree.flatten(jax.device_get(jax.jit(first_step, static_argnums=0)(o, grads, params).params))
        for o in (make(rules), make([(".*", {})]))
    )
    for name, p in tree.flatten(jax.device_get(params)).items():
        change, whole = got[name] - p, base[name] - p
        if name.startswith("encoder/blocks"):
            for i, scale in enumerate(scales):
                np.testing.assert_allclose(change[i], scale * whole[i], rtol=1e-3, atol=2e-7)
        elif name.startswith("text"):
            assert (change == 0).all()
        else:
            np.testing.assert_array_equal(change, whole)


def test_frozen_parameters_cost_nothing_and_never_change():
    rules = [("(encoder|text)/.*", dict(frozen=True)), (".*", {})]
    optimizer = make(rules)
    params = draw(0)
    trainable, frozen = optimizer.split(params)
    assert set(tree.flatten(trainable)) == {"decoder/mask_token", "temperature"}
    merged = tree.merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, merged, params)

    opt = optimizer.init(trainable)
    assert not [k for k in tree.flatten(opt) if "encoder" in k or "text" in k]
    grads = jax.tree.map(np.ones_like, trainable)
    new, _, info = jax.jit(optimizer.update)(grads, opt, trainable, jnp.int32(0))
    assert jax.tree.structure(new) == jax.tree.structure(trainable)
    np.testing.assert_allclose(info["grad_norm"], np.sqrt(5.0), rtol=1e-6)
    np.testing.assert_allclose(info["param_norm"], optim.norm(trainable), rtol=1e-6)


def test_frozen_layers_of_a_stack_never_change_and_are_in_no_norm():
    """The others are trained as if these were not there, clipping included."""
    frozen = [True, False, True]
    rules = [("encoder/blocks/.*", dict(frozen=frozen, lr=[1.0, 0.5, 2.0])), (".*", {})]
    optimizer, params, grads = make(rules, clip=1.0), draw(0), draw(1)
    assert not optimizer.split(params)[1]
    layers = {k: v for k, v in DIMS.items() if k.startswith("encoder/blocks")}
    alone = {k: (1, *v[1:]) if k in layers else v for k, v in DIMS.items()}
    small = optim.make(
        jax.eval_shape(lambda: draw(0, alone)),
        rules=[("encoder/blocks/.*", dict(lr=0.5)), (".*", {})],
        lr=LR,
        weight_decay=0.05,
        clip=1.0,
    )

    def middle(values):
        return tree.map_named(lambda name, x: x[1:2] if name in layers else x, values)

    new, opt, info = jax.jit(first_step, static_argnums=0)(optimizer, grads, params)
    grads, params = (jax.tree.map(np.asarray, x) for x in (grads, params))
    told = jax.jit(first_step, static_argnums=0)(small, middle(grads), middle(params))
    jax.tree.map(np.testing.assert_array_equal, middle(new), told.params)
    for name in ("grad_norm", "update_norm", "param_norm"):
        np.testing.assert_allclose(info[name], told.info[name], rtol=1e-6)
    for name in layers:
        old, now = (np.asarray(tree.flatten(x)[name]) for x in (params, new))
        np.testing.assert_array_equal(now[[0, 2]], old[[0, 2]])
        assert (np.asarray(tree.flatten(opt.mu)[name])[[0, 2]] == 0).all()
    # A stack of which every layer is frozen is frozen.
    whole = make([("encoder/blocks/.*", dict(frozen=[True] * 3)), (".*", {})])
    assert tree.flatten(whole.split(params)[1]).keys() == layers.keys()
    with pytest.raises(UserError, match="2 frozen for 'encoder/blocks.*one per layer"):
        make([("encoder/blocks/.*", dict(frozen=[True, False])), (".*", {})])


@functools.partial(jax.jit, static_argnums=1)
def clip_first_step(grads, clip):
    """The norms of the gradient and of the first moment."""
    _, opt, info = first_step(make(clip=clip), grads, draw(0))
    return info["grad_norm"], optim.norm(opt.mu)


@given(st.floats(0.1, 100), st.sampled_from([0.3, 5.0]))  # each clip is compiled separately
def test_clip_bounds_the_global_norm(norm, clip):
    """As torch: gradients times min(1, clip / (norm + 1e-6)); seen in the first moment."""
    grads = jax.tree.map(np.asarray, draw(1))
    total = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * np.float32(norm / total), grads)
    found, mean = (float(x) for x in clip_first_step(grads, clip))
    np.testing.assert_allclose(found, norm, rtol=1e-5)
    np.testing.assert_allclose(mean / 0.1, min(norm, clip), rtol=1e-5)


def test_norms_and_moments_are_fp32_where_parameters_are_not():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), draw(0))
    optimizer = make()
    opt = optimizer.init(half)
    new, opt, info = jax.jit(optimizer.update)(half, opt, half, jnp.int32(0))
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves((opt.mu, opt.nu))} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in info.values()} == {jnp.dtype(jnp.float32)}


def test_shapes_and_dtypes_of_the_state_never_change():
    """Otherwise every step would compile again."""
    optimizer, params = make(), draw(0)
    opt = optimizer.init(params)
    new, opt2, _ = jax.eval_shape(optimizer.update, params, opt, params, jnp.int32(0))
    same = lambda a, b: assert_same(a, b)  # noqa: E731
    jax.tree.map(same, (params, opt), (new, opt2))


def assert_same(a, b):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_is_skipped_and_the_schedule_advances(bad):
    """One NaN in one gradient: parameters, moments and extra stay; the next step's rate is that of
    the next step, and the result is the one of a run that never saw the bad batch."""
    rates = [0.1, 0.2, 0.3]
    optimizer = make(lr=lambda step: jnp.asarray(rates)[step])

    @jax.jit
    def step(number, params, opt, extra, grads, loss):
        new, opt2, info = optimizer.update(grads, opt, params, number)
        good = optim.finite(loss, info["grad_norm"])
        kept = optim.keep(good, (new, opt2, extra + 1), (params, opt, extra))
        return number + 1, *kept

    def run(grads, losses, steps):
        params = draw(0)
        state = (params, optimizer.init(params), jnp.int32(0))
        for i in steps:
            number, *state = step(jnp.int32(i), *state, grads[i], losses[i])
            assert number == i + 1
        return state

    grads = [draw(i) for i in range(3)]
    fine = jnp.zeros(3)
    wanted = run(grads, fine, [0, 2])
    poisoned = [grads[0], draw(1), grads[2]]
    table = poisoned[1]["text"]["word"]
    table["embedding"] = table["embedding"].at[3, 2].set(bad)
    for got in (run(poisoned, fine, [0, 1, 2]), run(grads, fine.at[1].set(bad), [0, 1, 2])):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
        assert got[2] == 2


@pytest.mark.parametrize(
    "rules, words",
    [
        ([("encoder/.*", {})], "no rule covers"),
        ([(".*", {}), ("text/.*", {})], "'text/.*' matches nothing"),
        ([(".*", dict(wdecay=0.0))], "unknown key 'wdecay'"),
        ([("encoder/blocks/.*", dict(lr=[1.0, 2.0])), (".*", {})], "2 rates for"),
        ([(".*", dict(lr=[1.0, 2.0, 3.0]))], "3 rates for"),
        ([(".*", dict(frozen=True))], "nothing to train"),
    ],
)
def test_wrong_rules_are_errors(rules, words):
    with pytest.raises(UserError, match=words) as raised:
        make(rules)
    assert "\n" not in str(raised.value)
