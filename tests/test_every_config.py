"""Every config loads with every switch and builds; every command in a config's or an entry's header
is one that the entry understands."""

import json
import math
import re
import shlex
from itertools import combinations
from pathlib import Path

import jax
import pytest

from tests.configs import ROOT, config_files, switches
from vtp_jax import build, cli, sharding, train, tree
from vtp_jax.data import pipeline
from vtp_jax.types import UserError

HEADERS = [
    *config_files(),
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "vtp_jax").glob("*.py")),
]


TRACED = set()


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def all_switches():
    """Every set of a config's switches; of more than two, which name recipes, each alone."""
    for path in config_files():
        known = switches(path)
        assert "tiny" in known, f"{path} has no switch tiny"
        most = len(known) if len(known) <= 2 else 1
        for n in range(most + 1):
            yield from (f"{path}:{','.join(c)}" for c in combinations(known, n))


@pytest.mark.parametrize("spec", list(all_switches()))
def test_it_loads_and_its_rules_cover_its_parameters(spec):
    cfg = cli.plain(cli.load_config(spec))
    if "tiny" in spec:
        data = build.data(cfg["data"], batch=cfg["batch"], seed=0)
        facts, shapes_of_batch = data.facts, data.spec
    else:  # its data is not here; its net is
        facts = dict(vocab_size=30522, pad_id=0, mask_id=103, mean=(0.5,) * 3, std=(0.2,) * 3)
        shapes_of_batch = expected(cfg["data"], cfg["batch"])
    method = build.method(cfg, facts)
    start, optimizer = build.start(method, cfg["optim"], shapes_of_batch, 0)
    shapes = jax.eval_shape(start)
    sharding.state_shardings(shapes, sharding.make_mesh(data=2, fsdp=2, tensor=2), cfg["sharding"])
    if "tiny" in spec:  # a step must give back the types of the state that it takes
        train.check_step(train.make_step(method, optimizer, 0), shapes, shapes_of_batch)
        return
    whole, spread = (held(shapes, cfg["sharding"], fsdp=n) for n in (1, 8))
    assert whole / 8 <= spread < 1.1 * whole / 8  # biases, norms and positions stay whole
    same = json.dumps([cfg["method"], cfg.get("task"), facts, str(shapes_of_batch)])
    if same in TRACED:  # the switch is about data, rates or a start
        return
    TRACED.add(same)
    rng, step = jax.eval_shape(lambda: jax.random.key(0)), shapes.step
    value, out = jax.eval_shape(
        method.loss, shapes.params, shapes.extra, dict(shapes_of_batch), rng, step
    )
    assert value.shape == () and tree.flatten(out.extra).keys() == tree.flatten(shapes.extra).keys()


def held(shapes, rules, fsdp):
    """Bytes of parameters and optimizer state on a device."""
    mesh = sharding.make_mesh(data=1, fsdp=fsdp, devices=jax.devices()[:fsdp])
    placed = sharding.state_shardings(shapes, mesh, rules, note=lambda text: None)
    parts = [jax.tree.leaves((s.params, s.opt)) for s in (shapes, placed)]
    sizes = (
        math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in zip(*parts, strict=True)
    )
    return sum(sizes)


def expected(data, batch):
    """The batch's shapes as the config tells them."""
    look, text = pipeline.Look(**data["video"]), data.get("text")
    pieces = data["train"].get("pieces", 1)
    several = () if pieces == 1 else (pieces,)
    shown = look.shown if pieces == 1 else (pieces, *look.picture)
    rows = {"video": (shown, "uint8"), "valid": ((), "bool"), "id": ((), "int32")}
    if data["train"].get("label_column"):
        rows["label"] = ((), "int32")
    if text:
        kinds = dict(text="int32", text_mask="bool", maskable="bool")
        rows |= {key: ((*several, text["length"]), kind) for key, kind in kinds.items()}
    return {k: jax.ShapeDtypeStruct((batch, *s), kind) for k, (s, kind) in rows.items()}


@pytest.mark.parametrize("path", HEADERS)
def test_commands_in_headers_are_understood(path):
    text = (ROOT / path).read_text(encoding="utf-8").split('"""')[1]
    text = text.replace("\\\n", " ")
    for command in re.findall(r"python -m vtp_jax\.train (.*)", text):
        words = shlex.split(re.split(r"  +|\[", command)[0])
        spec = words[words.index("--config") + 1]
        assert Path(spec.split(":")[0]).exists()
        cli.load_config(spec, [w for w in words if w.startswith("--config.")])


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["--config.optim.lrr=1"], "lrr"),
        (["--config.stepps=1"], "stepps"),
        (["--config.steps=many"], "steps"),
        (["--config.method.name=simvpt"], "did you mean 'simvtp'"),
        (["--config.batch=15"], "batch=15 does not divide over 8 devices"),
    ],
)
def test_typos_fail_in_one_line_before_anything_compiles(overrides, told, tmp_path, monkeypatch):
    def compile_nothing(*_, **__):
        raise AssertionError("compiled")

    monkeypatch.setattr(jax.stages.Traced, "lower", compile_nothing)
    with pytest.raises(UserError, match=told) as error:
        path = "configs/simvtp/pretrain_webvid.py:tiny"
        train.main(["--config", path, "--workdir", str(tmp_path), *overrides])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "part", ["data", "data.video", "method", "optim", "mesh", "checkpoint", "log", "evals.val", ""]
)
def test_a_key_that_nothing_takes_is_named(part, tmp_path):
    config = cli.load_config("configs/simvtp/pretrain_webvid.py:tiny")
    with config.unlocked():
        inner = config
        for name in part.split(".") if part else []:
            inner = inner[name]
        inner["frobnicate"] = 1
    with pytest.raises(UserError, match="frobnicate"):
        cli.call(train.train, "config", workdir=str(tmp_path), **cli.plain(config))
