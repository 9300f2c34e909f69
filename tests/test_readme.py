"""The commands of README.md run as they stand, in its order, on small stand-ins for what it names;
flags that make nets and runs small are added at their ends."""

import json
import re
import shlex
import shutil

import jax
import numpy as np
import pytest

from tests.configs import ROOT
from tests.convert import small
from vtp_jax import __main__ as vtp
from vtp_jax.convert import files
from vtp_jax.data import shapes, sources
from vtp_jax.run import metrics, sharding

# Commands that are not run here, by their first words, and why.
EXCEPTED = {
    "make demo": "trains for ten minutes: tests/test_demo.py runs its stages on a tiny config",
    "make test": "runs this test",
    "pip install": "installs JAX for a machine that this is not",
}
NET = ["--config.method.size=(32, 1, 1, 64)", "--config.method.decoder=(32, 1, 1, 64)"]
FEW = [
    "--config.steps=2", "--config.batch=8", "--config.data.workers=1",
    "--config.data.video.size=16", "--config.data.video.frames=2",
]  # fmt: skip
SMALL = {
    "vtp train --config own": [*NET, *FEW],
    "vtp train --config simvtp/pretrain_webvid:scratch": [*NET, *FEW],
    "vtp convert import": [f"--{name}={small.HEADS[name]}" for name in ("heads", "decoder-heads")],
}
OWN = "Your own videos"


def sections():
    """{heading: the lines of its commands}, of code without a language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.*)$", text, flags=re.M)
    found = {}
    for head, body in zip(parts[1::2], parts[2::2], strict=True):
        blocks = "".join(re.findall(r"^```\n(.*?)^```", body, re.M | re.S))
        if lines := [line for line in blocks.replace("\\\n", " ").splitlines() if line.strip()]:
            found[head] = lines
    return found


def run(line):
    """A command as a shell would run it, with the flags that make it small."""
    words = shlex.split(line, comments=True)
    assert words[0] == "vtp", f"nothing runs '{line}'; is it one of EXCEPTED?"
    told = " ".join(words)
    more = [flag for start, flags in SMALL.items() if told.startswith(start) for flag in flags]
    vtp.load(words[1]).main([*words[2:], *more])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that README.md names, and no others."""
    plan = shapes.Plan(train=24, val=2, side=32, frames=4)
    shapes.write(tmp_path / "DIR", plan, workers=1)
    (tmp_path / "DIR/train.csv").rename(tmp_path / "mine.csv")
    for name, clip in (("a.mp4", "val/00000.mp4"), ("b.mp4", "val/00001.mp4")):
        (tmp_path / "DIR" / clip).rename(tmp_path / name)
    listed = dict(sources.read_captions(tmp_path / "mine.csv"))
    (tmp_path / "webvid.json").write_text(json.dumps(listed))
    vocabulary = [f"[unused{n}]" for n in range(30_522)]
    for n, piece in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}.items():
        vocabulary[n] = piece
    words = sorted({word for caption in listed.values() for word in caption.split()})
    vocabulary[1000 : 1000 + len(words)] = words
    (tmp_path / "data").mkdir()
    (tmp_path / "data/bert-base-uncased-vocab.txt").write_text("\n".join(vocabulary) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_lines_for_your_own_videos_run(folder, monkeypatch, capsys):
    one = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda **axes: one)
    for line in sections()[OWN]:
        run(line)
    out = capsys.readouterr().out
    assert "chosen from the data" in out and "2 videos and 2 answers drawn" in out
    lines = metrics.read(folder / "runs/mine/metrics.jsonl")
    assert lines[-1]["step"] == 2 and any("eval/retrieval/t2v_r1" in line for line in lines)
    last = [line for line in lines if "data/cut" in line][-1]
    assert last["data/cut"] == 0 < last["data/captions"] and np.isfinite(last["train/loss"])
    assert sorted(p.name for p in (folder / "runs/mine/pictures").glob("*.png"))


def test_every_command_is_run_or_has_a_reason():
    for head, lines in sections().items():
        for line in lines:
            known = any(line.startswith(start) for start in EXCEPTED)
            assert known or re.match(r"vtp [a-z]", line), f"{head}: {line}"
    everything = "\n".join(line for lines in sections().values() for line in lines)
    assert all(start in everything for start in (*EXCEPTED, *SMALL)), "of lines that are gone"


@pytest.mark.slow(reason="compiles three nets, and proves a conversion")
def test_all_commands_run_one_after_the_other(folder):
    tensors, *_ = small.tensors_of("videomae")
    files.write(folder / "w.safetensors", tensors)
    shutil.move(folder / "w.safetensors", folder / "checkpoint.pth")  # read by content, not by name
    for line in (line for lines in sections().values() for line in lines):
        if not any(line.startswith(start) for start in EXCEPTED):
            run(line)
    assert (folder / "runs/simvtp/checkpoints/2").is_dir()
    assert any((folder / "exported").iterdir()) and any((folder / "weights/videomae_b").iterdir())
