"""Warm starts: weights are matched by name and reported, or there is a one-line error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arrays import fill
from tests.configs import ROOT
from vtp_jax import tree
from vtp_jax.run import checkpoint
from vtp_jax.setup import build, config, warm_start
from vtp_jax.types import Mean, Method, Out, State, UserError


def save(path, params, extra=None):
    state = State(jnp.zeros((), jnp.int32), params, {}, extra or {})
    with checkpoint.Checkpoints(path, every=1) as saved:
        saved.save(0, state)
    return str(path)


def shapes(**leaves):
    nested = {n: {"kernel": jax.ShapeDtypeStruct(s, np.float32)} for n, s in leaves.items()}
    return State(jnp.zeros((), jnp.int32), nested, {}, {})


@pytest.fixture
def old(tmp_path):
    rng = np.random.default_rng(0)
    params = {
        "patch_embed": {"kernel": rng.standard_normal((1, 4, 4, 3, 8)).astype(np.float16)},
        "body": {"kernel": rng.standard_normal((8, 8)).astype(np.float32)},
        "position": rng.standard_normal((10, 8)).astype(np.float32),
        "words": {"position": rng.standard_normal((9, 8)).astype(np.float32)},
        "spare": {"kernel": np.zeros(3, np.float32)},
    }
    return save(tmp_path / "old", params, {"ema": np.full(2, 7, np.float32)}), params


def test_names_shapes_and_dtypes_are_fitted(old):
    path, params = old
    wanted = shapes(patch_embed=(2, 4, 4, 3, 8), trunk=(8, 8), head=(8, 2))
    wanted.params["position"] = jax.ShapeDtypeStruct((17, 8), np.float32)
    rules = [
        (path, r"params/(patch_embed/kernel|position)", r"params/\1"),
        (path, r"params/body/(.*)", r"params/trunk/\1"),
    ]
    leaves, rows = warm_start.load(rules, [r"params/head/.*"], wanted)
    np.testing.assert_array_equal(leaves["params/trunk/kernel"], params["body"]["kernel"])
    kernel = leaves["params/patch_embed/kernel"]
    assert kernel.shape == (2, 4, 4, 3, 8) and kernel.dtype == np.float32
    np.testing.assert_allclose(kernel.sum(0), params["patch_embed"]["kernel"][0], rtol=2e-3)
    table = leaves["params/position"]
    assert table.shape == (17, 8)
    np.testing.assert_array_equal(table[0], params["position"][0])
    how = {row.name: row.how for row in rows}
    assert how["params/trunk/kernel"] == "loaded" and how["params/head/kernel"] == "fresh"
    assert "inflated" in how["params/patch_embed/kernel"]
    assert "resized" in how["params/position"]
    told = warm_start.summary(rows)
    assert all(word in told for word in ("1 loaded", "1 inflated", "1 resized", "1 fresh"))
    assert warm_start.report(rows).count("\n") == 3


def test_extra_is_filled_too(old):
    path, _ = old
    wanted = State(
        jnp.zeros((), jnp.int32), {}, {}, {"twin": jax.ShapeDtypeStruct((2,), np.float32)}
    )
    leaves, _ = warm_start.load([(path, "extra/ema", "extra/twin")], [], wanted)
    np.testing.assert_array_equal(leaves["extra/twin"], [7, 7])


def test_a_word_table_is_not_resized(old):
    wanted = State(
        jnp.zeros((), jnp.int32),
        {"words": {"position": jax.ShapeDtypeStruct((16, 8), np.float32)}},
        {},
        {},
    )
    with pytest.raises(UserError, match="another shape"):
        warm_start.load([(old[0], r"params/(words/position)", r"params/\1")], [], wanted)


@pytest.mark.parametrize(
    "rule, fresh, match",
    [
        ((r"params/body/(.*)", r"params/trunk/\1"), [], "nothing fills params/head/kernel"),
        ((r"params/bdy/.*", "x"), [], "matches nothing"),
        ((r"params/body/(.*)", r"params/nowhere/\1"), [".*"], "nowhere/kernel .not here"),
        ((r"params/spare/(.*)", r"params/trunk/\1"), [".*"], r"\(3,\).*\(8, 8\)"),
        ((r"params/body/(.*)", r"params/trunk/\1"), [".*head.*", "typo.*"], "'typo.*' matches no"),
        ((r"params/(", "x"), [], "not a regular expression"),
        ((r"params/body/(.*)",), [], "is not .path, from, to."),
        ((r"params/body/(.*)", r"params/trunk/\2"), [".*"], "group"),
    ],
)
def test_what_does_not_fit_is_a_one_line_error(old, rule, fresh, match):
    path, _ = old
    with pytest.raises(UserError, match=match):
        warm_start.load([(path, *rule)], fresh, shapes(trunk=(8, 8), head=(8, 2)))


def test_a_folder_without_a_checkpoint_is_reported(tmp_path):
    for path, told in ((tmp_path, "no checkpoint"), (tmp_path / "x", "no folder .*x; make it")):
        with pytest.raises(UserError, match=told):
            warm_start.load([(str(path), ".*", ".*")], [], shapes(a=(1,)))


def test_the_error_names_the_override_of_the_source_that_failed(old, tmp_path):
    sources = [(old[0], "params/(body/.*)", r"params/\1"), (str(tmp_path / "x"), ".*", ".*")]
    with pytest.raises(UserError, match="--config.warm_start.1.0=DIR"):
        warm_start.load(sources, [], shapes(body=(8, 8)))


def test_a_momentum_twin_copies_what_was_loaded():
    """`start` runs after the warm start."""

    def loss(params, extra, batch, rng, step):
        return params["w"].sum(), Out({"loss_w": Mean(jnp.ones(()), jnp.ones(()))}, extra)

    method = Method(
        init=lambda rng, spec: {"w": jnp.zeros(3)},
        loss=loss,
        encode={},
        start=lambda rng, spec, params: {"twin": params["w"], "count": jnp.zeros(())},
    )
    cfg = dict(lr=0.1, weight_decay=0.0, rules=[(".*", {})])
    start, _ = build.start(method, cfg, {}, 0)
    state = jax.jit(start)({"params/w": np.arange(3, dtype=np.float32)})
    np.testing.assert_array_equal(state.extra["twin"], [0, 1, 2])
    state = jax.jit(start)({"extra/count": np.float32(5)})
    assert state.extra["count"] == 5 and not state.params["w"].any()


def test_simvtp_starts_from_videomae_and_bert(tmp_path, monkeypatch):
    """As `configs/simvtp/pretrain_webvid.py` defines, with nets as small as its `tiny`."""
    monkeypatch.chdir(ROOT)
    full = config.load("configs/simvtp/pretrain_webvid.py")
    cfg = config.load("configs/simvtp/pretrain_webvid.py:tiny")
    data = build.data(cfg.data, batch=cfg.batch, seed=0)
    made = build.method(cfg, data.facts)
    given = fill(lambda: made.init(jax.random.key(5), data.spec))
    words = {"text_embed": given["text_embed"]}
    rest = {k: v for k, v in given.items() if k not in ("text_embed", "text_cls", "vtm_head")}
    folders = [save(tmp_path / "videomae", rest), save(tmp_path / "bert", words)]
    sources = [(f, *rule[1:]) for f, rule in zip(folders, full.warm_start, strict=True)]
    start, _ = build.start(made, cfg.optim, data.spec, cfg.seed)
    leaves, _ = build.warm(sources, full.fresh, jax.eval_shape(start), tmp_path)
    params = tree.flatten(jax.jit(start)(leaves).params)
    for name, x in tree.flatten(given).items():
        loaded = not name.startswith(("text_cls", "vtm_head"))
        assert bool((params[name] == x).all()) == loaded, name
    report = (tmp_path / "warm_start.txt").read_text()
    assert report.count(" fresh ") == 4 and len(report.splitlines()) == len(params)
