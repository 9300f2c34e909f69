"""Every config loads with every switch and builds; every command in a config's or an entry's header
is parsed by the entry."""

import functools
import inspect
import json
import math
import re

import jax
import pytest
from ml_collections import ConfigDict, FieldReference

from tests import commands, plans, recipes
from tests.configs import ROOT, all_switches, built, config_files, switches
from tests.methods.cases import CASES
from vtp_jax import train, tree
from vtp_jax.measure import flops
from vtp_jax.run import optim, sharding
from vtp_jax.run.step import check_step, make_step
from vtp_jax.setup import build, cli, config
from vtp_jax.types import UserError


def header(path):
    """The docstring of a file, "" if it has none."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return text.split('"""')[1] if text.startswith('"""') else ""


MODULES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "vtp_jax").rglob("*.py"))
HEADERS = [*config_files(), *(p for p in MODULES if any(commands.commands(header(p))))]

SPECS = [spec for path in config_files() for spec in all_switches(path)]
PLANNED = plans.planned()
TRACED = set()


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("spec", SPECS)
def test_it_loads_and_its_rules_cover_its_parameters(spec):
    cfg, facts, shapes_of_batch, method, optimizer, shapes = built(spec)
    sharding.state_shardings(shapes, sharding.make_mesh(data=2, fsdp=2, tensor=2), cfg.sharding)
    if "tiny" in spec:  # a step must return the types of the state that it takes
        check_step(make_step(method, optimizer, 0), shapes, shapes_of_batch)
        return
    whole, spread = (held(shapes, cfg.sharding, fsdp=n) for n in (1, 8))
    left = max((name for name in whole if whole[name] == spread[name]), key=whole.__getitem__)
    total, each = sum(whole.values()), sum(spread.values())  # biases and norms stay whole
    assert total / 8 <= each < 1.1 * total / 8, f"the largest that no rule splits: {left}"
    same = json.dumps([cfg.method, cfg.task, facts, str(shapes_of_batch)])
    # The switch is about data, rates or a start; or the next test traces the whole step.
    if same in TRACED or spec in PLANNED:
        return
    TRACED.add(same)
    rng, step = jax.eval_shape(lambda: jax.random.key(0)), shapes.step
    value, out = jax.eval_shape(
        method.loss, shapes.params, shapes.extra, dict(shapes_of_batch), rng, step
    )
    assert value.shape == () and tree.flatten(out.extra).keys() == tree.flatten(shapes.extra).keys()


@pytest.mark.parametrize("path", PLANNED)
def test_memory_and_work_are_near_the_golden_plan(path):
    """The rest of the plan is compiled, by `make plan`."""
    _, _, batch, method, optimizer, shapes = built(path)
    golden = plans.expected(path)
    for name in ("params", "opt"):
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(getattr(shapes, name)))
        near = pytest.approx(getattr(golden, name), plans.LOOSE, abs=plans.DIGIT)
        assert size / golden.fsdp == near, name
    work = 2 * flops.macs(make_step(method, optimizer, 0), shapes, batch)
    work *= golden.batch / batch["valid"].shape[0]
    assert work == pytest.approx(golden.work, plans.LOOSE, abs=5e10)  # it has one decimal


@pytest.mark.parametrize("path", config_files())
def test_a_recipe_equals_its_reviewed_golden(path):
    """Any difference must be intended: `python -m tests.recipes` writes it, to be reviewed."""
    assert recipes.written(path) == recipes.golden(path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", config_files())
def test_a_bias_or_norm_decays_only_where_the_case_says_so(path):
    cfg, *_, shapes = built(path)
    found = tree.flatten(optim.settings(cfg.optim["rules"], shapes.params))
    decayed = [
        name
        for name, how in found.items()
        if re.search(r"(bias|scale)$", name) and not how.whole and how.wd
    ]
    cases = (case for case in CASES.values() if case.method == cfg.method["name"])
    assert bool(decayed) == any(case.decays_biases for case in cases), decayed


def listed(folder, numbers):
    (folder / "pick.json").write_text(json.dumps(numbers))
    return str(folder / "pick.json")


def held(shapes, rules, fsdp):
    """Bytes on a device of each parameter and moment, without tables of positions, which stay
    whole: in a small net they are a tenth."""
    mesh = sharding.make_mesh(data=1, fsdp=fsdp, devices=jax.devices()[:fsdp])
    placed = sharding.state_shardings(shapes, mesh, rules, note=lambda text: None)
    leaves, split = (tree.flatten(dict(params=s.params, opt=s.opt)) for s in (shapes, placed))
    return {
        name: math.prod(split[name].shard_shape(x.shape)) * x.dtype.itemsize
        for name, x in leaves.items()
        if not name.endswith("position")
    }


@pytest.mark.parametrize("path", HEADERS)
def test_commands_in_headers_are_parsed_by_their_entries(path, monkeypatch):
    found = list(commands.commands(header(path)))
    assert found
    for words in found:
        args, overrides = commands.check(words, monkeypatch)
        if getattr(args, "config", None):
            config.read(args.config, overrides)


@functools.cache
def warm_starts():
    """The warm starts of the configs that have one, by spec."""
    found = {spec: config.read(str(ROOT / spec)).get("warm_start") for spec in SPECS}
    return {spec: sources for spec, sources in found.items() if sources}


def test_a_warm_start_can_be_replaced_and_left_out():
    """By the overrides that warm_start.load's error and docs/start.md give."""
    assert warm_starts()
    for spec, sources in warm_starts().items():
        without = config.read(spec, ["--config.warm_start=()", "--config.fresh=()"])
        assert without.warm_start == without.fresh == (), spec
        for place, (_, *names) in enumerate(sources):
            moved = config.read(spec, [f"--config.warm_start.{place}.0=some/folder"])
            assert list(moved.warm_start[place]) == ["some/folder", *names], spec


def test_every_warm_start_loads_what_a_command_writes():
    texts = [header(path) for path in config_files()]
    texts += [p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md")]
    found = [" ".join(words) for text in texts for words in commands.commands(text)]
    written = {m for c in found for m in re.findall(r"--(?:workdir|out) (\S+)", c)}
    sources = {source[0] for sources in warm_starts().values() for source in sources}
    assert sources and sources <= written, sources - written


@pytest.mark.parametrize(
    "switch, source, dataset",
    [
        ("", "runs/videomae", "k400"),
        ("H", "runs/videomae", "k400"),
        ("ssv2", "runs/ssv2", "ssv2"),
        ("ssv2_S", "runs/ssv2", "ssv2"),
        ("ucf101", "runs/ucf101", "ucf101"),
    ],
)
def test_videomae_is_fine_tuned_from_a_run_on_the_same_videos(switch, source, dataset):
    cfg = config.read(f"configs/videomae/finetune_k400.py:{switch}")
    assert cfg.warm_start[0][0] == source and cfg.data.train.root == f"data/{dataset}"


def test_v2_keeps_the_classes_that_a_file_lists(tmp_path):
    facts = dict(mean=(0.5,) * 3, std=(0.2,) * 3)
    for size in (400, 600):
        cfg = config.load(f"configs/videomae_v2/finetune.py:g_k710_k{size}")
        assert cfg.task["pick"] == f"data/label_710to{size}.json"
        with pytest.raises(UserError, match="no file 'data/label_710to.*VideoMAE V2") as error:
            build.method(cfg, facts)
        assert "\n" not in str(error.value)
    cfg.task["pick"] = listed(tmp_path, [709, 0, 5])
    build.method(cfg, facts | dict(labels=3))
    with pytest.raises(UserError, match="has 3 classes"):
        build.method(cfg, facts | dict(labels=4))
    for wrong, message in (([710], "710 is none"), (["a"], "whole numbers"), ({"a": 1}, "no list")):
        cfg.task["pick"] = listed(tmp_path, wrong)
        with pytest.raises(UserError, match=message):
            build.method(cfg, facts)


def test_v2_tiny_needs_no_file():
    cfg = config.load("configs/videomae_v2/finetune.py:g_k710_k400,tiny")
    data = build.data(cfg.data, batch=cfg.batch, seed=0)
    build.method(cfg, data.facts)
    assert cfg.task["pick"] == [] and cfg.task["classes"] == 12


def test_blocks_are_recomputed_as_in_the_scripts():
    named = {
        "videomae/pretrain_k400": {"H"},
        "videomae/finetune_k400": {"H", "ucf101"},
        "videomae_v2/pretrain_hybrid": {"", "H"},
    }
    for name, wanted in named.items():
        path = f"configs/{name}.py"
        every = ["", *(s for s in switches(path) if s != "tiny")]
        found = {s for s in every if config.read(f"{path}:{s}").method.get("remat")}
        assert found == wanted, path
    path = "configs/videomae_v2/finetune.py"
    for switch in switches(path):
        size = config.read(f"{path}:{switch}").method
        assert switch == "tiny" or bool(size.remat) == (size.size in "Hg"), switch


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            "configs/demo.py:tinyy",
            "no switch 'tinyy'; this config has no_contrast, no_mask.*, tiny",
        ),
        ("configs/videomae/pretrain_k400.py:S,L", "L and S exclude each other; choose one"),
    ],
)
def test_a_misspelt_switch_is_a_one_line_error_of_the_config(spec, message):
    with pytest.raises(UserError, match=f"^config {spec}: {message}$"):
        config.read(spec)


@pytest.mark.parametrize("path", config_files())
def test_every_value_can_be_given_as_an_override(path):
    def leaves(value, name):
        if isinstance(value, ConfigDict) and value:
            for key in value:
                yield from leaves(value[key], f"{name}.{key}")
        else:
            yield f"{name}={value if isinstance(value, str) else repr(plain(value))}"

    def plain(value):
        """Without references to other values, as the elements of a tuple may be."""
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        return value.get() if isinstance(value, FieldReference) else value

    for spec in (path, f"{path}:tiny"):
        cfg = config.read(spec)
        given = [one for key in cfg for one in leaves(cfg[key], f"--config.{key}")]
        assert plain(config.read(spec, given).to_dict()) == plain(cfg.to_dict())


@pytest.mark.parametrize(
    "spec, override",
    [
        ("configs/videomae/pretrain_k400.py:tiny", "method.decoder_ratio=0.5"),
        ("configs/snclr/pretrain_imagenet.py:tiny", "method.threshold=0.1"),
        ("configs/omnivl/pretrain.py:tiny", "method.remat=nothing_saveable"),
    ],
)
def test_an_argument_absent_from_a_config_can_be_given(spec, override, monkeypatch):
    given = {}

    def make(**arguments):
        given.update(arguments)
        return "made"

    cfg = config.load(spec, [f"--config.{override}"])
    name, _, text = override.removeprefix("method.").partition("=")
    real = cli.find("methods", cfg.method["name"])
    make.__signature__ = inspect.signature(real)
    monkeypatch.setattr(cli, "find", lambda kind, name: make)
    assert build.part("methods", cfg.method, "config.method", {}) == "made"
    assert str(given[name]) == text


def test_averaged_weights_can_be_requested():
    cfg = config.load("configs/demo.py:tiny", ["--config.average=0.999"])
    data = build.data(cfg.data, batch=cfg.batch, seed=0)
    assert "ema/video" in build.method(cfg, data.facts).encode


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--config.optim.lrr=1"], "unknown key 'lrr'; did you mean 'lr'"),
        (["--config.optim.lr.peek=1"], "peek"),
        (["--config.method.vido_ratio=1"], "did you mean 'video_ratio'"),
        (["--config.methdo.size=B"], "did you mean 'method'"),
        (["--config.data.trian.root=DIR"], "did you mean 'train'"),
        (["--config.data.evals.vla.root=DIR"], "data.evals.vla"),
        (["--config.evals.retreival.every=1"], "evals.retreival"),
        (["--config.mesh.fdsp=1"], "did you mean 'fsdp'"),
        (["--config.log.evry=1"], "did you mean 'every'"),
        (["--config.checkpoint.evry=1"], "evry"),
        (["--config.task.nmae=classify"], "config.task"),
        (["--config.stepps=1"], "stepps"),
        (["--config.steps=many"], "steps"),
        (["--config.method.name=simvpt"], "did you mean 'simvtp'"),
        (["--config.batch=15"], "batch=15 does not divide over 8 devices"),
    ],
)
def test_typos_fail_in_one_line_before_anything_compiles(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        path = "configs/simvtp/pretrain_webvid.py:tiny"
        train.main(["--config", path, "--workdir", str(tmp_path), *overrides])
    # The first thing to compile is the state; a workdir has a config.json by then.
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "part", ["data", "data.video", "method", "optim", "mesh", "checkpoint", "log", "evals.val", ""]
)
def test_an_unknown_key_is_reported(part, tmp_path):
    cfg = config.read("configs/simvtp/pretrain_webvid.py:tiny")
    with cfg.unlocked():
        inner = cfg
        for name in part.split(".") if part else []:
            inner = inner[name]
        inner["frobnicate"] = 1
    with pytest.raises(UserError, match="frobnicate"):
        train.train(config.make(cfg), tmp_path)
