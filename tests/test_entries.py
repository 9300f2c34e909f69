"""What all entries say of configs: in their help, in the list of configs, and printed."""

import json

import pytest

from tests.configs import ROOT, config_files, switches
from vtp_jax import __main__ as vtp
from vtp_jax import configs_list
from vtp_jax.setup import cli, config, shipped
from vtp_jax.types import UserError

NAMED = dict(
    train=[], plan=[], demo=[], bench=["step"], prepare=["shards"]
)  # entries with --config
OF_A_RUN = dict(evaluate=[], visualize=[])  # with the config of a run


def entry(name):
    return vtp.load(name).main


def shown(capsys, name, argv):
    with pytest.raises(SystemExit) as ended:
        entry(name)(argv)
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [*NAMED, *OF_A_RUN])
def test_help_names_configs_switches_and_flags(name, capsys):
    text = shown(capsys, name, [*{**NAMED, **OF_A_RUN}[name], "--help"])
    assert "--config.optim.lr.peak=1e-3" in text and cli.PRINT in text
    for config_name, path in shipped.names().items():
        told = f"{config_name}:{','.join(shipped.switches(path))}"
        assert (f"  {told}\n" in text) == (name in NAMED), told


def test_these_are_all_entries_that_take_a_config():
    """Those that call `cli.parse`: the others refuse an override, `cli.parse_alone`."""
    words = ("cli.parse(", '"--config"')
    asked = {name for name in vtp.ENTRIES if any(w in vtp.source(name).read_text() for w in words)}
    assert asked == {*NAMED, *OF_A_RUN}


@pytest.mark.parametrize("path", config_files())
def test_the_switches_of_a_header_are_those_of_the_config(path):
    assert sorted(shipped.switches(ROOT / path)) == sorted(switches(path))


@pytest.mark.parametrize("columns", [60, 80, 300])
def test_configs_are_listed_within_the_width_of_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    configs_list.main([])
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= min(columns, configs_list.WIDTH)
    blocks = [" ".join(block.split()) for block in told.split("\n\n")]
    for name, path in shipped.names().items():
        block = next(block for block in blocks if block.startswith(f"{name} "))
        assert shipped.about(path) in block and block.endswith(", ".join(shipped.switches(path)))


def test_configs_are_described(capsys):
    configs_list.main(["simvtp/pretrain_webvid:tiny"])
    assert "WebVid is no longer distributed" in capsys.readouterr().out
    with pytest.raises(UserError, match="no config 'dmeo'; did you mean 'demo'"):
        configs_list.main(["dmeo"])


@pytest.mark.parametrize("name", [*NAMED, *OF_A_RUN])
def test_the_config_is_printed_and_nothing_else_is_done(name, tmp_path, capsys, monkeypatch):
    """As JSON that is itself a config. It needs no other flag than the one that names it."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config.load("demo:tiny")._asdict()))
    monkeypatch.chdir(tmp_path)
    argv = ["--workdir", str(run)] if name in OF_A_RUN else ["--config", "demo"]
    told = ["--config.steps=7", "--config.data.workers=1", cli.PRINT]
    text = shown(capsys, name, [*NAMED.get(name, []), *argv, *told])
    (tmp_path / "printed.json").write_text(text)
    printed = config.load(str(tmp_path / "printed.json"))
    whole = config.load(str(run / "config.json") if name in OF_A_RUN else "demo", told[:2])
    assert config.plain(printed._asdict()) == config.plain(whole._asdict()) and printed.steps == 7
    assert {path.name for path in tmp_path.iterdir()} == {"run", "printed.json"}


@pytest.mark.parametrize(
    "name, argv, flag",
    [
        ("train", ["--config", "demo", "--workdir", ""], "--workdir"),
        ("train", ["--config", " ", "--workdir", "w"], "--config"),
        ("evaluate", ["--workdir="], "--workdir"),
        ("visualize", ["--workdir", "w", "--videos", "a.mp4", ""], "--videos"),
        ("report", ["--workdir", "w", "--out", ""], "--out"),
        ("prepare", ["tokenizer", "--captions", "", "--out", "o"], "--captions"),
        ("convert", ["export", "--checkpoint", "", "--format", "hf", "--out", "o"], "--checkp"),
        ("sets", ["check", "--set", "msrvtt", "--root", ""], "--root"),
        ("serve", [""], "run"),
        ("configs", [""], "name"),
    ],
)
def test_an_empty_value_is_not_the_current_folder(name, argv, flag):
    with pytest.raises(UserError, match=f"^vtp {name}.*: {flag}.* is empty; "):
        entry(name)(argv)


def test_a_caption_may_be_empty():
    with pytest.raises(UserError, match="no run in "):
        entry("visualize")(["--workdir", "/none", "--videos", "a.mp4", "--captions", ""])
