"""Configs and arguments: a mistake is one line that says what to do."""

import argparse
import json
import subprocess
import sys

import pytest

from vtp_jax import cli
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
    path = tmp_path / "config.json"
    path.write_text(json.dumps(plain))
    again = cli.load_config(str(path))
    assert cli.plain(again) == plain
    assert cli.load_config(str(path), ["--config.optim.lr=2.0"]).optim.lr == 2.0
    with pytest.raises((AttributeError, KeyError)):
        again.stpes = 3  # locked


@pytest.mark.parametrize("form", ["py", "json"])
@pytest.mark.parametrize(
    "override, words",
    [
        ("--config.stpes=5", "stpes"),
        ("--config.optim.lrr=5", "lrr"),
        ("--config.steps=many", "many"),
        ("--config.optim.lr=fast", "fast"),
    ],
)
def test_wrong_overrides_are_errors(config, tmp_path, form, override, words):
    if form == "json":
        path = tmp_path / "config.json"
        path.write_text(json.dumps(cli.plain(cli.load_config(config))))
        config = str(path)
    with pytest.raises(UserError, match=words) as raised:
        cli.load_config(config, [override])
    assert "\n" not in str(raised.value)


def test_missing_and_broken_files_are_errors(tmp_path):
    with pytest.raises(UserError, match="no config file 'nowhere.py'"):
        cli.load_config("nowhere.py:tiny")
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
        "from vtp_jax import cli\nfrom vtp_jax.types import UserError\n"
        f"def main(argv): raise {raised}\ncli.run(main, [])"
    )
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (code, words)


def test_plain_is_json(config):
    found = cli.plain(cli.load_config(config))
    assert type(found) is dict and type(found["optim"]) is dict
    assert json.loads(json.dumps(found)) == found
