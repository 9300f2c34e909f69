"""Shared by tests against the released SimVTP models: the rule that generates the goldens' tensors,
and runs of the parity entry."""

import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-9
FILES = dict(weights="W.npz", inputs="I.npz", out="O.npz")


def make_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """fp32 values by the rule of the goldens: the tensor's official name seeds them."""
    draw = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    module = name.rpartition(".")[0]
    if name.endswith(".weight") and "norm" in module.lower():
        value = 1 + 0.1 * draw
    elif len(shape) == 1 or name == "mask_token" or name.endswith("_embeddings.weight"):
        value = 0.05 * draw
    else:
        value = draw / np.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32)


def run_entry(method: str, folder: Path, *options: str) -> dict[str, np.ndarray]:
    """The output of `python -m vtp_jax.parity METHOD` for the W.npz and I.npz of a folder."""
    files = [f"--{name}={folder / file}" for name, file in FILES.items()]
    done = subprocess.run(
        [sys.executable, "-m", "vtp_jax.parity", method, *files, *options],
        capture_output=True,
        text=True,
        cwd=GOLDEN.parents[1],
        env={**os.environ, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / FILES["out"]) as arrays:
        return dict(arrays)


def close(value: Any, scale: float = 0.0) -> Any:
    """Equal to 1e-9 of the value, or of the scale of the tensor that the value is from."""
    return pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE * scale)


def check_output(x: np.ndarray, golden: dict[str, Any]) -> None:
    """Compares an array with its recorded statistics and first and last entries."""
    assert list(x.shape) == golden["shape"]
    assert float(x.std()) == close(golden["std"])
    assert float(x.mean()) == close(golden["mean"], golden["std"])
    assert x.ravel()[:4].tolist() == close(golden["first"])
    assert x.ravel()[-4:].tolist() == close(golden["last"])


def check_probe(gradient: np.ndarray, golden: float) -> None:
    """Compares the product with a fixed draw: unlike a norm, it detects a transposed tensor."""
    draw = np.random.RandomState(4).standard_normal(gradient.size)
    assert float(gradient.ravel() @ draw) == close(golden, float(np.linalg.norm(gradient)))
