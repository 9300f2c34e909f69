"""Arguments and calls: a mistake is a one-line error that states what to do."""

import argparse
import re
import subprocess
import sys

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
    with pytest.raises(TypeError):  # a fault inside is not a user's mistake
        cli.call(lambda: len(3), "config.x")  # pyright: ignore[reportArgumentType]


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
