"""Laws of TVTSv2's loss, and its start from CLIP. test_tvtsv2_golden.py compares numbers with the
official code."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import fill
from tests.methods import cases
from tests.methods.laws import LENGTH, ROWS, WORDS, shapes
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

CASE, KEY = cases.CASES["tvtsv2"], jax.random.key(0)
V, T = CASE.video[:2]
K, FEATURES = CASE.texts, CASE.cfg["features"]
NET, RECIPE = tvtsv2.build(**CASE.arguments())
TIME = "visual/encoder/blocks/time_attn"


@pytest.fixture(scope="module")
def made():
    return cases.made("tvtsv2")


def draw(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def test_tokens_and_parameters_of_the_published_models():
    for switch, tokens in (("", 1177), (":B32", 589), (":H14", 913)):
        cfg = config.load(f"tvtsv2/pretrain_yt_webvid{switch}").method
        del cfg["name"]
        net, recipe = tvtsv2.build(**cfg)
        grid = (12, net.grid, net.grid)
        mask = jax.eval_shape(lambda g=grid, r=recipe.ratio: masking.tubes(KEY, 2, g, r))
        assert 1 + mask.keep.shape[1] == tokens
    net, recipe = tvtsv2.build()
    shape = dict(
        video=jax.ShapeDtypeStruct((2, 4, 3, 224, 224, 3), np.uint8),
        text=jax.ShapeDtypeStruct((2, 4, 77), np.int32),
    )
    params = jax.eval_shape(lambda key: tvtsv2.init(net, recipe, key, shape), KEY)

    def forward(params, batch):
        mask = masking.tubes(KEY, 2, (12, net.grid, net.grid), recipe.ratio)
        return tvtsv2.forward(net, params, batch, mask)

    out = jax.eval_shape(forward, params, shape)
    assert out.video.shape == (2, 1177, net.features) and out.turns.shape == (2, 4, 4)
    count = {k: tree.size(v) for k, v in params.items()}
    assert round(count["visual"] / 1e6, 2) == 114.57 and round(count["sorter"] / 1e6, 2) == 6.31
    # CLIP's own: 149,620,737 without the scale of its logits; the rest is new.
    new = [k for k in tree.flatten(params) if "time" in k or k.startswith("sorter")]
    flat = tree.flatten(params)
    assert sum(v.size for k, v in flat.items() if k not in new) == 149_620_736


def test_one_text_leaves_nothing_to_sort(made):
    out = tvtsv2.Outputs(draw(ROWS, 9, FEATURES), draw(ROWS, 1, FEATURES, seed=1), None)
    found = jax.jit(lambda out: tvtsv2.compare(RECIPE, out, jnp.ones(ROWS, bool)))(out)
    assert found["loss_sort"].count == 0 == found["loss_sort"].value()
    assert found["loss_vtc"].value() > 0
    one = {k: x[:, 0] if "text" in k else x for k, x in made.case.batch().items()}
    one["video"] = one["video"][:, 0]
    told = jax.eval_shape(made.method.loss, made.params, {}, one, KEY, jnp.int32(0))[1].metrics
    # Sources that take turns give the same names.
    assert told.keys() == made.step(CASE.batch()).out.metrics.keys() == found.keys()


def test_zeroed_heads_give_losses_at_chance(made):
    """Zero heads make all turns equally likely; a zero projection makes all pairs equally near."""
    names = ["sorter/head/kernel", "sorter/head/bias", "visual/proj/kernel"]
    zero = {n: jnp.zeros_like(tree.flatten(made.params)[n]) for n in names}
    found = made.step(CASE.batch(), tree.replace(made.params, zero)).losses()
    np.testing.assert_allclose(found["sort"], math.log(K), rtol=1e-6)
    np.testing.assert_allclose(found["vtc"], 2 * math.log(ROWS), rtol=1e-6)


def test_contrast_ignores_the_order_of_the_texts_and_sorting_does_not(made):
    batch = CASE.batch()
    turned = {**batch, "text": batch["text"][:, ::-1]}
    a, b = (made.step(x).losses() for x in (batch, turned))
    np.testing.assert_allclose(a["vtc"], b["vtc"], rtol=1e-6)
    assert abs(a["sort"] - b["sort"]) > 1e-3


def test_the_sorter_has_no_positions(made):
    video, texts = draw(2, 9, FEATURES), draw(2, 4, FEATURES, seed=1)
    sort = jax.jit(lambda v, t: bind.bind(NET, made.params).sort(v, t))
    turns, order = sort(video, texts), np.array([2, 0, 3, 1])
    np.testing.assert_allclose(sort(video, texts[:, order]), turns[:, order], atol=1e-5)
    np.testing.assert_allclose(sort(video[:, ::-1], texts), turns, atol=1e-5)
    assert np.abs(np.diff(turns, axis=1)).min() > 1e-4


def test_sorting_has_no_gradient_to_the_text_tower(made):
    """Of a batch with a single row, where contrast is constant."""
    found = made.step({**CASE.batch(), "valid": np.arange(ROWS) == 2})
    assert found.losses()["vtc"] == 0 < found.losses()["sort"]
    norms = {k: np.abs(g).max() for k, g in tree.flatten(jax.device_get(found.grads)).items()}
    assert max(v for k, v in norms.items() if k.startswith("text/")) == 0
    # The blocks, the patches that are no class token, and the sorter learn from it.
    for name in ("visual/patch_embed/kernel", "visual/proj/kernel", "sorter/type"):
        assert norms[name] > 1e-6, name


def test_the_same_places_are_dropped_in_every_frame(made):
    """Which they are is drawn with the step's key. The loss depends on no other place's pixels."""
    batch, drawn = CASE.batch(), []
    draw_mask = jax.jit(lambda key: masking.tubes(key, ROWS, (V * T, 2, 2), 0.5).dropped)
    row, frame = np.arange(ROWS).reshape(-1, 1, 1), np.arange(V * T).reshape(1, -1, 1)
    for seed in (0, 1):

        def loss(where, seed=seed):
            """With other pixels in the places "b t p"."""
            cells = where.reshape(ROWS, V, T, 2, 2).repeat(8, axis=3).repeat(8, axis=4)[..., None]
            video = np.where(cells, 255 - batch["video"], batch["video"])
            return made.step({**batch, "video": video}, seed=seed).value

        dropped = np.asarray(draw_mask(jax.random.key(seed))).reshape(ROWS, V * T, 4)
        assert (dropped == dropped[:, :1]).all() and (dropped.sum(axis=2) == 2).all()
        assert loss(dropped) == (whole := loss(dropped & False))
        assert all(loss(~dropped & (row == i)) != whole for i in range(ROWS))
        assert all(loss(~dropped & (frame == i)) != whole for i in range(V * T))
        drawn.append(dropped)
    assert (drawn[0] != drawn[1]).any()


def test_clips_in_order_are_one_longer_clip(made):
    batch = CASE.batch()
    whole = made.encode(batch)["video"]["embedding"]
    joined = dict(video=jnp.asarray(batch["video"].reshape(ROWS, V * T, 16, 16, 3)))
    found = jax.jit(made.method.encode["video"])(made.params, {}, joined)["embedding"]
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)
    # The rows of the time table that no frame has are not read; those that frames have are.
    table = made.params["visual"]["time_position"]
    for row, same in ((V * T, True), (V * T - 1, False), (0, False)):
        params = tree.replace(made.params, {"visual/time_position": table.at[row].add(1.0)})
        other = made.encoders(params, made.extra, batch)["video"]["embedding"]
        assert bool((other == whole).all()) == same


def test_several_texts_encode_to_their_mean_and_a_single_one_has_tokens(made):
    batch = CASE.batch()
    several = made.encode(batch)["text"]
    rows = {k: batch[k].reshape(ROWS * K, LENGTH) for k in ("text", "text_mask")}
    single = jax.jit(made.method.encode["text"])(made.params, {}, rows)
    each = np.asarray(single["embedding"]).reshape(ROWS, K, -1)
    assert np.abs(each - each[:, :1]).max() > 1e-2
    np.testing.assert_allclose(several["embedding"], each.mean(axis=1), rtol=1e-5, atol=1e-6)
    # For one text they are the contract's: the embedding is made from the end token.
    assert several.keys() == {"embedding"}
    assert single["raw"].shape == single["tokens"].shape == (ROWS * K, LENGTH, 16)
    np.testing.assert_array_equal(single["mask"], rows["text_mask"])
    end = single["tokens"][np.arange(ROWS * K), rows["text_mask"].sum(axis=1) - 1]
    expected = end @ made.params["text"]["proj"]["kernel"]
    np.testing.assert_allclose(single["embedding"], expected, rtol=1e-4, atol=1e-5)
    assert jnp.abs(single["raw"] - single["tokens"]).max() > 1e-2


def test_texts_are_averaged_in_fp32_in_training_as_in_evaluation():
    video, texts = draw(ROWS, 9, 16, dtype="bfloat16"), draw(ROWS, K, 16, dtype="bfloat16", seed=1)
    loss = jax.jit(
        lambda *out: tvtsv2.compare(RECIPE, tvtsv2.Outputs(*out, None), jnp.ones(ROWS, bool))
    )
    wide = (x.astype(jnp.float32) for x in (video, texts))
    a, b = (loss(*x)["loss_vtc"].value() for x in ((video, texts), wide))
    assert a.dtype == jnp.float32 and a == b


def test_crops_of_one_clip_are_not_parts_of_a_video(made):
    """Neither of the first source, whose spec init gets, nor of one that alternates with it."""
    crops = {k: x[:, 0] if "text" in k else jnp.asarray(x) for k, x in CASE.batch().items()}
    message = "rows have 2 clips and one text: leave data.video.repeats at 1"
    with pytest.raises(UserError, match=message):
        made.method.init(KEY, shapes(crops))
    with pytest.raises(UserError, match=message):
        made.method.loss(made.params, {}, crops, KEY, jnp.int32(0))


def started(init, params, part):
    """The parameters, with those of one part as init makes them: the rest is not compiled."""
    made = jax.jit(lambda: {k: x for k, x in tree.flatten(init(KEY)).items() if part in k})()
    assert made, part
    return tree.replace(params, made)


def tower(time_init):
    return spacetime.SpaceTimeViT(
        sizes.Size(16, 2, 2, 16), 4, (1, 2, 2), first_norm=True, style=CLIP, frames=3,
        time_init=time_init, dtype=jnp.float64,
    )  # fmt: skip


@jax.jit
def run_tower(params, cubes, index, wanted):
    """((a scalar, tokens), gradients); how a tower starts changes nothing in it."""

    def scalar(params):
        raw = tower("zero").apply({"params": params}, cubes, index, 3, method="encode_video")
        return (raw * wanted).sum(), raw

    return jax.value_and_grad(scalar, has_aux=True)(params)


@pytest.mark.parametrize("time_init", ["zero", "reference"])
def test_attention_over_time_adds_nothing_at_first_and_one_start_is_a_saddle(time_init):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        cubes, wanted = (jnp.asarray(rng.standard_normal(x)) for x in ((2, 12, 12), (2, 13, 16)))
        index = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
        turned = cubes.reshape(2, 3, 4, 12)[:, ::-1].reshape(2, 12, 12)  # frames back to front

        def init(key):
            made = tower(time_init).init(key, cubes, index, 3, method="encode_video")
            return made["params"]

        def run(params, cubes):
            (_, raw), grads = run_tower(params, cubes, index, wanted)
            return np.asarray(raw), tree.flatten(jax.device_get(grads))

        params = started(init, fill(init, KEY), TIME.removeprefix("visual/"))
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        whole, grads = run(params, cubes)
        # Whichever of its two matrices is not zero changes nothing.
        block = "encoder/blocks/time_attn/"
        name = block + ("qkv" if time_init == "zero" else "proj/kernel")
        other = rng.standard_normal(tree.flatten(params)[name].shape)
        assert (run(tree.replace(params, {name: other}), cubes)[0] == whole).all()
        # Without a time table frames have no order.
        still = tree.replace(params, {"time_position": np.zeros((3, 16))})
        a, b = (run(still, x)[0][:, 0] for x in (cubes, turned))
        np.testing.assert_allclose(a, b, atol=1e-12)
        assert np.abs(run(params, turned)[0][:, 0] - whole[:, 0]).max() > 1e-3
        norms = {k: np.abs(g).max() for k, g in grads.items()}
        assert norms[block + "proj/bias"] > 1e-3
        learns = norms[block + "proj/kernel"] + norms[block + "qkv"]
        assert learns > 1e-3 if time_init == "zero" else learns < 1e-12


def test_rates_are_the_official_ones_and_of_the_text_tower_the_last_quarter_trains(made):
    method = CASE.build(text_size=(16, 4, 2, 32))
    params = jax.eval_shape(lambda: method.init(KEY, made.spec))
    rates = shipped.module("tvtsv2/pretrain_yt_webvid").rates(4)
    found = tree.flatten(optim.settings(rates, params))
    fast = {k for k, s in found.items() if s.lr == 1.0}
    assert fast == {
        k for k in found if "time_attn" in k or "norm_time" in k or k.startswith("sorter/")
    }
    assert {s.lr for s in found.values()} == {1.0, 1e-3}
    no_decay = {k.rpartition("/")[2] for k, s in found.items() if not s.wd}
    assert no_decay == {"bias", "scale", "qkv_bias"}
    for name, setting in found.items():
        within = name.startswith("text/encoder/blocks/")
        assert setting.frozen == ([True, True, True, False] if within else False), name


def write_clip(path, params):
    """A CLIP under OpenAI's names, of a TVTSv2's weights."""
    blocks = params["visual"]["encoder"]["blocks"]
    kept = {k: v for k, v in blocks.items() if k not in ("time_attn", "norm_time")}
    visual = {**params["visual"], "encoder": {"blocks": kept}}
    del visual["time_position"]
    clip = dict(visual=visual, text=params["text"], logit_scale=np.zeros((), np.float32))
    tensors = rules.to_tensors(clip_rules(2, 2), jax.tree.map(np.asarray, clip))
    files.write(path, tensors)
    return tensors


def test_it_starts_as_clip(made, tmp_path):
    """A single frame at time 0, and any text, have CLIP's numbers. (With several frames the class
    token attends to all of them, which CLIP's cannot.)"""
    tensors = write_clip(tmp_path / "clip.safetensors", made.params)
    where = ["--from", str(tmp_path / "clip.safetensors"), "--out", str(tmp_path / "clip")]
    convert.main(["import", "--format", "clip", *where, "--heads", "2", "--text-heads", "2"])
    cfg = config.load("tvtsv2/pretrain_yt_webvid")
    ((_, pattern, template),) = cfg.warm_start
    method = CASE.build(mean=(0.0,) * 3, std=(1.0,) * 3, sep_id=None)
    other = jax.tree.map(lambda x: np.asarray(x) + 1, made.params)
    fresh = started(lambda key: method.init(key, made.spec), other, TIME)
    source = [(str(tmp_path / "clip"), pattern, template)]
    found, rows = warm_start.load(source, cfg.fresh, State(jnp.int32(0), fresh, {}, {}))
    assert len(rows) == len(tree.flatten(fresh))
    still = {"visual/time_position": np.zeros_like(fresh["visual"]["time_position"])}
    params = tree.replace(fresh, {**tree.under(found, "params/"), **still})

    pixels = np.random.default_rng(4).standard_normal((3, 3, 16, 16))
    image = jnp.asarray(pixels.transpose(0, 2, 3, 1)[:, None], jnp.float32)
    got = jax.jit(method.encode["video"])(params, {}, dict(video=image))["embedding"]
    expected = reference.image(tensors, pixels, 2, "quick_gelu")["embedding"]
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())

    ids = CASE.batch()["text"][:, 0]
    ids = np.where(ids == WORDS["sep_id"], WORDS["vocab_size"] - 1, ids % 20)  # the end is largest
    words = dict(text=ids, text_mask=ids > 0)
    got = jax.jit(method.encode["text"])(params, {}, words)["embedding"]
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
        (dict(turns=1), "2 texts of a video to sort; method.turns=1"),
        (dict(frames=3), "videos of 4 frames; method.frames=3"),
        (dict(side=32), "frames of 16 x 16 pixels; method.side=32"),
        (dict(side=20), "method.side=20 does not divide into patches of 8"),
        (dict(time_init="none"), "method.time_init='none'; known: zero, reference"),
        (dict(weights=dict(vtm=1.0)), "no loss 'vtm'; known: vtc, sort"),
    ],
)
def test_mistakes_are_reported_in_one_line(made, changes, message):
    with pytest.raises(UserError, match=message):
        CASE.build(**changes).init(KEY, made.spec)
