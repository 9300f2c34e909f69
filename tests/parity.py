"""`python -m vtp_jax.parity` on arrays: in this process, or as users run it, in one of its own with
XLA's usual passes."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vtp_jax import parity

ROOT = Path(__file__).parents[1]
FILES = dict(weights="W.npz", inputs="I.npz", out="O.npz")


def run_entry(
    method: str,
    folder: Path,
    weights: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    *options: str,
    process: bool = False,
) -> dict[str, np.ndarray]:
    """The arrays that the entry writes for these weights and inputs; files go into the folder.
    process: whether it runs in a process of its own."""
    np.savez(folder / FILES["weights"], **weights)  # pyright: ignore[reportArgumentType]
    np.savez(folder / FILES["inputs"], **inputs)  # pyright: ignore[reportArgumentType]
    files = [f"--{name}={folder / file}" for name, file in FILES.items()]
    if process:
        run_process([method, *files, *options])
    else:
        parity.main([method, *files, *options])
    with np.load(folder / FILES["out"]) as arrays:
        return dict(arrays)


def run_process(argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vtp_jax.parity", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
    )
    assert done.returncode == 0, done.stderr
