"""What a config computes from its steps or its batch follows when a flag changes them."""

import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.configs import ROOT, all_switches, config_files
from vtp_jax import schedules
from vtp_jax.setup import config
from vtp_jax.types import UserError

IN_STEPS = ("steps", "warmup", "at")  # arguments of schedules that count steps
SPECS = [spec for path in config_files() for spec in all_switches(path)]


def read(spec, **given):
    told = [f"--config.{name.replace('__', '.')}={value}" for name, value in given.items()]
    return config.plain(config.read(str(ROOT / spec), told))


def in_steps(cfg):
    """{name: value} of every number of steps in every schedule of a config."""
    if not isinstance(cfg, dict):
        return {}
    scheduled = cfg.get("kind") in schedules.KINDS
    own = {k: np.asarray(v) for k, v in cfg.items() if scheduled and k in IN_STEPS}
    inner = {f"{k}.{name}": v for k, x in cfg.items() for name, v in in_steps(x).items()}
    return own | inner


@pytest.mark.parametrize("spec", SPECS)
def test_schedules_keep_their_shares_of_a_run_of_other_steps(spec):
    """A tenth of the steps: warm-up and decay take a tenth too, and end with the run."""
    whole = read(spec)
    steps = max(whole["steps"] // 10, 5)
    part = read(spec, steps=steps)
    assert part["steps"] == steps
    before, after = in_steps(whole), in_steps(part)
    assert before and before.keys() == after.keys()
    for name in before:
        wanted = before[name] * steps / whole["steps"]
        np.testing.assert_allclose(after[name], wanted, atol=1, rtol=0, err_msg=name)
    schedules.make(part["optim"]["lr"])


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "tiny" not in spec])
def test_epochs_and_rates_are_those_of_another_batch(spec):
    """Twice the rows: half the steps, if the config counts epochs, and twice the rate, if it is
    for a number of clips."""
    once = read(spec)
    twice = read(spec, batch=2 * once["batch"])
    path = spec.partition(":")[0]
    source = (ROOT / path).read_text() + "".join(
        (ROOT / f"configs/{name}.py").read_text()
        for name in re.findall(r'shipped.module\("(.*)"\)', (ROOT / path).read_text())
    )
    if re.search(r"c\.steps = .*epoch", source):
        assert twice["steps"] == pytest.approx(once["steps"] / 2, rel=0.05)
    rates = [c["optim"]["lr"].get("peak") for c in (once, twice)]
    if "per_clips" in source and "answer" not in path:
        assert rates[1] == pytest.approx(2 * rates[0])
    for name, value in in_steps(twice).items():
        wanted = in_steps(once)[name] * twice["steps"] / once["steps"]
        np.testing.assert_allclose(value, wanted, atol=1, rtol=0, err_msg=name)


@pytest.mark.parametrize("flags", [("steps", "lr"), ("lr", "steps")])
def test_what_a_flag_sets_follows_nothing(flags):
    told = dict(steps="--config.steps=500", lr="--config.optim.lr.steps=700")
    cfg = config.read(str(ROOT / "configs/videomae/pretrain_k400.py"), [told[f] for f in flags])
    assert (cfg.steps, cfg.optim.lr.steps, cfg.optim.lr.warmup) == (500, 700, 12)


def test_a_number_in_a_tuple_follows_and_is_set():
    spec = str(ROOT / "configs/tvtsv2/pretrain_yt_webvid.py")
    cfg = config.plain(config.read(spec, ["--config.optim.lr.at.0=50", "--config.steps=100"]))
    assert cfg["optim"]["lr"]["at"] == [50, 80]


def test_a_rate_that_ends_at_another_step_is_reported(tmp_path, caplog):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(read("configs/videomae/pretrain_k400.py:tiny")))
    with caplog.at_level("WARNING"):
        config.load(str(path), ["--config.steps=200"])
    assert "200 steps, but its rate ends at step 20" in caplog.text


def test_values_that_json_has_not():
    """Paths, numbers of numpy and JAX, and dtypes are what a config may well hold."""
    given = dict(
        root=pathlib.Path("a/b"), rate=np.float32(0.5), steps=np.int64(3), on=np.True_,
        scale=jnp.float32(2), both=np.arange(2), dtype=jnp.bfloat16, other=np.dtype("float32"),
        kind=np.float64, most=np.float64(0.25),
    )  # fmt: skip
    found = config.plain(given)
    assert found == dict(
        root="a/b", rate=0.5, steps=3, on=True, scale=2.0, both=[0, 1], dtype="bfloat16",
        other="float32", kind="float64", most=0.25,
    )  # fmt: skip
    plain = (str, int, float, bool, list)
    assert all(type(value) in plain for value in found.values())
    with pytest.raises(UserError, match=r"^config\.a\.1\.b is a function, which"):
        config.plain(dict(a=[0, dict(b=read)]))
    with pytest.raises(UserError, match=r"^config\.a is a set, which"):
        config.plain(dict(a={1}))
    with pytest.raises(UserError, match=r"^config\.a is a type, which"):
        config.plain(dict(a=UserError))
