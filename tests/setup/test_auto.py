"""Values that a config leaves to its data: what is chosen fits the data, a flag wins, a run keeps
what it began with, and what is computed from a choice follows it."""

import json
import math

import jax
import numpy as np
import pytest

from tests.configs import ROOT
from vtp_jax.data import kept, pipeline, shapes, traits
from vtp_jax.data.open import open_set
from vtp_jax.setup import auto, build, config
from vtp_jax.types import UserError

PLAN = shapes.Plan(train=40, val=2, side=48, frames=12)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("own") / "videos"
    shapes.write(out, PLAN)
    return out


def told(corpus, *more):
    where = [f"--config.data.train.{k}={v}" for k, v in
             dict(root=corpus, list=corpus / "train.csv").items()]  # fmt: skip
    return [*where, *(f"--config.{one}" for one in more)]


@pytest.fixture(scope="module")
def chosen(corpus, tmp_path_factory):
    """The config of new videos, as it is chosen for them."""
    return config.load("own", told(corpus), tmp_path_factory.mktemp("new"))


def test_choices_fit_the_videos_and_the_devices(chosen, capsys):
    look, made = chosen.data["video"], chosen.method
    assert chosen.auto == [] and jax.default_backend() == "cpu"
    # All of a video of 1.5 s, and no more frames or pixels than it has.
    assert (look["frames"] - 1) * look["stride"] < PLAN.frames
    assert look["frames"] * look["stride"] > PLAN.frames // 2 and look["size"] == PLAN.side
    assert not look["frames"] % made["cube"][0] and not look["size"] % made["cube"][1]
    assert chosen.batch % jax.device_count() == 0 and made["dtype"] == "float32"
    assert 20_000 <= chosen.steps * chosen.batch < 20_000 + chosen.batch


def test_all_captions_fit_and_their_words_are_pieces(chosen):
    data = pipeline.make(**{**chosen.data, "workers": 1}, batch=8, seed=0)
    text = dict(chosen.data["text"])
    clips = open_set("data.train", "files", chosen.data["train"], "train")
    counts = auto.tokens.train(
        traits.captions(clips.source), None, text["vocab_size"]
    ).count(traits.captions(clips.source))  # fmt: skip
    assert counts.max() <= text["length"] < counts.max() + 8
    assert data.facts["vocab_size"] <= text["vocab_size"]
    assert data.rows + data.streams["val"].rows == PLAN.train


def test_what_is_computed_from_a_choice_follows_it(chosen):
    rate = chosen.optim["lr"]
    assert rate["steps"] == chosen.steps and rate["warmup"] == chosen.steps // 20
    assert chosen.checkpoint["every"] == chosen.evals["val"]["every"] == chosen.steps // 10 + 1


def test_a_flag_wins_and_later_choices_rest_on_it(corpus, tmp_path, capsys):
    flags = ["steps=30", "data.video={'frames': 4, 'stride': 1, 'size': 32}", "batch=16"]
    cfg = config.load("own", told(corpus, *flags), tmp_path)
    assert (cfg.steps, cfg.batch) == (30, 16) and cfg.optim["lr"]["steps"] == 30
    assert cfg.data["video"] == dict(frames=4, stride=1, size=32)
    assert cfg.method["cube"] == [2, 4, 4]
    shown = capsys.readouterr().out
    assert "chosen from the data" in shown and "optim.lr.peak" in shown
    assert not any(line.split()[0] in ("steps", "batch") for line in shown.splitlines())
    wider = config.load("own", told(corpus, "batch=64"), tmp_path)
    ratio = wider.optim["lr"]["peak"] / cfg.optim["lr"]["peak"]
    assert ratio == pytest.approx(math.sqrt(64 / 16), rel=0.1)


def test_a_run_that_has_begun_keeps_its_choices(corpus, tmp_path, capsys):
    """Without reading the data again, which may have grown."""
    begun = config.load("own", told(corpus, "steps=30"), tmp_path)
    changed = begun._replace(data={**begun.data, "text": {**begun.data["text"], "length": 40}})
    (tmp_path / "config.json").write_text(json.dumps(changed._asdict()))
    data = pipeline.make(**{**begun.data, "evals": {}}, batch=8, seed=0)
    kept.save(tmp_path, data.keep, resumed=False)
    capsys.readouterr()
    again = config.load("own", ["--config.data.train.root=gone", "--config.steps=50"], tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("values that were chosen from the data are as this run began")
    assert again.data["text"]["length"] == 40 and again.method == begun.method
    words = data.facts["vocab_size"], str(tmp_path / "tokenizer.model")
    assert (again.data["text"]["vocab_size"], again.data["text"]["path"]) == words
    assert again.steps == 50 and again.optim["lr"]["steps"] == 50


def test_any_config_may_leave_a_value_to_its_data(tmp_path):
    path = str(ROOT / "configs/simvtp/pretrain_webvid.py:tiny")
    cfg = config.load(path, ["--config.data.text.length=auto"], tmp_path)
    assert cfg.auto == [] and cfg.data["text"]["length"] % 8 == 0
    assert cfg.data["text"]["length"] != config.load(path).data["text"]["length"]
    # Names of parts are not among them, and where no data is read the file's value holds.
    plain = ["--config.method.attention=auto", "--config.batch=auto"]
    cfg = config.load(path, plain)
    assert (cfg.method["attention"], cfg.batch, cfg.auto) == ("auto", 16, ["batch"])
    with pytest.raises(UserError, match="'step' cannot be chosen.*; did you mean 'steps'"):
        config.load(path, ["--config.auto=('step',)"], tmp_path)


def test_videos_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "a.mp4").write_text("junk")
    (tmp_path / "a.txt").write_text("a dog\n")
    flags = [f"--config.data.train.root={tmp_path}", "--config.data.train.held_out=0"]
    with pytest.raises(UserError, match="none of 1 videos can be read, such as '.*a.mp4'"):
        config.load("own", flags, tmp_path / "run")


@pytest.mark.parametrize("longest", [6, 8, 63, 64, 65, 400])
def test_long_captions_are_kept_as_far_as_it_pays(longest):
    lengths = np.full(1000, 6)
    lengths[0] = longest

    survey = auto.Survey(None)
    survey.tokens = lengths
    length, why = auto.choose_length(survey, None)
    assert length == (-(-longest // 8) * 8 if longest <= 64 else 8)
    assert str(longest) in why


def test_a_config_of_one_network_is_built_from_every_choice(chosen):
    mesh = build.mesh(chosen, jax.devices()[:1])
    data = pipeline.make(**{**chosen.data, "workers": 1}, batch=8, seed=0)
    parts = build.prepare(chosen, data, mesh)
    assert parts.shapes.params
