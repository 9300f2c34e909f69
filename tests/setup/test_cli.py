"""Configs and arguments: a mistake is one line that says what to do."""

import argparse
import json
import re
import subprocess
import sys

import pytest

from vtp_jax.setup import cli
from vtp_jax.types import UserError

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict(dict(
        steps=10 if arg == "tiny" else 1000,
        optim=dict(lr=1e-3, betas=(0.9, 0.95)),
        rules=[("encoder/.*", dict(lr=[0.5, 1.0])), (".*", dict())],
        name="simvtp",
        amp=False,
    ))
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture(params=["py", "json"])
def either(request, config, tmp_path):
    """The config as it is written, and as a run writes it."""
    return config if request.param == "py" else resolved(config, tmp_path)


def resolved(config, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(cli.plain(cli.load_config(config))))
    return str(path)


def test_a_config_with_its_argument_and_overrides(config):
    assert cli.load_config(config).steps == 1000
    assert cli.load_config(f"{config}:tiny").steps == 10
    changed = cli.load_config(
        f"{config}:tiny", ["--config.optim.lr=0.5", "--config.name=other", "--config.amp=true"]
    )
    assert (changed.optim.lr, changed.name, changed.amp, changed.steps) == (0.5, "other", True, 10)


def test_a_resolved_config_is_read_back_the_same(config, tmp_path):
    plain = cli.plain(cli.load_config(f"{config}:tiny"))
    assert plain["rules"] == [["encoder/.*", {"lr": [0.5, 1.0]}], [".*", {}]]
    path = resolved(f"{config}:tiny", tmp_path)
    again = cli.load_config(path)
    assert cli.plain(again) == plain
    assert cli.load_config(path, ["--config.optim.lr=2.0"]).optim.lr == 2.0
    with pytest.raises((AttributeError, KeyError)):
        again.stpes = 3  # locked


@pytest.mark.parametrize(
    "override, words",
    [
        ("--config.stpes=5", "stpes"),
        ("--config.steps=many", "many: this is to be a whole number"),
        ("--config.steps=true", "a whole number"),
        ("--config.optim.lr=fast", "fast: this is to be a number"),
        ("--config.amp=maybe", "true or false"),
        ("--config.optim.betas=0.9", "a tuple"),
        ("--config.optim.betas.2=0.9", "optim.betas has 2 places"),
        ("--config.optim=adam", "a dict"),
        ("--config.steps.peak=5", "steps is 1000, in which there are no keys"),
    ],
)
def test_wrong_overrides_are_errors(either, override, words):
    with pytest.raises(UserError, match=words) as raised:
        cli.load_config(either, [override])
    assert "\n" not in str(raised.value)


def test_what_a_config_does_not_spell_out_is_added(either):
    given = dict(
        average="0.999", fresh="()", warm_start="((r'a\\b', 'c', 'd'),)", task__name="classify",
        optim__eps="1e-8", optim__on="true", optim__off="false", optim__lr="2", optim__none="None",
    )  # fmt: skip
    told = [f"--config.{name.replace('__', '.')}={text}" for name, text in given.items()]
    found = cli.plain(cli.load_config(either, told))
    assert found["average"] == 0.999 and found["fresh"] == []
    assert found["warm_start"] == [[r"a\b", "c", "d"]]
    assert found["task"] == {"name": "classify"}
    more = dict(eps=1e-8, on=True, off=False, lr=2.0, none=None, betas=[0.9, 0.95])
    assert found["optim"] == more and type(found["optim"]["lr"]) is float


def test_a_number_is_a_place_in_a_tuple(either):
    told = ["--config.optim.betas.1=0.5", "--config.rules.0.1.lr.0=2", "--config.rules.1.1.wd=0"]
    found = cli.plain(cli.load_config(either, told))
    assert found["optim"]["betas"] == [0.9, 0.5]
    assert found["rules"] == [["encoder/.*", {"lr": [2.0, 1.0]}], [".*", {"wd": 0}]]


def test_what_configs_share_is_not_changed_for_all(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.replace("def get", "RULES = ((1, dict(wd=1)),)\ndef get").replace(
        '(".*", dict())', "RULES[0]"
    ).replace("amp=False", "more=RULES"))  # fmt: skip
    found = cli.plain(cli.load_config(str(path), ["--config.rules.1.1.wd=5"]))
    assert found["rules"][1] == [1, {"wd": 5}] and found["more"] == [[1, {"wd": 1}]]


@pytest.mark.parametrize(
    "body, told",
    [
        ("raise ValueError('no switch tinyy')", "config .*config.py:arg: no switch tinyy$"),
        ("return 1 / len(arg[:0])", r"ZeroDivisionError: .*config.py, line 2\)$"),
        ("import nothing_of_this_name", "ModuleNotFoundError: .*nothing_of_this_name"),
        ("return dict()", "gives a dict, not a ConfigDict"),
    ],
)
def test_what_a_config_raises_is_one_line(tmp_path, body, told):
    path = tmp_path / "config.py"
    path.write_text(f"def get_config(arg):\n    {body}\n")
    with pytest.raises(UserError, match=told) as raised:
        cli.load_config(f"{path}:arg")
    assert "\n" not in str(raised.value)


def test_missing_and_broken_files_are_errors(tmp_path):
    with pytest.raises(UserError, match="no config 'nowhere.py'.*; known: coca/pretrain, demo"):
        cli.load_config("nowhere.py:tiny")
    with pytest.raises(UserError, match="neither a .py nor a .json file"):
        cli.load_config(str(tmp_path))
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        cli.load_config(str(path))


def parser():
    made = argparse.ArgumentParser()
    made.add_argument("--workdir")
    return made


def test_arguments_and_overrides_are_told_apart():
    args, overrides = cli.parse(parser(), ["--config.a=1", "--workdir", "w", "--config.b.c=x=y"])
    assert args.workdir == "w" and overrides == ["--config.a=1", "--config.b.c=x=y"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--wrokdir", "w"], "'--wrokdir'; did you mean '--workdir'"),
        (["--workdir=w", "extra"], "unknown argument 'extra'"),
        (["--config.steps", "5"], "5"),
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
def test_wrong_commands_are_errors_of_one_line(argv, words):
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


def test_parts_are_found_by_their_file():
    make = cli.find("methods", "simvtp")
    assert make.__module__ == "vtp_jax.methods.simvtp" and make.__name__ == "make"
    with pytest.raises(UserError, match="no methods.simvpt; did you mean 'simvtp'"):
        cli.find("methods", "simvpt")


@pytest.mark.parametrize(
    "raised, code, words",
    [
        ("UserError('no captions file')", 2, "error: no captions file\n"),
        ("KeyboardInterrupt()", 130, "interrupted\n"),
    ],
)
def test_mistakes_end_a_process_in_one_line(raised, code, words):
    source = (
        "from vtp_jax.setup import cli\nfrom vtp_jax.types import UserError\n"
        f"def main(argv): raise {raised}\ncli.run(main, [])"
    )
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (code, words)


def test_plain_is_json(config):
    found = cli.plain(cli.load_config(config))
    assert type(found) is dict and type(found["optim"]) is dict
    assert json.loads(json.dumps(found)) == found
