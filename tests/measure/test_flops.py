"""The counter of products against XLA's, against loops, and against what the papers publish."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.measure import flops
from vtp_jax.methods import simvtp, tvtsv2, videomae
from vtp_jax.setup import config

KEY = jax.random.key(0)


def spec(rows=1, words=32):
    shapes = dict(
        video=((16, 224, 224, 3), np.uint8),
        valid=((), bool),
        text=((words,), np.int32),
        text_mask=((words,), bool),
        maskable=((words,), bool),
    )
    return {k: jax.ShapeDtypeStruct((rows, *s), kind) for k, (s, kind) in shapes.items()}


def giga(method, batch, f=None):
    """GMAC of the loss, or of f of it, on `batch`."""
    params = jax.eval_shape(lambda key: method.init(key, batch), KEY)

    def loss(params, batch):
        return method.loss(params, {}, batch, KEY, jnp.int32(0))[0]

    return flops.macs((f or (lambda g: g))(loss), params, batch) / 1e9


def test_products_are_counted_as_xla_counts_them():
    def f(x, w, k):
        y = jax.lax.conv(jnp.einsum("bnd,df->bnf", x, w)[:, None], k, (1, 1), "VALID")
        return jnp.einsum("bonf,bomf->bnm", y, y).sum()

    args = [jax.ShapeDtypeStruct(s, np.float32) for s in ((8, 33, 64), (64, 96), (4, 1, 5, 5))]
    cost = jax.jit(f).lower(*args).cost_analysis()
    assert 2 * flops.macs(f, *args) == pytest.approx(cost["flops"], rel=0.02)  # XLA's has sums


@pytest.mark.parametrize("derive", [lambda f: f, jax.grad], ids=["forward", "backward"])
def test_a_step_is_counted_as_xla_counts_it_without_loops(derive):
    method, batch = videomae.make(size="B", decoder_ratio=0.5, unroll=12), spec()
    params = jax.eval_shape(lambda key: method.init(key, batch), KEY)
    step = derive(lambda p, x: method.loss(p, {}, x, KEY, jnp.int32(0))[0])
    xla = jax.jit(step).lower(params, batch).cost_analysis()["flops"]
    ours = 2 * flops.macs(step, params, batch)
    assert ours < xla < 1.03 * ours  # softmax, norms and activations besides


def test_loops_branches_and_what_is_computed_again():
    w = jax.ShapeDtypeStruct((16, 16), np.float32)

    def layers(w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), w, length=5)[0].sum()

    assert flops.macs(layers, w) == 5 * 16**3
    assert flops.macs(jax.jit(jax.grad(layers)), w) == 3 * 5 * 16**3
    assert flops.macs(jax.grad(jax.checkpoint(lambda w: (jnp.tanh(w @ w) @ w).sum())), w) == (
        (2 + 2 * 2 + 1) * 16**3  # forward, backward, and the product that tanh' asks for again
    )
    dear = flops.macs(lambda w: jax.lax.cond(w[0, 0] > 0, lambda: w @ w @ w, lambda: w), w)
    assert dear == 2 * 16**3


@pytest.mark.parametrize(
    "recipe, published",
    [
        (dict(size="B"), 35.44),
        (dict(size="B", decoder_ratio=0.25), 31.63),
        (dict(size="B", decoder_ratio=0.5), 25.84),
        (dict(size="B", decoder_ratio=0.75), 21.06),
        (dict(size="g", cube=(2, 14, 14)), 263.96),
        (dict(size="g", cube=(2, 14, 14), decoder_ratio=0.5), 241.61),
    ],
)
def test_videomae_costs_what_the_papers_say(recipe, published):
    """V2, Table 1 and its ablation of the decoder's mask: GMAC of a clip. Both papers' code embeds
    the hidden cubes too, and runs the decoder's last block for the visible places; not here."""
    method = videomae.make(**recipe)
    (net, recipe), batch = videomae.build(**recipe), spec()
    draws = jax.eval_shape(lambda: videomae.draw(net, recipe, KEY, batch["video"]))
    seen, asked = draws.mask.keep.shape[1], draws.ask.shape[1]
    cubes = (16 // 2) * (224 // net.cube[1]) ** 2
    embedded = 3 * np.prod(net.cube) * net.encoder_size.width / 1e9
    d, mlp = net.decoder_size.width, net.decoder_size.mlp
    unasked = seen * (2 * d * d + 2 * d * mlp + 2 * (seen + asked) * d) / 1e9
    found = giga(method, batch) + (cubes - seen) * embedded + unasked
    assert found == pytest.approx(published, rel=2e-3)


@pytest.mark.parametrize("match, lean", [("masked", 142.5), ("clean", 176.5)])
def test_simvtp_costs_what_a_lean_step_must(match, lean):
    """GFLOP of a clip and 32 words, counted by hand: 190.9 in the released code, 142.5 where
    nothing is computed twice. Here the decoder's last block is computed for the 1,408 hidden places
    only, and the 160 cubes and the 32 words, each alone, share one pass."""
    method = simvtp.make(size="B", vocab_size=30522, mask_id=103, pad_id=0, match_text=match)
    d, seen, n = 384, 160, 1568
    unasked = 2 * seen * (2 * d * d + 2 * d * 4 * d + 2 * n * d) / 1e9
    packed = 2 * 12 * 2 * 768 * ((160 + 32) ** 2 - 160**2 - 32**2) / 1e9
    found = giga(method, spec(rows=2))  # 2 rows, 2 FLOP a MAC
    assert found == pytest.approx(lean - unasked + packed, rel=5e-4)
    if match == "masked":  # on a CPU backward makes the decoder's attention weights again
        again = 2 * (3 * n + n - seen) * n * d / 1e9
        assert giga(method, spec(rows=2), jax.grad) == pytest.approx(3 * found + again, rel=2e-3)


def test_tvtsv2_costs_what_was_measured_of_its_code():
    cfg = config.load("tvtsv2/pretrain_yt_webvid").method
    method = tvtsv2.make(**{k: v for k, v in cfg.items() if k != "name"})
    batch = dict(
        video=jax.ShapeDtypeStruct((1, 4, 3, 224, 224, 3), np.uint8),
        text=jax.ShapeDtypeStruct((1, 4, 77), np.int32),
    )
    params = jax.eval_shape(lambda key: method.init(key, batch), KEY)
    whole = flops.macs(lambda p, b: method.encode["video"](p, {}, b), params, batch)
    assert whole / 1e9 == pytest.approx(278.3, rel=2e-3)
