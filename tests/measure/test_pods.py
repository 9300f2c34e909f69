"""Absent pods: what describing one needs, and slices as one mesh."""

import importlib.util

import pytest

from vtp_jax.measure import pods
from vtp_jax.run import sharding
from vtp_jax.types import UserError


def test_the_error_names_the_compiler_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'"):
        pods.find_pod("v5e:4x4")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (Linux, x86-64)"
)
def test_slices_are_one_mesh_with_rows_over_the_slices():
    pod = pods.find_pod("v5e:2x2", slices=2)
    mesh = sharding.make_mesh(data=-1, fsdp=4, devices=pod.devices)
    assert [len({d.slice_index for d in row}) for row in mesh.devices.reshape(2, 4)] == [1, 1]
    with pytest.raises(UserError, match="data=1 does not divide over 2 slices"):
        sharding.make_mesh(data=1, fsdp=8, devices=pod.devices)
