"""What all entries share: arguments, configs, and errors told in one line.

A config is `FILE.py`, `FILE.py:ARG` (a Python file with `get_config(arg)`; running it executes it)
or `FILE.json` (the resolved form that every run writes; data only). `--config.a.b=value` overrides
one value of it, typed as in the file.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

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
    """The locked config that `spec` names, with overrides applied."""
    path, _, argument = spec.partition(":")
    if not os.path.exists(path):
        raise UserError(f"no config file '{path}'; configs are listed in README.md")
    base = None
    if path.endswith(".json"):
        try:
            base = ConfigDict(json.loads(Path(path).read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON: {error}") from None
    argv = ["run", *([] if base is not None else [f"--config={path}:{argument}"]), *overrides]
    values = flags.FlagValues()
    # sys_argv: the overrides are found in what is given here, not in the process's arguments.
    options: dict[str, Any] = dict(lock_config=True, flag_values=values, sys_argv=argv)
    try:
        if base is None:
            config_flags.DEFINE_config_file("config", **options)
        else:
            config_flags.DEFINE_config_dict("config", base, **options)
        values(argv)
        config = values["config"].value
        assert isinstance(config, ConfigDict)
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # A KeyError's text is the repr of its message.
        message = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split())
        raise UserError(f"config {spec}: {message[:400]}") from None
    return config


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
            raise UserError(f"{where}: unknown key '{found[1]}'") from None
        raise


def find(kind: str, name: str) -> Callable[..., Any]:
    """`make` of vtp_jax.<kind>.<name>: methods, tasks and evaluators go by their file."""
    folder = Path(__file__).parent / kind.replace(".", "/")
    known = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
    if name not in known:
        raise UserError(f"no {kind}.{name}{suggest(name, known)}")
    return importlib.import_module(f"vtp_jax.{kind}.{name}").make


def suggest(word: str, known: Sequence[str]) -> str:
    """'; did you mean ...?' or the list of what is known."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def plain(config: Any) -> Any:
    """A config as plain dicts, lists and scalars: what goes into makers and JSON files."""
    if isinstance(config, ConfigDict):
        return plain(config.to_dict())
    if isinstance(config, Mapping):
        return {str(k): plain(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(v) for v in config]
    return config
