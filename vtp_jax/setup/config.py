"""Configs: the sections of a run as data, and how they are read.

A config is a name such as `simvtp/pretrain_webvid` or a `FILE.py`, either with `:ARG` (a Python
file with `get_config(arg)`; reading it executes it), or a `FILE.json` (the resolved form that every
run writes; data only). `--config.a.b=value` changes
one value, typed as in the file, or adds one: the part that takes a section checks its names. What a
Python file computes from `c.get_ref("steps")` follows when a flag changes the steps, unless a flag
sets it too; a JSON file has numbers only.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict, FieldReference

from vtp_jax import lines
from vtp_jax.run import paths
from vtp_jax.setup import auto, cli, shipped
from vtp_jax.types import UserError, at_least

Section = Mapping[str, Any]


class Config(NamedTuple):
    """The sections of a config. Each section is the keyword arguments of the part it configures,
    whose signature holds the defaults of what the section leaves out.

    seed:       of the data order and of every random draw
    steps:      training steps in all
    batch:      rows of a global batch, over all devices
    data:       `data.pipeline.make`
    method:     `name`, a file of `methods`, and the arguments of its `make`
    optim:      `run.optim.make`; `lr` is a number or the arguments of `schedules.make`
    mesh:       `run.sharding.make_mesh`
    sharding:   rules (regex, spec) on parameter names, see `run.sharding`
    evals:      by name: `type`, a file of `evals`; `every`, in steps (0: at the end alone);
                `weights="ema"` for averaged weights; and the arguments of its `make`
    checkpoint: `run.checkpoint.Checkpoints`
    log:        `train.Log`
    task:       `name`, a file of `tasks`, and the arguments of its `make`; None trains the method
                on its own loss
    average:    decay of averaged weights, or its schedule, see `run.average`; None keeps none
    warm_start: (path, from, to): sources of the weights of step 0, see `setup.warm_start`
    fresh:      regular expressions: parameters that no source of a warm start fills
    auto:       dotted names of values that are chosen from the data when a run begins, see
                `setup.auto`; until then they are as written
    """

    seed: int
    steps: int
    batch: int
    data: Section
    method: Section
    optim: Section
    mesh: Mapping[str, int]
    sharding: Sequence[Any]
    evals: Mapping[str, Section]
    checkpoint: Section
    log: Section
    task: Section | None = None
    average: float | Section | None = None
    warm_start: Sequence[Sequence[str]] = ()
    fresh: Sequence[str] = ()
    auto: Sequence[str] = ()


def load(
    spec: str, overrides: Sequence[str] = (), workdir: str | os.PathLike[str] | None = None
) -> Config:
    """The config that `spec` names, with the overrides `--config.x=y` applied in their order. If
    `cli.PRINT` is among them, it is printed and the process ends.

    workdir: of the run that is to be trained with it: what the config leaves to its data is then
    chosen, and shown. Raises UserError on a section that is unknown or missing, and as `read` and
    `auto.choose` do.
    """
    found = read(spec, overrides)
    if workdir is not None and (made := auto.choose(found, workdir)):
        auto.show(made, sys.stderr if cli.PRINT in overrides else sys.stdout)
    cfg = make(found)
    rate = cfg.optim.get("lr")
    ends = rate.get("steps", cfg.steps) if isinstance(rate, Mapping) else cfg.steps
    if ends != cfg.steps:
        logging.warning(
            "config %s: the run has %s steps, but its rate ends at step %s (optim.lr.steps)",
            spec, cfg.steps, ends,
        )  # fmt: skip
    if cli.PRINT in overrides:
        print(json.dumps(cfg._asdict(), indent=1))
        raise SystemExit(0)
    return cfg


def make(sections: Mapping[str, Any] | ConfigDict) -> Config:
    """A Config of these sections, as plain data. Raises UserError on one that is unknown or
    missing."""
    made = cli.call(Config, "config", **plain(sections))
    at_least("config", 0, steps=made.steps)
    at_least("config", 1, batch=made.batch)
    return made


def read(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """What the file of `spec` gives, with overrides applied, locked: whatever its sections.

    Raises UserError on a file that is missing or fails, on an override whose value has another
    type than the value it replaces, and on an unknown first name in one.
    """
    path, argument = locate(spec)
    if path.suffix == ".json":
        written = lines.parse(path.read_bytes(), str(path))
        if not isinstance(written, dict):
            raise UserError(f"{path} is a {type(written).__name__}; it must be an object")
        found = ConfigDict(written)
    else:
        found = execute(Path(path), argument, f"config {spec}")
    told = []
    for override in overrides:
        if override == cli.PRINT:
            continue
        name, _, text = override.removeprefix("--config.").partition("=")
        keys = name.split(".")
        if text == "auto" and name in auto.RULES:
            auto.put(found, "auto", (*given(found), name))
            continue
        # What is deeper is checked by the parts, but not every entry makes all of them.
        if keys[0] not in (sections := {*found, *Config._fields}):
            hint = cli.suggest(keys[0], sections)
            raise UserError(f"config {spec}: unknown key '{keys[0]}'{hint}")
        change(found, keys, text, "config")
        told.append(f"{name}.")
    if given(found) and "auto." not in told:  # what a flag sets is not chosen
        rest = [n for n in given(found) if not f"{n}.".startswith(tuple(told))]
        auto.put(found, "auto", tuple(rest))
    return found.lock()


def given(found: ConfigDict) -> Sequence[str]:
    """`auto` of a config that may not have it."""
    return found.get("auto") or ()  # pyright: ignore[reportReturnType]


def locate(spec: str) -> tuple[epath.Path, str]:
    """The file of a config, and its switches: what follows the last colon, unless the whole is a
    file. The file is a path, or the name of a config that comes with the package. Raises UserError,
    with a suggestion, if there is neither."""
    known = shipped.names()
    name, _, argument = spec.rpartition(":") if ":" in spec else (spec, "", "")
    if name in known:
        return epath.Path(known[name]), argument
    for one, switches in ((spec, ""), (name, argument)):
        if (one.endswith(".json") or "://" not in one) and (path := paths.path(one)).exists():
            return path, switches
    raise UserError(f"no config '{name}', neither a file nor a name{cli.suggest(name, known)}")


def execute(path: Path, argument: str, where: str) -> ConfigDict:
    """get_config(argument) of a Python file. An exception becomes a one-line UserError: a
    ValueError's own message, or the type, message and line of another error. where: the config in
    errors."""
    try:
        config = shipped.execute(path).get_config(argument)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{where}: {text} ({at.filename}, line {at.lineno})") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{where}: get_config returns a {type(config).__name__}, not a ConfigDict")
    return config


def change(value: Any, keys: Sequence[str], text: str, where: str) -> Any:
    """`value` with the entry at `keys` replaced by what `text` denotes. A number is a place in a
    tuple or list, from 0; a key that a dict lacks is added."""
    if isinstance(value, FieldReference):  # in a tuple
        value = value.get()
    if not keys:
        return parse(text, value, where)
    key, inner = keys[0], f"{where}.{keys[0]}"
    if isinstance(value, (list, tuple)):
        if not (key.isdigit() and int(key) < len(value)):
            raise UserError(f"{inner}: {where} has {len(value)} places, counted from 0")
        items = list(value)
        items[int(key)] = change(items[int(key)], keys[1:], text, inner)
        return type(value)(items)
    if value is None:
        value = ConfigDict()
    if isinstance(value, dict):  # in a tuple, which other configs may share: not in place
        return {**value, key: change(value.get(key), keys[1:], text, inner)}
    if not isinstance(value, ConfigDict):
        raise UserError(f"{inner}: {where} is {value!r}, which has no keys")
    with value.ignore_type():
        value[key] = change(value.get(key), keys[1:], text, inner)
    return value


KINDS = (  # type of the value that is replaced, types that may replace it, in words; first match
    (bool, bool, "true or false"),
    (int, int, "a whole number"),
    (float, (int, float), "a number"),
    ((list, tuple), (list, tuple), "a tuple, such as (1, 2) or ()"),
    ((dict, ConfigDict), dict, "a dict, such as {'a': 1} or {}"),
)


def parse(text: str, old: Any, where: str) -> Any:
    """The value that `text` denotes, in the type of `old`, which it replaces.

    None replaces anything; a tuple may replace a string. Where `old` is None, a Python literal is
    read as such and any other text as a string.
    """
    try:
        value = {"true": True, "false": False}.get(text)
        value = ast.literal_eval(text) if value is None else value
    except (SyntaxError, TypeError, ValueError):
        value = text
    if old is None or value is None:
        return value
    if isinstance(old, str):
        return value if isinstance(value, (list, tuple)) else text
    for kind, wanted, name in KINDS:
        if isinstance(old, kind):
            if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
                raise UserError(f"{where}={text}: it must be {name}")
            same: Any = type(old)
            return same(value)
    return value


def plain(config: Any, where: str = "config") -> Any:
    """A config as dicts, lists and scalars: what makers take and JSON files hold.

    Values that are computed from others get their number, paths become text, numpy's and JAX's
    numbers those of Python, dtypes their name. Raises UserError on what JSON cannot hold.
    """
    if isinstance(config, FieldReference):
        return plain(config.get(), where)
    if isinstance(config, ConfigDict):
        return plain(config.to_dict(), where)
    if isinstance(config, Mapping):
        return {str(k): plain(v, f"{where}.{k}") for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(v, f"{where}.{i}") for i, v in enumerate(config)]
    if config is None or type(config) in (bool, int, float, str):
        return config
    if isinstance(config, os.PathLike):
        return os.fspath(config)
    if isinstance(config, (bool, int, float, str)):  # an IntEnum, a numpy.float64
        kinds = (bool, int, float, str)
        return next(kind(config) for kind in kinds if isinstance(config, kind))
    if isinstance(config, (np.generic, np.ndarray, jax.Array)):
        return plain(np.asarray(config).tolist(), where)
    with contextlib.suppress(TypeError):
        if not (dtype := np.dtype(config)).hasobject:
            return dtype.name
    kind = type(config).__name__
    raise UserError(f"{where} is a {kind}, which config.json cannot hold; write it as plain data")
