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
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ml_collections import ConfigDict

from vtp_jax.setup import shipped
from vtp_jax.types import UserError

T = TypeVar("T")

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


CONFIG = "a name such as simvtp/pretrain_webvid, FILE.py, either with :switches, or FILE.json"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")


def parser(name: str, about: str | None) -> Parser:
    """The parser of the entry `vtp NAME`, described by `about`, its docstring."""
    return Parser(
        prog=f"vtp {name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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


def parse_alone(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses argv of an entry that takes no config; an override among them is a UserError."""
    args, overrides = parse(parser, argv)
    if overrides:
        raise UserError(f"'{overrides[0]}': {parser.prog} takes no config")
    return args


class Commands:
    """The sub-commands of an entry, each with a parser and a function of its own.

        commands = cli.Commands("convert", __doc__)
        command = commands.add("formats", show, "list what can be imported")
        command.add_argument(...)
        commands.run(argv)

    A function takes the parsed arguments. If its parser has an option `--config`, the list of
    `--config.x=y` overrides is in `args.overrides`; otherwise an override is an error.
    """

    def __init__(self, name: str, about: str | None):
        self._parser = parser(name, about)
        self._parsers = self._parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
        self._functions: dict[str, Callable[[argparse.Namespace], Any]] = {}

    def add(
        self, name: str, function: Callable[[argparse.Namespace], Any], about: str
    ) -> argparse.ArgumentParser:
        """The parser of a new command, to which its arguments are added. about: one line."""
        self._functions[name] = function
        return self._parsers.add_parser(name, help=about, description=about)

    def run(self, argv: Sequence[str]) -> Any:
        """Calls the function of the command that argv[0] names, with the arguments after it."""
        if argv and argv[0] in ("-h", "--help"):
            return self._parser.print_help()
        function = choose(self._parser.prog, "command", argv[0] if argv else "", self._functions)
        chosen = self._parsers.choices[argv[0]]
        if "--config" not in chosen._option_string_actions:
            return function(parse_alone(chosen, argv[1:]))
        args, args.overrides = parse(chosen, argv[1:])
        return function(args)


def choose(where: str, kind: str, name: str, known: Mapping[str, T]) -> T:
    """known[name]. Raises UserError with a suggestion if `name` is not known, or empty."""
    if name not in known:
        missing = f"no {kind} '{name}'" if name else f"which {kind}?"
        raise UserError(f"{where}: {missing}{suggest(name, known)}")
    return known[name]


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config that `spec` names, with overrides applied, the last ones last."""
    name, _, argument = spec.partition(":")
    path = locate(name)
    if path.suffix == ".json":
        try:
            config = ConfigDict(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON: {error}") from None
    else:
        config = execute(path, argument, f"config {spec}")
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


def locate(name: str) -> Path:
    """The file of a config: a path, or the name of a config that comes with the package. Raises
    UserError, with a suggestion, if there is neither."""
    known = shipped.names()
    if name in known:
        return known[name]
    if os.path.exists(name):
        return Path(name)
    raise UserError(f"no config '{name}', neither a file nor a name{suggest(name, known)}")


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
