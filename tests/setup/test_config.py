"""Configs: their sections and defaults, files and overrides; a mistake is a one-line error."""

import json

import pytest

from vtp_jax.setup import config
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
def path(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture(params=["py", "json"])
def either(request, path, tmp_path):
    """The config as it is written, and as a run writes it."""
    return path if request.param == "py" else resolved(path, tmp_path)


def resolved(spec, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(config.plain(config.read(spec))))
    return str(path)


def test_a_config_with_its_argument_and_overrides(path):
    assert config.read(path).steps == 1000
    assert config.read(f"{path}:tiny").steps == 10
    changed = config.read(
        f"{path}:tiny", ["--config.optim.lr=0.5", "--config.name=other", "--config.amp=true"]
    )
    assert (changed.optim.lr, changed.name, changed.amp, changed.steps) == (0.5, "other", True, 10)


def test_a_resolved_config_is_read_back_the_same(path, tmp_path):
    plain = config.plain(config.read(f"{path}:tiny"))
    assert plain["rules"] == [["encoder/.*", {"lr": [0.5, 1.0]}], [".*", {}]]
    written = resolved(f"{path}:tiny", tmp_path)
    again = config.read(written)
    assert config.plain(again) == plain
    assert config.read(written, ["--config.optim.lr=2.0"]).optim.lr == 2.0
    with pytest.raises((AttributeError, KeyError)):
        again.stpes = 3  # locked


@pytest.mark.parametrize(
    "override, words",
    [
        ("--config.stpes=5", "stpes"),
        ("--config.steps=many", "many: it must be a whole number"),
        ("--config.steps=true", "a whole number"),
        ("--config.optim.lr=fast", "fast: it must be a number"),
        ("--config.amp=maybe", "true or false"),
        ("--config.optim.betas=0.9", "a tuple"),
        ("--config.optim.betas.2=0.9", "optim.betas has 2 places"),
        ("--config.optim=adam", "a dict"),
        ("--config.steps.peak=5", "steps is 1000, which has no keys"),
    ],
)
def test_wrong_overrides_are_errors(either, override, words):
    with pytest.raises(UserError, match=words) as raised:
        config.read(either, [override])
    assert "\n" not in str(raised.value)


def test_overrides_can_add_values_that_a_config_omits(either):
    given = dict(
        average="0.999", fresh="()", warm_start="((r'a\\b', 'c', 'd'),)", task__name="classify",
        optim__eps="1e-8", optim__on="true", optim__off="false", optim__lr="2", optim__none="None",
    )  # fmt: skip
    told = [f"--config.{name.replace('__', '.')}={text}" for name, text in given.items()]
    found = config.plain(config.read(either, told))
    assert found["average"] == 0.999 and found["fresh"] == []
    assert found["warm_start"] == [[r"a\b", "c", "d"]]
    assert found["task"] == {"name": "classify"}
    more = dict(eps=1e-8, on=True, off=False, lr=2.0, none=None, betas=[0.9, 0.95])
    assert found["optim"] == more and type(found["optim"]["lr"]) is float


def test_a_number_is_a_place_in_a_tuple(either):
    told = ["--config.optim.betas.1=0.5", "--config.rules.0.1.lr.0=2", "--config.rules.1.1.wd=0"]
    found = config.plain(config.read(either, told))
    assert found["optim"]["betas"] == [0.9, 0.5]
    assert found["rules"] == [["encoder/.*", {"lr": [2.0, 1.0]}], [".*", {"wd": 0}]]


def test_values_shared_by_configs_are_not_changed_for_all(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.replace("def get", "RULES = ((1, dict(wd=1)),)\ndef get").replace(
        '(".*", dict())', "RULES[0]"
    ).replace("amp=False", "more=RULES"))  # fmt: skip
    found = config.plain(config.read(str(path), ["--config.rules.1.1.wd=5"]))
    assert found["rules"][1] == [1, {"wd": 5}] and found["more"] == [[1, {"wd": 1}]]


@pytest.mark.parametrize(
    "body, told",
    [
        ("raise ValueError('no switch tinyy')", "config .*config.py:arg: no switch tinyy$"),
        ("return 1 / len(arg[:0])", r"ZeroDivisionError: .*config.py, line 2\)$"),
        ("import nothing_of_this_name", "ModuleNotFoundError: .*nothing_of_this_name"),
        ("return dict()", "get_config returns a dict, not a ConfigDict"),
    ],
)
def test_an_error_raised_by_a_config_is_one_line(tmp_path, body, told):
    path = tmp_path / "config.py"
    path.write_text(f"def get_config(arg):\n    {body}\n")
    with pytest.raises(UserError, match=told) as raised:
        config.read(f"{path}:arg")
    assert "\n" not in str(raised.value)


def test_missing_and_broken_files_are_errors(tmp_path):
    with pytest.raises(UserError, match="no config 'nowhere.py'.*; known: coca/pretrain, demo"):
        config.read("nowhere.py:tiny")
    with pytest.raises(UserError, match="neither a .py nor a .json file"):
        config.read(str(tmp_path))
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        config.read(str(path))


def test_plain_is_json(path):
    found = config.plain(config.read(path))
    assert type(found) is dict and type(found["optim"]) is dict
    assert json.loads(json.dumps(found)) == found


SECTIONS = dict(
    seed=0, steps=1, batch=2, data={}, method={}, optim={}, mesh={}, sharding=[], evals={},
    checkpoint={}, log={},
)  # fmt: skip


def test_sections_that_a_config_leaves_out_have_their_defaults():
    cfg = config.make(SECTIONS)
    assert (cfg.task, cfg.average, cfg.warm_start, cfg.fresh) == (None, None, (), ())
    assert config.make(json.loads(json.dumps(cfg._asdict())))._asdict() == config.plain(
        cfg._asdict()
    )


@pytest.mark.parametrize("name", SECTIONS)
def test_a_missing_or_misspelt_section_is_reported(name):
    sections = {key: value for key, value in SECTIONS.items() if key != name}
    with pytest.raises(UserError, match=f"^config: the key '{name}' is missing$"):
        config.make(sections)
    with pytest.raises(UserError, match=f"^config: unknown key '{name}s'; did you mean '{name}'"):
        config.make({**sections, f"{name}s": SECTIONS[name]})
