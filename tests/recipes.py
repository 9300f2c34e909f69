"""Goldens of recipes: the resolved values of every config with every switch, and how each parameter
is trained and split. A published number depends on each of them.

python -m tests.recipes [PART OF A NAME]...    rewrites those that have changed
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from tests.configs import ROOT, all_switches, built, config_files, file_name
from vtp_jax import tree
from vtp_jax.run import optim, sharding
from vtp_jax.setup import config

GOLDEN = Path(__file__).parent / "golden/recipes"


class Recipe(NamedTuple):
    cfg: dict[str, str]
    params: dict[str, tuple[str, str]]


def place(path: str) -> Path:
    return GOLDEN / f"{file_name(path)}.txt"


def golden(path: str) -> Path:
    """The golden of a config, which must exist."""
    file = place(path)
    assert file.exists(), f"no {file.relative_to(ROOT)}: run python -m tests.recipes {file.stem}"
    return file


def leaves(value, name="") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of everything in a config; a list of lists has one for each list."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, (list, tuple)) and any(isinstance(x, (list, tuple)) for x in value):
        for i, inner in enumerate(value):
            yield f"{name}.{i}", json.dumps(inner)
    else:
        yield name, json.dumps(value)


def number(value) -> str:
    return " ".join(map(number, value)) if np.ndim(value) else f"{float(value):.5g}"


def parameters(cfg, shapes) -> dict[str, tuple[str, str]]:
    """{name of a parameter: (shape, rate and decay and the axes that it is split over)}."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    rules = tree.flatten(optim.settings(cfg.optim["rules"], shapes.params))
    placed = sharding.state_shardings(shapes, mesh, cfg.sharding, note=lambda text: None)
    split, found = tree.flatten(placed.params), {}
    for name, leaf in tree.flatten(shapes.params).items():
        how = rules[name]
        rate = "frozen" if how.whole else f"rate {number(how.lr)}"
        if np.any(how.frozen) and not how.whole:
            rate += f", frozen {number(how.frozen)}"
        axes = ", ".join(map(str, split[name].spec)) or "whole"
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        found[name] = (shape, f"{rate}; decay {number(how.wd)}; {axes}")
    return found


def section(spec: str, found: Recipe, base: Recipe | None) -> str:
    """The text of a recipe: all of it, or, with a base, its differences from the base. Shapes of
    parameters in both are then left out: the config's size determines them."""
    cfg, params = found.cfg, found.params
    if base is None:
        shown = [f"{k}: {v}" for k, v in cfg.items()]
        shown += [f"{k}: {shape}; {rest}" for k, (shape, rest) in params.items()]
    else:
        shown = [f"{k}: {v}" for k, v in cfg.items() if base.cfg.get(k) != v]
        new = {k: v for k, v in params.items() if base.params.get(k, ("", ""))[1] != v[1]}
        shown += [f"{k}: {rest}" for k, (_, rest) in new.items()]
        shown += [f"{k}: gone" for k in base.cfg if k not in cfg]
        shown += [f"{k}: gone" for k in base.params if k not in params]
    return "\n".join([f"== {spec}", *shown]) + "\n"


def written(path: str) -> str:
    """The golden of a config: the recipe without switches, then the differences of each set."""
    base, parts = None, []
    for spec in all_switches(path):
        cfg, *_, shapes = built(spec)
        found = Recipe(dict(leaves(config.plain(config.read(spec)))), parameters(cfg, shapes))
        parts.append(section(spec, found, base))
        base = base or found
    return "\n".join(parts)


def main(parts):
    for path in config_files():
        file = place(path)
        if parts and not any(part in file.name for part in parts):
            continue
        text = written(path)
        if file.exists() and file.read_text(encoding="utf-8") == text:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(ROOT), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    with contextlib.chdir(ROOT):
        main(sys.argv[1:])
