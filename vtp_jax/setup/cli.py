"""What all entries share: arguments, configs, and errors told in one line.

A config is `FILE.py`, `FILE.py:ARG` (a Python file with `get_config(arg)`; running it executes it)
or `FILE.json` (the resolved form that every run writes; data only). `--config.a.b=value` changes
one value of it, typed as in the file, or adds one: who takes the section checks its names.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vtp_jax.types import UserError

# TensorFlow only reads data here; its lines about kernels it might use are not for our users.
QUIET = dict(TF_CPP_MIN_LOG_LEVEL="2", TF_ENABLE_ONEDNN_OPTS="0")


def run(main: Callable[[Sequence[str]], Any], argv: Sequence[str] | None = None) -> None:
    """Runs an entry's main(argv); a UserError becomes one line and exit code 2."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        main(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """The parser of the entry `python -m vtp_jax.<name>`, described by its first line."""
    return argparse.ArgumentParser(
        prog=f"python -m vtp_jax.{name}", description=(about or "").split("\n")[0]
    )


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parses argv; returns the arguments and the `--config.x=y` overrides among them."""
    args, rest = parser.parse_known_args(list(argv))
    overrides = [a for a in rest if a.startswith("--config.")]
    if unknown := [a for a in rest if a not in overrides]:
        options = [o for action in parser._actions for o in action.option_strings]
        raise UserError(f"unknown argument '{unknown[0]}'{suggest(unknown[0], options)}")
    if wrong := [a for a in overrides if "=" not in a]:
        raise UserError(f"'{wrong[0]}' has no value; write {wrong[0]}=VALUE")
    return args, overrides


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config that `spec` names, with overrides applied, the last ones last."""
    path, _, argument = spec.partition(":")
    if not os.path.exists(path):
        raise UserError(f"no config file '{path}'; docs/methods.md lists them")
    if path.endswith(".json"):
        try:
            config = ConfigDict(json.loads(Path(path).read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON: {error}") from None
    else:
        config = execute(path, argument)
    for override in overrides:
        name, _, text = override.removeprefix("--config.").partition("=")
        keys = name.split(".")
        if keys[0] not in config:
            # Makers check the names of what is deeper, but not all entries look at every section.
            train = importlib.import_module("vtp_jax.train").train
            sections = {*config, *inspect.signature(train).parameters} - {"workdir"}
            if keys[0] not in sections:
                hint = suggest(keys[0], sections)
                raise UserError(f"config {spec}: unknown key '{keys[0]}'{hint}")
        change(config, keys, text, "config")
    return config.lock()


def execute(path: str, argument: str) -> ConfigDict:
    """get_config(argument) of a Python file. What it raises is told in one line: a ValueError's own
    words, and where another error arose."""
    where = f"config {path}:{argument}" if argument else f"config {path}"
    found = importlib.util.spec_from_file_location("_config", path)
    if found is None or found.loader is None:
        raise UserError(f"{where}: neither a .py nor a .json file")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look there for what their annotations name
    try:
        found.loader.exec_module(module)
        config = module.get_config(argument)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{where}: {told} ({at.filename}, line {at.lineno})") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{where}: get_config gives a {type(config).__name__}, not a ConfigDict")
    return config


def change(value: Any, keys: Sequence[str], text: str, where: str) -> Any:
    """`value`, in which that to which `keys` lead is what `text` says. A number is a place in a
    tuple or list, from 0; what a dict lacks is added."""
    if not keys:
        return read(text, value, where)
    key, inner = keys[0], f"{where}.{keys[0]}"
    if isinstance(value, (list, tuple)):
        if not (key.isdigit() and int(key) < len(value)):
            raise UserError(f"{inner}: {where} has {len(value)} places, counted from 0")
        items = list(value)
        items[int(key)] = change(items[int(key)], keys[1:], text, inner)
        return type(value)(items)
    if value is None:
        value = ConfigDict()
    if isinstance(value, dict):  # in a tuple: it may be another config's too
        return {**value, key: change(value.get(key), keys[1:], text, inner)}
    if not isinstance(value, ConfigDict):
        raise UserError(f"{inner}: {where} is {value!r}, in which there are no keys")
    with value.ignore_type():
        value[key] = change(value.get(key), keys[1:], text, inner)
    return value


KINDS = (  # what stands there, what may come instead, what it is called; the first that fits
    (bool, bool, "true or false"),
    (int, int, "a whole number"),
    (float, (int, float), "a number"),
    ((list, tuple), (list, tuple), "a tuple, such as (1, 2) or ()"),
    ((dict, ConfigDict), dict, "a dict, such as {'a': 1} or {}"),
)


def read(text: str, old: Any, where: str) -> Any:
    """What `text` says, in the type of what it replaces. None is None everywhere; a string gives
    way to a tuple, too; and where nothing stands, Python's literals count, and all else is a
    string."""
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
                raise UserError(f"{where}={text}: this is to be {name}")
            same: Any = type(old)
            return same(value)
    return value


def call(function: Callable[..., Any], where: str, /, *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs) after checking the names against its signature, so that a typo in a
    config is an error that names the key, before anything is built."""
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in kwargs:
        if name not in known and not takes_any:
            raise UserError(f"{where}: unknown key '{name}'{suggest(name, known)}")
    positional = {p.name for p in list(parameters)[: len(args)]}
    for p in parameters:
        missing = p.default is p.empty and p.name not in kwargs and p.name not in positional
        if missing and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            raise UserError(f"{where}: the key '{p.name}' is missing")
    try:
        return function(*args, **kwargs)
    except TypeError as error:  # names that `function` passes on to others
        if found := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
            hint = close(found[1], {*known, *kwargs} - {found[1]})
            raise UserError(f"{where}: unknown key '{found[1]}'{hint}") from None
        raise


def find(kind: str, name: str) -> Callable[..., Any]:
    """`make` of vtp_jax.<kind>.<name>: methods, tasks and evaluators go by their file."""
    folder = Path(__file__).parent.parent / kind.replace(".", "/")
    known = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
    if name not in known:
        raise UserError(f"no {kind}.{name}{suggest(name, known)}")
    return importlib.import_module(f"vtp_jax.{kind}.{name}").make


def suggest(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' or the list of what is known."""
    return close(word, known) or f"; known: {', '.join(sorted(known))}"


def close(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' where one is like it."""
    found = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean '{found[0]}'?" if found else ""


def plain(config: Any) -> Any:
    """A config as plain dicts, lists and scalars: what goes into makers and JSON files."""
    if isinstance(config, ConfigDict):
        return plain(config.to_dict())
    if isinstance(config, Mapping):
        return {str(k): plain(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(v) for v in config]
    return config
