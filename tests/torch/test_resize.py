"""Position tables against PyTorch's own bicubic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtp_jax.nn import resize

torch = pytest.importorskip("torch")
side = st.integers(1, 20)


@given(st.tuples(side, side), st.tuples(side, side))
def test_grids_are_resized_as_interpolate_does(old, new):
    table = np.random.default_rng(0).standard_normal((1 + old[0] * old[1], 3))
    grid = torch.from_numpy(table[1:]).reshape(1, *old, 3).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(grid, new, mode="bicubic", align_corners=False)
    ours = resize.grid_positions(table, old, new)[1:].reshape(*new, 3)
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), atol=1e-12)
