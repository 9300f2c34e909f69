"""TensorBoard and Weights & Biases: one curve over restarts, pictures, settings."""

import subprocess
import sys
import time
import types

import numpy as np
import pytest

from vtp_jax.run import boards, metrics
from vtp_jax.types import UserError

CONFIG = dict(steps=6, optim=dict(lr=dict(peak=0.1), rules=[(".*", {})]), task=None)
PICTURE = np.full((4, 6, 3), 9, np.uint8)


def live(folder, first, last, **more):
    with metrics.Writer(folder, first, boards.start(folder, first, CONFIG, **more)) as writer:
        for step in range(first + 1, last + 1):
            writer.write(step, {"train/loss": step / 2 - first, "eval/a/n_videos": 8.0})
        writer.pictures(last, {"restored/0": PICTURE})


def events_of(folder):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), {"tensors": 0})
    found.Reload()
    return found


@pytest.mark.parametrize("earlier", [0, 900])
def test_a_resumed_run_goes_on_in_the_same_curve(tmp_path, monkeypatch, earlier):
    """Killed at step 5, restored at 3: of steps 4 and 5 only the second values are there. earlier:
    files of this process, whose number is in their names."""
    from tensorboard.summary.writer import event_file_writer
    from tensorboard.util.tensor_util import make_ndarray

    number = event_file_writer.AtomicCounter(earlier)
    monkeypatch.setattr(event_file_writer, "_global_uid", number)
    live(tmp_path, 0, 5)
    time.sleep(1.1)  # files are read in the order of their seconds
    live(tmp_path, 3, 6)
    found = events_of(tmp_path)
    curve = [(e.step, make_ndarray(e.tensor_proto).item()) for e in found.Tensors("train/loss")]
    assert curve == [(1, 0.5), (2, 1.0), (3, 1.5), (4, -1.0), (5, -0.5), (6, 0.0)]
    assert [x["train/loss"] for x in metrics.read(tmp_path / "metrics.jsonl")] == [
        loss for _, loss in curve
    ]
    assert [e.step for e in found.Tensors("restored/0")] == [6]


def test_curves_come_before_constants_and_settings_are_shown(tmp_path):
    live(tmp_path, 0, 1)
    found = events_of(tmp_path)
    tags = [tag for tag in sorted(found.Tags()["tensors"]) if not tag.startswith("_")]
    assert tags == ["restored/0", "train/loss", "~constants/eval/a/n_videos"]
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optim.lr.peak" in content and b"optim.rules" in content


def test_settings_are_plain():
    assert dict(boards.flat(CONFIG)) == {
        "steps": 6, "optim.lr.peak": 0.1, "optim.rules": "[('.*', {})]", "task": "None",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, constant",
    [("eval/retrieval/n_videos", True), ("data/failed/absent", True), ("train/lr", False)]
    + [("eval/retrieval/t2v_r1", False), ("train/in_data/x", False)],
)
def test_what_is_a_constant(name, constant):
    assert boards.tag(name) == (f"~constants/{name}" if constant else name)


class FakeRun:
    def __init__(self, arguments):
        self.arguments, self.logged, self.ended = arguments, [], False
        self.id = arguments.get("id") or "abc"
        self.config = types.SimpleNamespace(update=lambda settings, **_: settings.update())

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.ended = True


def test_wandb_is_a_board_whose_run_goes_on(tmp_path, monkeypatch):
    runs = []

    def init(**arguments):
        runs.append(FakeRun(arguments))
        return runs[-1]

    fake = types.SimpleNamespace(init=init, Image=lambda image: ("image", image.shape))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(boards, "tensorboard", lambda *_: None)
    given = dict(project="mine", tags=["a"])
    boards.check(given)
    live(tmp_path, 0, 2, wandb=given)
    live(tmp_path, 2, 3, wandb=given)
    one, two = runs
    assert one.arguments == dict(dir=str(tmp_path), id=None, resume="allow", **given)
    assert two.arguments == {**one.arguments, "id": "abc"} and one.ended and two.ended
    assert [step for step, _ in one.logged] == [1, 2, 2]
    assert one.logged[0][1] == {"train/loss": 0.5, "~constants/eval/a/n_videos": 8.0}
    assert one.logged[-1][1] == {"restored/0": ("image", (4, 6, 3))}
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_that_is_not_installed_is_an_error_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    boards.check(None)
    with pytest.raises(UserError, match="pip install wandb"):
        boards.check(dict(project="mine"))


def test_without_tensorflow_there_is_a_note_and_a_file(tmp_path):
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from absl import logging; logging.set_verbosity('info')\n"
        "from vtp_jax.run import boards\n"
        f"assert boards.start({str(tmp_path)!r}, 0, {{}}) == []"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("TensorFlow is not installed") == 1
    assert not (tmp_path / "tensorboard").exists()
