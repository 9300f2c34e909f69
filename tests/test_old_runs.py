"""Runs of earlier code: their configs load, their checkpoints restore, and they resume.

`golden/workdirs/NAME.tar.gz` is a working directory after 4 steps: config.json and one checkpoint.
`NAME.json` has what the code that wrote it read back: dtype, shape and the start of the SHA-256 of
each array, and the losses of the next two steps, which that code took. They were written at commit
23e02ca, before configs became data and the package was divided into rooms. Both stay as they are: a
change that cannot read them breaks existing runs.
"""

import hashlib
import json
import tarfile

import jax
import numpy as np
import pytest

from tests.configs import ROOT
from vtp_jax import train, tree
from vtp_jax.data import outline
from vtp_jax.run import checkpoint, metrics, sharding
from vtp_jax.setup import build, config

WORKDIRS = ROOT / "tests/golden/workdirs"
NAMES = sorted(path.stem for path in WORKDIRS.glob("*.json"))
DONE = 4  # steps
AGAIN = pytest.mark.slow(reason="compiles a step of each")


@pytest.fixture
def one_device(monkeypatch):
    one = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda **axes: one)
    return one


def unpacked(name, folder):
    """The working directory, and what was found in it."""
    with tarfile.open(WORKDIRS / f"{name}.tar.gz") as file:
        file.extractall(folder, filter="data")
    return folder, json.loads((WORKDIRS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_every_array_is_restored_under_its_name(name, tmp_path, one_device):
    """Parameters, averages or twins, queues and moments: every array of that config's current state
    is in the checkpoint, and is restored bit for bit."""
    workdir, wanted = unpacked(name, tmp_path)
    cfg = config.load(str(workdir / "config.json"))
    shapes = build.prepare(cfg, outline.describe(cfg.data, cfg.batch), one_device).shapes
    found = tree.flatten(checkpoint.restore_part(workdir, DONE, shapes))
    arrays = {name: np.asarray(x) for name, x in found.items()}
    assert wanted["arrays"] == {
        name: [str(x.dtype), list(x.shape), hashlib.sha256(x.tobytes()).hexdigest()[:16]]
        for name, x in arrays.items()
    }


@pytest.mark.parametrize(
    "name", [n if n == "simvtp" else pytest.param(n, marks=AGAIN) for n in NAMES]
)
def test_a_run_resumes_with_its_recorded_losses(name, tmp_path, one_device):
    workdir, wanted = unpacked(name, tmp_path)
    cfg = config.load(str(workdir / "config.json"), [f"--config.steps={DONE + 2}"])
    train.train(cfg, workdir)
    lines = metrics.read(workdir / "metrics.jsonl")
    losses = {str(x["step"]): x["train/loss"] for x in lines}
    assert losses.keys() == wanted["losses"].keys()
    for step, loss in losses.items():
        np.testing.assert_allclose(loss, wanted["losses"][step], rtol=1e-5)
