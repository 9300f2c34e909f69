"""`python -m vtp_jax.parity` as users run it: in a process of its own, with XLA's usual passes."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
FILES = dict(weights="W.npz", inputs="I.npz", out="O.npz")


def run_entry(
    method: str,
    folder: Path,
    weights: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    *options: str,
) -> dict[str, np.ndarray]:
    """The arrays that the entry writes for these weights and inputs; files go into the folder."""
    np.savez(folder / FILES["weights"], **weights)  # pyright: ignore[reportArgumentType]
    np.savez(folder / FILES["inputs"], **inputs)  # pyright: ignore[reportArgumentType]
    files = [f"--{name}={folder / file}" for name, file in FILES.items()]
    done = subprocess.run(
        [sys.executable, "-m", "vtp_jax.parity", method, *files, *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / FILES["out"]) as arrays:
        return dict(arrays)
