"""Parameters for tests that need no particular initialisation. They are drawn by numpy: compiling
an `init` takes longer than most tests."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vtp_jax import tree


def fill(init: Callable[..., Any], *args: Any, seed: int = 0) -> Any:
    """Arrays of the shapes and dtypes of init(*args), which is only traced. Scales are drawn around
    1, everything else around 0; the deviation of a matrix is 1 / sqrt(its number of inputs)."""
    rng = np.random.default_rng(seed)

    def draw(name: str, x: jax.ShapeDtypeStruct) -> np.ndarray:
        wide = 1 / np.sqrt(max(x.shape[-2], 16)) if len(x.shape) > 1 else 0.1
        return (name.endswith("scale") + wide * rng.standard_normal(x.shape)).astype(x.dtype)

    return tree.map_named(draw, jax.eval_shape(init, *args))
