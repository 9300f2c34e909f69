"""Video-text pretraining in JAX: SimVTP and its published relatives on shared parts.

run = vtp_jax.load("runs/mine")    # docs/python.md
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtp_jax.api import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Not before it is used: `vtp --help` does not wait for JAX.
    if name == "load":
        return importlib.import_module("vtp_jax.api").load
    raise AttributeError(f"module 'vtp_jax' has no attribute '{name}'")
