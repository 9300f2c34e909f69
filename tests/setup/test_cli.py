"""Arguments and calls: a mistake is a one-line error that states what to do."""

import argparse
import errno
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from vtp_jax.setup import cli
from vtp_jax.types import UserError


def parser():
    made = argparse.ArgumentParser()
    made.add_argument("--workdir")
    return made


def test_arguments_and_overrides_are_separated():
    args, overrides = cli.parse(parser(), ["--config.a=1", "--workdir", "w", "--config.b.c=x=y"])
    assert args.workdir == "w" and overrides == ["--config.a=1", "--config.b.c=x=y"]


@pytest.mark.parametrize(
    "told", ["--config.x={'a': 1}", "--config.x=(1, 2)", "--config.x=a b", "--config.x= -1"]
)
def test_an_override_with_blanks_is_no_value_of_the_option_before_it(told):
    made = parser()
    made.add_argument("--videos", nargs="+")
    args, overrides = cli.parse(made, ["--videos", "a.mp4", "b.mp4", told, "--workdir", "w"])
    assert (args.videos, args.workdir, overrides) == (["a.mp4", "b.mp4"], "w", [told])


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--wrokdir", "w"], "'--wrokdir'; did you mean '--workdir'"),
        (["--workdir=w", "extra"], "unknown argument 'extra'"),
        (["--config.steps", "5"], "has no value; write --config.steps=5$"),
        (["--config.steps"], "has no value; write --config.steps=VALUE"),
    ],
)
def test_wrong_arguments_are_errors(argv, words):
    with pytest.raises(UserError, match=words):
        cli.parse(parser(), argv)


def test_required_arguments_are_reported_in_one_line():
    needed = cli.parser("train", None)
    needed.add_argument("--workdir", required=True)
    with pytest.raises(UserError, match="^vtp train: .*required: --workdir$"):
        cli.parse(needed, [])


def commands(seen):
    """An entry with a command that takes a config and one that takes none."""
    made = cli.Commands("tool", "A tool.\n\n    vtp tool step")
    command = made.add("step", lambda args: seen.append((args.config, args.overrides)), "one step")
    command.add_argument("--config", required=True)
    made.add("remove", lambda args: seen.append(args.all), "none left").add_argument(
        "--all", action="store_true"
    )
    return made


def test_a_command_gets_its_own_arguments(capsys):
    seen = []
    commands(seen).run(["step", "--config", "c.py", "--config.a=1"])
    commands(seen).run(["remove", "--all"])
    assert seen == [("c.py", ["--config.a=1"]), True]
    commands(seen).run(["--help"])
    shown = capsys.readouterr().out
    assert len(seen) == 2 and "    vtp tool step" in shown
    assert re.search(r"step +one step\n +remove +none left", shown)


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "^vtp tool: which command..*known: remove, step$"),
        (["stpe"], "^vtp tool: no command 'stpe'; did you mean 'step'"),
        (["--config.a=1"], "^vtp tool: no command '--config.a=1'"),
        (["step", "--confg.a=1", "--config", "c"], "unknown argument '--confg.a=1'"),
        (["step", "--config.a=1"], "^vtp tool step: .*required: --config$"),
        (["remove", "--al=3"], "vtp tool remove: "),
        (["remove", "--lla"], "unknown argument '--lla'; did you mean '--all'"),
        (["remove", "--config.a=1"], "'--config.a=1': vtp tool remove takes no config"),
    ],
)
def test_wrong_commands_are_one_line_errors(argv, words):
    seen = []
    with pytest.raises(UserError, match=words) as raised:
        commands(seen).run(argv)
    assert not seen and "\n" not in str(raised.value)


def target(a, /, b, *, lr=0.1, depth):
    return a, b, lr, depth


def test_call_checks_names_before_calling():
    assert cli.call(target, "config.x", 1, b=2, depth=3) == (1, 2, 0.1, 3)
    with pytest.raises(UserError, match="config.x: unknown key 'dpeth'; did you mean 'depth'"):
        cli.call(target, "config.x", 1, b=2, dpeth=3)
    with pytest.raises(UserError, match="config.x: the key 'depth' is missing"):
        cli.call(target, "config.x", 1, b=2)
    assert cli.call(lambda **rest: rest, "config.x", anything=1) == {"anything": 1}
    # What no check expected is told with its place; VTP_TRACEBACK=1 shows all of it.
    with pytest.raises(UserError, match="config.x: ZeroDivisionError: .*py, line") as caught:
        cli.call(lambda every: 1 // every, "config.x", every=0)
    assert "\n" not in str(caught.value) and isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_method_is_found_by_the_name_of_its_file():
    make = cli.find("methods", "simvtp")
    assert make.__module__ == "vtp_jax.methods.simvtp" and make.__name__ == "make"
    with pytest.raises(UserError, match="no methods.simvpt; did you mean 'simvtp'"):
        cli.find("methods", "simvpt")


@pytest.mark.parametrize(
    "raised, code, words",
    [
        ("UserError('no captions file')", 2, "error: no captions file\n"),
        ("KeyboardInterrupt()", 130, "interrupted\n"),
        (
            "stop.Stopped(960, 2400, stop.Exit.RESTART)",
            75,
            "stopped by SIGTERM: saved step 960 of 2400; the same command goes on from there\n",
        ),
    ],
)
def test_mistakes_end_a_process_in_one_line(raised, code, words):
    source = (
        "from vtp_jax.run import stop\nfrom vtp_jax.setup import cli\n"
        "from vtp_jax.types import UserError\n"
        f"def main(argv): raise {raised}\ncli.run(main, [])"
    )
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (code, words)


def outcome(error, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(main, [])
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "number, line",
    [
        (errno.ENOTDIR, "'a/b': not a directory"),
        (errno.EISDIR, "'a/b': is a directory"),
        (errno.EACCES, "'a/b': permission denied"),
        (errno.ENOSPC, "'a/b': no space left on device"),
        (errno.ENAMETOOLONG, "'a/b': file name too long"),
        (errno.ELOOP, "'a/b': too many levels of symbolic links"),
    ],
)
def test_what_the_system_says_of_a_path_is_one_line(number, line, capsys):
    assert outcome(OSError(number, os.strerror(number), "a/b"), capsys) == (2, f"error: {line}\n")


def test_the_machines_own_faults_keep_their_traceback():
    for error in (OSError(errno.EIO, "Input/output error"), RuntimeError("x"), KeyError("x")):

        def main(argv, error=error):
            raise error

        with pytest.raises(type(error)):
            cli.run(main, [])


def test_a_traceback_is_shown_on_request(monkeypatch, capsys):
    monkeypatch.setenv("VTP_TRACEBACK", "1")
    code, told = outcome(UserError("two\nlines"), capsys)
    assert code == 2 and told.startswith("Traceback") and told.endswith("error: two lines\n")


def shaped(*, size: int, names: Sequence[str] = (), rate: float | None = None, **more: Any):
    return size


@pytest.mark.parametrize(
    "given, told",
    [
        (dict(size="x"), "config.x.size='x': it must be a whole number"),
        (dict(size=2.0), "config.x.size=2.0: it must be a whole number"),
        (dict(size=True), "config.x.size=True: it must be a whole number"),
        (dict(size=1, names="abc"), "config.x.names='abc': it must be a list"),
        (dict(size=1, names=(1,)), "it must be a list"),
        (dict(size=1, rate="x"), "config.x.rate='x': it must be a number or None"),
        (dict(size={}), "size={}: it must be a whole number"),
    ],
)
def test_values_fit_the_annotations(given, told):
    with pytest.raises(UserError, match=re.escape(told)):
        cli.call(shaped, "config.x", **given)


def test_values_that_fit_are_passed_on():
    for given in (dict(size=1, rate=2), dict(size=np.int64(1), names=["a"], rate=None, other={})):
        assert cli.call(shaped, "config.x", **given) == 1
