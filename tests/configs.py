"""The configs of the project, for tests that run on all of them."""

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from vtp_jax.data import outline
from vtp_jax.run import optim, sharding
from vtp_jax.setup import build, config
from vtp_jax.setup.config import Config
from vtp_jax.types import Method, Spec, State

ROOT = Path(__file__).parent.parent


def config_files() -> list[str]:
    """All files of configs/ that define get_config, relative to the root."""
    files = sorted((ROOT / "configs").rglob("*.py"))
    return [
        str(f.relative_to(ROOT)) for f in files if "def get_config" in f.read_text(encoding="utf-8")
    ]


def file_name(path: str) -> str:
    """The name of a config in its goldens."""
    return path.removeprefix("configs/").removesuffix(".py").replace("/", "_")


def switches(path: str) -> list[str]:
    """The switches of a config: the names that it passes to parse_arg."""
    text = (ROOT / path).read_text(encoding="utf-8")
    found = re.search(r"parse_arg\(\s*arg, ([^)]*)\)", text)
    return re.findall(r'"(\w+)"', found[1]) if found else []


def all_switches(path: str) -> Iterator[str]:
    """The config with every set of its switches, the empty one first. More than two switches name
    recipes: then each switch only on its own."""
    known = switches(path)
    most = len(known) if len(known) <= 2 else 1
    for n in range(most + 1):
        yield from (f"{path}:{','.join(c)}" if c else path for c in combinations(known, n))


class Built(NamedTuple):
    """The parts of a config, built from shapes."""

    cfg: Config
    facts: Mapping[str, Any]
    batch: Spec
    method: Method
    optimizer: optim.Optim
    state: State


@functools.cache
def built(spec: str) -> Built:
    """The parts of the config `spec`, relative to the root, which must be the current folder."""
    cfg = config.load(spec)
    batch, facts = outline.describe(cfg.data, cfg.batch)
    given = cfg
    if isinstance((cfg.task or {}).get("pick"), str):  # a file that tests do not have
        given = cfg._replace(task={**cfg.task, "pick": [7, 3, 5]})
    one = sharding.make_mesh(devices=jax.devices()[:1])
    parts = build.prepare(given, outline.Outline(batch, facts), one, note=lambda text: None)
    return Built(cfg, facts, batch, parts.method, parts.optimizer, parts.shapes)


def blank(**sections: Any) -> Config:
    """A config whose sections are empty, except those given."""
    empty = dict.fromkeys(("data", "method", "optim", "mesh", "evals", "checkpoint", "log"), {})
    return config.make(dict(seed=0, steps=1, batch=8, sharding=[], **empty) | sections)


def tiny_configs() -> list[str]:
    return [f"{path}:tiny" for path in config_files()]


def one_for_each(*, tasks: bool) -> list[str]:
    """The first tiny config of each method; with tasks, of each method and task. For tests whose
    compilation is expensive, which a second config of a method would only repeat."""
    configs = {p: config.load(str(ROOT / p)) for p in tiny_configs()}
    names = {p: c.task["name"] if c.task else "" for p, c in configs.items()}
    chosen: dict[tuple[str, str], str] = {}
    for path, c in configs.items():
        if tasks or not names[path]:
            chosen.setdefault((c.method["name"], names[path]), path)
    return list(chosen.values())


def slow_unless(quick: Collection[str], why: str) -> list[Any]:
    """All tiny configs as parameters of a test; those that are not in `quick` are marked slow."""
    marks = pytest.mark.slow(reason=why)
    return [p if p in quick else pytest.param(p, marks=marks) for p in tiny_configs()]
