"""Laws of TVTSv2's loss, and its start from CLIP. test_tvtsv2_golden.py compares numbers with the
official code."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax import masking, tree
from vtp_jax.convert import __main__ as convert
from vtp_jax.convert import files, rules
from vtp_jax.convert.families.clip import clip_rules
from vtp_jax.convert.reference import clip as reference
from vtp_jax.methods import tvtsv2
from vtp_jax.nn import bind, sizes, spacetime
from vtp_jax.nn.transformer import CLIP
from vtp_jax.run import optim
from vtp_jax.run.step import make_step
from vtp_jax.setup import build, config, shipped, warm_start
from vtp_jax.types import State, UserError

KEY = jax.random.key(0)
STEP = jnp.zeros((), jnp.int32)
SMALL = dict(
    size=(32, 2, 2, 64), text_size=(32, 4, 2, 64), features=64, side=16, patch=8, frames=6,
    vocab_size=20, text_length=9, dtype="float32",
)  # fmt: skip
B, V, T, K, L, END = 3, 2, 2, 4, 7, 19


def example(seed=0, b=B):
    """Two clips of two frames in each row, and four texts."""
    rng = np.random.default_rng(seed)
    text = rng.integers(1, END, (b, K, L))
    ends = rng.integers(2, L, (b, K, 1))
    text = np.where(np.arange(L) < ends, text, np.where(np.arange(L) == ends, END, 0))
    return dict(
        video=jnp.asarray(rng.random((b, V, T, 16, 16, 3)), jnp.float32),
        text=jnp.asarray(text, jnp.int32),
        text_mask=jnp.asarray(np.arange(L) <= ends),
        valid=jnp.ones(b, bool),
    )


def spec_of(batch):
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}


@functools.cache
def build_small(**changes):
    method = tvtsv2.make(**{**SMALL, **changes})
    return method, jax.jit(lambda key: method.init(key, spec_of(example())))(KEY)


@functools.cache
def compiled():
    """((sum, (loss, out)), gradients of parameters and pixels) of the small net: the method's loss,
    and the sum of its terms with the given weights, which alone has gradients."""
    method, _ = build_small()

    def loss(params, video, batch, weights, key):
        value, out = method.loss(params, {}, {**batch, "video": video}, key, STEP)
        terms = [weights[name] * out.metrics[f"loss_{name}"].value() for name in tvtsv2.WEIGHTS]
        return sum(terms), (value, out)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def stirred(seed=5):
    """The small net's parameters, none of them at its start: attention over time acts."""
    _, params = build_small()
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype), params)


def numbers(batch, params=None, key=KEY, **weights):
    """(loss, metrics, gradients of the parameters, gradient of the pixels)."""
    params = stirred() if params is None else params
    weights = {name: jnp.float32(x) for name, x in {**tvtsv2.WEIGHTS, **weights}.items()}
    (_, (value, out)), (grads, pixels) = compiled()(params, batch["video"], batch, weights, key)
    return float(value), {k: float(m.value()) for k, m in out.metrics.items()}, grads, pixels


def with_leaves(params, **leaves):
    return tree.replace(params, {name.replace("__", "/"): x for name, x in leaves.items()})


@pytest.mark.parametrize("name, tokens", [("B16", 1177), ("B32", 589), ("H14", 913)])
def test_tokens_and_parameters_of_the_published_models(name, tokens):
    switch = "" if name == "B16" else f":{name}"
    cfg = config.load(f"tvtsv2/pretrain_yt_webvid{switch}").method
    del cfg["name"]
    net, recipe = tvtsv2.build(**cfg)
    shape = dict(
        video=jax.ShapeDtypeStruct((2, 4, 3, 224, 224, 3), np.uint8),
        text=jax.ShapeDtypeStruct((2, 4, 77), np.int32),
    )
    params = jax.eval_shape(lambda key: tvtsv2.init(net, recipe, key, shape), KEY)

    def forward(params, batch):
        mask = masking.tubes(KEY, 2, (12, net.grid, net.grid), recipe.ratio)
        return tvtsv2.forward(net, params, batch, mask)

    out = jax.eval_shape(forward, params, shape)
    assert out.video.shape == (2, tokens, net.features) and out.turns.shape == (2, 4, 4)
    if name == "B16":
        count = {k: tree.size(v) for k, v in params.items()}
        assert round(count["visual"] / 1e6, 2) == 114.57 and round(count["sorter"] / 1e6, 2) == 6.31
        # CLIP's own: 149,620,737 without the scale of its logits; the rest is new.
        new = [k for k in tree.flatten(params) if "time" in k or k.startswith("sorter")]
        flat = tree.flatten(params)
        assert sum(v.size for k, v in flat.items() if k not in new) == 149_620_736


def test_the_loss_is_contrast_and_twice_sorting():
    value, found, _, _ = numbers(example())
    np.testing.assert_allclose(value, found["loss_vtc"] + 2 * found["loss_sort"], rtol=1e-6)
    assert 0 <= found["sort_accuracy"] <= 1


def test_one_text_leaves_nothing_to_sort():
    method, _ = build_small()
    batch = example()
    one = {k: batch[k][:, 0] for k in ("video", "text", "text_mask")} | {"valid": batch["valid"]}
    value, out = jax.jit(method.loss)(stirred(), {}, one, KEY, STEP)
    assert value == out.metrics["loss_vtc"].value() and out.metrics["loss_sort"].count == 0
    many = jax.eval_shape(method.loss, stirred(), {}, batch, KEY, STEP)[1].metrics
    assert out.metrics.keys() == many.keys()  # sources that take turns give the same names


def test_zeroed_heads_give_losses_at_chance():
    """Zero heads make all turns equally likely; a zero projection makes all pairs equally near."""
    params = stirred()
    zero = {n: jnp.zeros_like(x) for n, x in tree.flatten(params).items()}
    names = ["sorter/head/kernel", "sorter/head/bias", "visual/proj/kernel"]
    _, found, *_ = numbers(example(), tree.replace(params, {n: zero[n] for n in names}))
    np.testing.assert_allclose(found["loss_sort"], math.log(4), rtol=1e-6)
    np.testing.assert_allclose(found["loss_vtc"], 2 * math.log(B), rtol=1e-6)


def test_contrast_ignores_the_order_of_the_texts_and_sorting_does_not():
    batch = example()
    turned = {**batch, "text": batch["text"][:, ::-1]}
    (_, a, *_), (_, b, *_) = numbers(batch), numbers(turned)
    np.testing.assert_allclose(a["loss_vtc"], b["loss_vtc"], rtol=1e-6)
    assert abs(a["loss_sort"] - b["loss_sort"]) > 1e-3


def test_the_sorter_has_no_positions():
    net, _ = tvtsv2.build(**SMALL)
    rng = np.random.default_rng(0)
    video, texts = (jnp.asarray(rng.standard_normal((2, n, 64)), jnp.float32) for n in (9, 4))
    sort = jax.jit(lambda v, t: bind.bind(net, stirred()).sort(v, t))
    turns, order = sort(video, texts), np.array([2, 0, 3, 1])
    np.testing.assert_allclose(sort(video, texts[:, order]), turns[:, order], atol=1e-5)
    np.testing.assert_allclose(sort(video[:, ::-1], texts), turns, atol=1e-5)
    assert np.abs(np.diff(turns, axis=1)).min() > 1e-4


def test_sorting_has_no_gradient_to_the_text_tower():
    grads = numbers(example(), vtc=0.0)[2]
    norms = {k: float(jnp.abs(g).max()) for k, g in tree.flatten(grads).items()}
    assert max(v for k, v in norms.items() if k.startswith("text/")) == 0
    # The blocks, the patches that are no class token, and the sorter learn from it.
    for name in ("visual/patch_embed/kernel", "visual/proj/kernel", "sorter/type"):
        assert norms[name] > 1e-6, name


def test_the_same_places_are_dropped_in_every_frame_and_cost_nothing():
    """Which they are is drawn with the step's key."""
    drawn = []
    for key in (KEY, jax.random.key(1)):
        gradient = np.asarray(numbers(example(), key=key)[3])
        seen = np.abs(gradient).reshape(B, V * T, 2, 8, 2, 8, 3).max(axis=(3, 5, 6)) > 0
        assert (seen == seen[:, :1]).all() and (seen.sum(axis=(2, 3)) == 2).all()
        mask = masking.tubes(key, B, (V * T, 2, 2), 0.5)
        np.testing.assert_array_equal(seen.reshape(B, -1), ~np.asarray(mask.dropped))
        drawn.append(seen)
    assert (drawn[0] != drawn[1]).any()
    assert numbers(example())[0] != numbers(example(), key=jax.random.key(1))[0]


def test_clips_in_order_are_one_longer_clip():
    video, (method, _), params = example()["video"], build_small(), stirred()
    joined = video.reshape(B, V * T, 16, 16, 3)
    encode = jax.jit(lambda p, v: method.encode["video"](p, {}, dict(video=v))["embedding"])
    whole = encode(params, joined)
    assert (encode(params, video) == whole).all()
    # The rows of the time table that no frame has are not read; those that frames have are.
    table = params["visual"]["time_position"]
    for row, same in ((V * T, True), (V * T - 1, False)):
        other = with_leaves(params, visual__time_position=table.at[row].add(1.0))
        assert bool((encode(other, joined) == whole).all()) == same


def test_several_texts_encode_to_their_mean_and_a_single_one_has_tokens():
    batch, encode = example(), jax.jit(build_small()[0].encode["text"])
    texts = {k: batch[k] for k in ("text", "text_mask")}
    rows = {k: x.reshape(B * K, L) for k, x in texts.items()}
    several, single = (encode(stirred(), {}, x) for x in (texts, rows))
    each = np.asarray(single["embedding"]).reshape(B, K, -1)
    assert np.abs(each - each[:, :1]).max() > 1e-2
    np.testing.assert_allclose(several["embedding"], each.mean(axis=1), rtol=1e-5, atol=1e-6)
    # For one text they are the contract's: the embedding is made from the end token.
    assert several.keys() == {"embedding"}
    assert single["raw"].shape == single["tokens"].shape == (B * K, L, 32)
    np.testing.assert_array_equal(single["mask"], rows["text_mask"])
    end = single["tokens"][jnp.arange(B * K), single["mask"].sum(axis=1) - 1]
    expected = end @ stirred()["text"]["proj"]["kernel"]
    np.testing.assert_allclose(single["embedding"], expected, rtol=1e-4, atol=1e-5)
    assert jnp.abs(single["raw"] - single["tokens"]).max() > 1e-2


def test_texts_are_averaged_in_fp32_in_training_as_in_evaluation():
    rng, (_, recipe) = np.random.default_rng(0), tvtsv2.build(**SMALL)
    video, texts = (jnp.asarray(rng.standard_normal((B, n, 64)), jnp.bfloat16) for n in (9, K))
    out = tvtsv2.Outputs(video, texts, None)
    wide = tvtsv2.Outputs(video.astype(jnp.float32), texts.astype(jnp.float32), None)
    a, b = (tvtsv2.losses(recipe, x, jnp.ones(B, bool))["loss_vtc"].value() for x in (out, wide))
    assert a.dtype == jnp.float32 and a == b


def test_crops_of_one_clip_are_not_parts_of_a_video():
    """Neither of the first source, whose spec init gets, nor of one that alternates with it."""
    batch = example()
    crops = {**batch, **{k: batch[k][:, 0] for k in ("text", "text_mask")}}
    method, message = (
        build_small()[0],
        "rows have 2 clips and one text: leave data.video.repeats at 1",
    )
    with pytest.raises(UserError, match=message):
        method.init(KEY, spec_of(crops))
    with pytest.raises(UserError, match=message):
        method.loss(stirred(), {}, crops, KEY, STEP)


@pytest.mark.parametrize("time_init", ["zero", "reference"])
def test_attention_over_time_adds_nothing_at_first_and_one_start_is_a_saddle(time_init):
    with jax.enable_x64(True):
        net = spacetime.SpaceTimeViT(
            sizes.Size(16, 2, 2, 16), 4, (1, 2, 2), first_norm=True, style=CLIP, frames=3,
            time_init=time_init, dtype=jnp.float64,
        )  # fmt: skip
        rng = np.random.default_rng(0)
        cubes, wanted = rng.standard_normal((2, 12, 12)), rng.standard_normal((2, 13, 16))
        index = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
        turned = cubes.reshape(2, 3, 4, 12)[:, ::-1].reshape(2, 12, 12)  # frames back to front
        init = functools.partial(net.init, method="encode_video")
        params = jax.jit(init, static_argnums=3)(KEY, cubes, index, 3)["params"]
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)

        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def run(params, cubes):
            raw = net.apply({"params": params}, cubes, index, 3, method="encode_video")
            return (raw * wanted).sum(), raw

        (_, whole), grads = run(params, cubes)
        # Whichever of its two matrices is not zero changes nothing.
        block = "encoder/blocks/time_attn/"
        name = block + ("qkv" if time_init == "zero" else "proj/kernel")
        other = jax.random.normal(KEY, tree.flatten(params)[name].shape)
        assert (run(tree.replace(params, {name: other}), cubes)[0][1] == whole).all()
        # Without a time table frames have no order.
        still = tree.replace(params, {"time_position": jnp.zeros((3, 16))})
        a, b = (run(still, x)[0][1][:, 0] for x in (cubes, turned))
        np.testing.assert_allclose(a, b, atol=1e-12)
        assert np.abs(run(params, turned)[0][1][:, 0] - whole[:, 0]).max() > 1e-3
        norms = {k: float(jnp.abs(g).max()) for k, g in tree.flatten(grads).items()}
        assert norms[block + "proj/bias"] > 1e-3
        learns = norms[block + "proj/kernel"] + norms[block + "qkv"]
        assert learns > 1e-3 if time_init == "zero" else learns < 1e-12


def test_rates_are_the_official_ones_and_of_the_text_tower_the_last_quarter_trains():
    method, params = build_small()
    rates = shipped.module("tvtsv2/pretrain_yt_webvid").rates(4)
    found = tree.flatten(optim.settings(rates, params))
    fast = {k for k, s in found.items() if s.lr == 1.0}
    assert fast == {
        k for k in found if "time_attn" in k or "norm_time" in k or k.startswith("sorter/")
    }
    assert {s.lr for s in found.values()} == {1.0, 1e-3}
    no_decay = {k.rpartition("/")[2] for k, s in found.items() if not s.wd}
    assert no_decay == {"bias", "scale", "qkv_bias"}
    optimizer = optim.make(params, rules=rates, lr=lambda step: jnp.float32(1.0), weight_decay=0.05)
    trainable, frozen = optimizer.split(stirred())
    assert not frozen
    opt = optimizer.init(trainable)
    grads = numbers(example())[2]
    new = tree.flatten(jax.jit(optimizer.update)(grads, opt, trainable, STEP).params)
    for name, old in tree.flatten(trainable).items():
        moved = (np.asarray(new[name]) != np.asarray(old)).reshape(len(old), -1).any(axis=1)
        if name.startswith("text/encoder/blocks/"):
            assert moved.tolist() == [False, False, False, True], name
        else:
            assert moved.any(), name


def write_clip(path):
    """A CLIP of random weights under OpenAI's names."""
    shapes = dict(build_small()[1])
    blocks = shapes["visual"]["encoder"]["blocks"]
    kept = {k: v for k, v in blocks.items() if k not in ("time_attn", "norm_time")}
    visual = {**shapes["visual"], "encoder": {"blocks": kept}}
    del visual["time_position"]
    params = dict(visual=visual, text=shapes["text"], logit_scale=np.zeros(()))
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: (np.asarray(x) + 0.1 * rng.standard_normal(x.shape)).astype(np.float32), params
    )
    tensors = rules.to_theirs(clip_rules(2, 2), params)
    files.write(path, tensors)
    return tensors


def test_it_starts_as_clip(tmp_path):
    """A single frame at time 0, and any text, have CLIP's numbers. (With several frames the class
    token attends to all of them, which CLIP's cannot.)"""
    tensors = write_clip(tmp_path / "clip.safetensors")
    where = ["--from", str(tmp_path / "clip.safetensors"), "--out", str(tmp_path / "clip")]
    convert.main(["import", "--format", "clip", *where, "--heads", "2", "--text-heads", "2"])
    cfg = config.load("tvtsv2/pretrain_yt_webvid")
    ((_, pattern, template),) = cfg.warm_start
    method, fresh = build_small()
    shapes = State(STEP, fresh, {}, {})
    found, rows = warm_start.load([(str(tmp_path / "clip"), pattern, template)], cfg.fresh, shapes)
    assert len(rows) == len(tree.flatten(fresh))
    params = tree.replace(fresh, tree.under(found, "params/"))
    params = with_leaves(params, visual__time_position=jnp.zeros((6, 32)))

    pixels = np.random.default_rng(4).standard_normal((B, 3, 16, 16))
    net = tvtsv2.make(**SMALL, mean=(0.0,) * 3, std=(1.0,) * 3, sep_id=None)
    image = jnp.asarray(pixels.transpose(0, 2, 3, 1)[:, None], jnp.float32)
    got = jax.jit(net.encode["video"])(params, {}, dict(video=image))["embedding"]
    expected = reference.image(tensors, pixels, 2, "quick_gelu")["embedding"]
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())

    words = {k: example()[k][:, 0] for k in ("text", "text_mask")}
    ids = np.asarray(words["text"])
    got = jax.jit(net.encode["text"])(params, {}, words)["embedding"]
    expected = reference.text(tensors, ids, 2, "quick_gelu")["embedding"]
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow(reason="compiles two steps")
def test_a_stopped_run_resumes_exactly():
    """With alternating sources and ordered texts: state and position determine everything."""
    source = dict(clips=8, side=16, frames=8)
    also = dict(captions=dict(train=source, video=dict(frames=8, stride=1)))
    cfg = config.load("tvtsv2/pretrain_yt_webvid:tiny")
    data = dict(cfg.data, train=dict(source, pieces=4), also=also, evals={})
    loaded = build.data({**data, "video": dict(frames=2, stride=4, size=16)}, batch=8, seed=0)
    small = (16, 1, 1, 16)
    cfg.method.update(size=small, text_size=small, features=16, side=16)
    method = build.method(cfg, loaded.facts)
    begin, optimizer = build.start(method, cfg.optim, loaded.spec, 0)
    step = jax.jit(make_step(method, optimizer, 0))

    def go(state, first):
        for batch in itertools.islice(loaded.batches(first), 4 - first):
            state, numbers = step(state, batch)
            states.append(jax.device_get((state, numbers)))

    states = []
    go(jax.jit(begin)(), 0)
    whole, states = states, []
    go(jax.tree.map(jnp.asarray, whole[1][0]), 2)
    assert len({batch["text"].shape for batch in itertools.islice(loaded.batches(0), 4)}) == 2
    jax.tree.map(np.testing.assert_array_equal, whole[2:], states)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(turns=3), "4 texts of a video to sort; method.turns=3"),
        (dict(frames=3), "videos of 4 frames; method.frames=3"),
        (dict(side=32), "frames of 16 x 16 pixels; method.side=32"),
        (dict(side=20), "method.side=20 does not divide into patches of 8"),
        (dict(time_init="none"), "method.time_init='none'; known: zero, reference"),
        (dict(weights=dict(vtm=1.0)), "no loss 'vtm'; known: vtc, sort"),
    ],
)
def test_mistakes_are_reported_in_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        tvtsv2.make(**{**SMALL, **changes}).init(KEY, spec_of(example()))
