"""What all entries share: arguments, sub-commands, checked calls, and one-line errors."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from vtp_jax.run import pipes
from vtp_jax.run.stop import Exit, Stopped
from vtp_jax.setup import shipped
from vtp_jax.types import UserError, check_values

T = TypeVar("T")
PACKAGE = Path(__file__).parent.parent

# TensorFlow only reads data here: its messages about kernels do not concern users.
QUIET = dict(TF_CPP_MIN_LOG_LEVEL="2", TF_ENABLE_ONEDNN_OPTS="0")
# The help of --config.
CONFIG = "a name such as simvtp/pretrain_webvid, FILE.py, either with :switches, or FILE.json"
# Among the overrides of a config: it is printed, and the entry ends (`config.load`).
PRINT = "--print-config"
FLAGS = """\
flags of the config:
  --config.steps=500 --config.optim.lr.peak=1e-3 '--config.optim.betas=(0.9, 0.95)'
                 change single values, or add some; the config's file and docs/start.md name them.
                 Paths in them, as in flags, are relative to the folder of the command
  --print-config
                 print the config as it would be used, as JSON, and stop; needs --config alone
"""


def run(main: Callable[[Sequence[str]], Any], argv: Sequence[str] | None = None) -> None:
    """Runs an entry's main(argv); a user's mistake or a stop becomes one line and an exit status of
    run/stop.py. With VTP_TRACEBACK=1 in the environment, a mistake's traceback is printed too."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with pipes.watched():
        checked(main, list(sys.argv[1:] if argv is None else argv))


def checked(main: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> None:
    try:
        main(argv)
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(Exit.INTERRUPTED)
    except Exception as error:
        if (line := mistake(error)) is None:
            raise
        if os.environ.get("VTP_TRACEBACK"):
            traceback.print_exception(error)
        sys.stderr.write(f"error: {line}\n")
        sys.exit(Exit.MISTAKE)


# Of files, folders and disks: what the system says when a path is wrong or a disk is full. Others,
# such as EIO, may be the machine's fault.
PLACES = (
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EXDEV),
)


def mistake(error: BaseException) -> str | None:
    """The line that tells a user's mistake; None if the error is something else."""
    if isinstance(error, UserError):
        return " ".join(str(error).splitlines())
    if isinstance(error, OSError) and error.errno in PLACES:
        names = [repr(os.fsdecode(n)) for n in (error.filename, error.filename2) if n is not None]
        return f"{' and '.join(names) or 'a file'}: {(error.strerror or 'unusable').lower()}"
    return None


@contextlib.contextmanager
def blame(where: str) -> Iterator[None]:
    """Inside, whatever fails is due to the values of a config: an error that no check expected
    becomes a UserError that says where the values are, and where it happened."""
    try:
        yield
    except (UserError, OSError, MemoryError, Stopped):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if Path(f.filename).is_relative_to(PACKAGE)]
        at = [*frames, *own][-1]
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{where}: {text} ({at.filename}, line {at.lineno})") from error


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
    """Parses argv of an entry that takes a config, or the folder of a run, which has one; returns
    the arguments and, in their order, those on the config: `--config.x=y`, and PRINT."""
    if {"-h", "--help"} & set(argv):
        parser.epilog = "\n".join([*filter(None, [parser.epilog]), FLAGS, *list_configs(parser)])
    return split(parser, argv)


def parse_alone(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses argv of an entry that takes no config; an override among them is a UserError."""
    args, overrides = split(parser, argv)
    if overrides:
        raise UserError(f"'{overrides[0]}': {parser.prog} takes no config")
    return args


def split(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of a parser, and those on a config. The latter are taken out first: argparse
    takes one that holds a blank for the value of an option before it."""
    overrides = [a for a in argv if a.startswith("--config.") or a == PRINT]
    for at, word in enumerate(argv):
        if word.startswith("--config.") and "=" not in word:
            value = next((a for a in argv[at + 1 : at + 2] if not a.startswith("-")), "VALUE")
            raise UserError(f"'{word}' has no value; write {word}={value}")
    if PRINT in overrides and "--config" in parser._option_string_actions:
        for one in (*parser._actions, *parser._mutually_exclusive_groups):
            one.required = getattr(one, "dest", "") == "config" and one.required
    args, unknown = parser.parse_known_args([a for a in argv if a not in overrides])
    check_given(parser, args)
    if unknown:
        options = [PRINT, *(o for action in parser._actions for o in action.option_strings)]
        raise UserError(f"unknown argument '{unknown[0]}'{suggest(unknown[0], options)}")
    return args, overrides


def check_given(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raises UserError on an empty value, which a path would take for the current folder: often
    that of a variable which is not set. A list of captions may have some."""
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        several = isinstance(value, (list, tuple))
        if value == action.default or (several and action.dest == "captions"):
            continue
        if any(isinstance(one, str) and not one.strip() for one in (value if several else [value])):
            name = "/".join(action.option_strings) or action.dest
            raise UserError(f"{parser.prog}: {name} is empty; give a value, or leave it out")


def list_configs(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The configs that a parser's `--config` may name, with their switches; none without it."""
    if "--config" in parser._option_string_actions:
        yield "configs, and their switches (vtp configs NAME describes one):"
        for name, path in shipped.names().items():
            yield "  " + ":".join([name, *filter(None, [",".join(shipped.switches(path))])])


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
        return self._parsers.add_parser(
            name, help=about, description=about, formatter_class=self._parser.formatter_class
        )

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
    check_values(function, where, kwargs)
    with blame(where):
        try:
            return function(*args, **kwargs)
        except TypeError as error:  # names that `function` passes on to others
            if found := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
                hint = close(found[1], {*known, *kwargs} - {found[1]})
                raise UserError(f"{where}: unknown key '{found[1]}'{hint}") from None
            raise


def find(kind: str, name: str) -> Callable[..., Any]:
    """`make` of vtp_jax.<kind>.<name>: a method, task or evaluator is named by its file."""
    folder = Path(__file__).parent.parent / kind.replace(".", "/")
    known = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
    if name not in known:
        raise UserError(f"no {kind}.{name}{suggest(name, known)}")
    return importlib.import_module(f"vtp_jax.{kind}.{name}").make


def suggest(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...?', or the list of known words."""
    return close(word, known) or f"; known: {', '.join(sorted(known))}"


def close(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' if a known word is close, else an empty string."""
    found = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean '{found[0]}'?" if found else ""
