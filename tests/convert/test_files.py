"""Files are read back bit for bit; wrappers, folders and values."""

import argparse
import collections
import json
import os
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest

from tests.convert.crafted import (
    MAKERS,
    STORAGES,
    TENSORS,
    A,
    B,
    call,
    equal,
    name,
    number,
    rejected,
    storage,
    table,
    tensor,
    torch_stream,
    torch_zip,
)
from vtp_jax.convert import files, torch_files
from vtp_jax.types import UserError


@pytest.mark.parametrize("kind", MAKERS)
def test_the_kind_of_a_file_is_recognised_by_its_content(tmp_path, kind):
    MAKERS[kind](tmp_path / kind)
    path = (tmp_path / kind).rename(tmp_path / "weights")
    file = files.read(path)
    assert list(file.tensors) == ["a", "b"] and file.wrappers == file.dropped == ()
    assert equal(file.tensors["a"], A) and equal(file.tensors["b"], B)
    assert file.sha256.keys() == {"weights"} and len(file.sha256["weights"]) == 64


# Round trips -------------------------------------------------------------------------------------


def random_bits(dtype, shape):
    """Any bits, NaNs with payloads and denormals among them."""
    if dtype.kind == "b":
        return np.random.default_rng(0).integers(0, 2, shape).astype(bool)
    count = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(np.random.default_rng(1).bytes(count), dtype).reshape(shape)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_what_is_written_is_read_bit_for_bit(tmp_path, suffix):
    lacking = {".safetensors": "complex128", ".npz": "float8"}[suffix]
    tensors = {
        f"{dtype.name}.{len(shape)}": random_bits(dtype, shape)
        for dtype in torch_files.DTYPES.values()
        for shape in [(), (0, 3), (5,), (2, 3, 4)]
        if not dtype.name.startswith(lacking)
    }
    tensors["file"] = np.asfortranarray(A)  # a name that numpy.savez reserves
    metadata = {"format": "pt", "quote": '"ü"'}
    path = tmp_path / f"x{suffix}"
    files.write(path, tensors, metadata)
    file = files.read(path)
    assert list(file.tensors) == list(tensors) and file.metadata == metadata
    for key, x in tensors.items():
        assert equal(file.tensors[key], x), key
    first = path.read_bytes()
    files.write(path, file.tensors, metadata)
    assert path.read_bytes() == first


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_other_byte_orders_become_native(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    files.write(path, {"a": A.astype(">f4")})
    assert equal(files.read(path).tensors["a"], A)


def test_npz_files_written_by_numpy_are_read(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", a=A.T, b=B.astype(">i8"), note="text", none="")
    file = files.read(tmp_path / "x.npz")
    assert equal(file.tensors["a"], A.T) and equal(file.tensors["b"], B)
    assert file.dropped == ("note", "none")
    half = A.astype(ml_dtypes.bfloat16)
    files.write(tmp_path / "y.npz", {"a": A, "half": half})
    with np.load(tmp_path / "y.npz", allow_pickle=False) as arrays:
        assert equal(arrays["a"], A) and arrays["half"].tobytes() == half.tobytes()


def test_safetensors_are_aligned(tmp_path):
    files.write(tmp_path / "x.safetensors", {"a": np.zeros(3, np.uint8), "b": A, "c": B})
    data = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for key, x in {"b": A, "c": B}.items():
        start = json.loads(data[8 : 8 + length])[key]["data_offsets"][0]
        assert start % x.itemsize == 0
        assert data[8 + length + start :][: x.nbytes] == x.tobytes()


def test_a_failed_write_leaves_the_existing_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    files.write(path, {"a": A})
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*x.safetensors: No space left"):
        files.write(path, {"a": A + 1})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(
    "where, tensors, words",
    [
        ("x.onnx", {"a": A}, ".safetensors, .npz, .pth"),
        ("none/x.npz", {"a": A}, "No such file"),
        ("x.npz", {"a": np.array([None])}, "object"),
        ("x.npz", {"a": np.array("text")}, "<U4"),
        ("x.npz", {"__metadata__": A}, "__metadata__"),
        ("x.npz", {"a": A.astype(ml_dtypes.float8_e5m2)}, "no dtype float8_e5m2"),
        ("x.safetensors", {"a": A.astype(complex)}, "no dtype complex128"),
    ],
)
def test_what_cannot_be_written_is_rejected(tmp_path, where, tensors, words):
    with pytest.raises(UserError, match=words):
        files.write(tmp_path / where, tensors)
    assert not os.listdir(tmp_path)


def test_reading_needs_no_torch_and_writing_reports_that_it_does(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch fails
    for kind, make in MAKERS.items():
        make(tmp_path / kind)
        files.read(tmp_path / kind)
    with pytest.raises(UserError, match=r"vtp_jax\[torch\]"):
        files.write(tmp_path / "y.pth", {"a": A})
    assert not (tmp_path / "y.pth").exists()


# Wrappers, folders, values -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "tree, wrappers, dropped",
    [
        ({"model": TENSORS, "args": b"N", "epoch": number(3)}, ("model",), ("args", "epoch")),
        ({"module": TENSORS, "optimizer": b"N"}, ("module",), ("optimizer",)),
        ({"model": {"size": number(1)}, "state_dict": TENSORS}, ("state_dict",), ("model",)),
        ({"x": b"N", "teacher": {"model": TENSORS}}, ("teacher", "model"), ("x",)),
        ({f"module._orig_mod.{k}": v for k, v in TENSORS.items()}, ("module.", "_orig_mod."), ()),
        (
            {"model": {f"_orig_mod.module.{k}": v for k, v in TENSORS.items()}},
            ("model", "_orig_mod.", "module."),
            (),
        ),
        ({**TENSORS, "scale": call(name("numpy", "ndarray"), number(2))}, (), ("scale",)),
    ],
)
def test_wrappers_are_removed(tmp_path, tree, wrappers, dropped):
    def build(node):
        return node if isinstance(node, bytes) else table({k: build(v) for k, v in node.items()})

    file = files.read(torch_zip(tmp_path / "x.pth", build(tree), STORAGES))
    assert file.wrappers == wrappers and file.dropped == dropped
    assert {k: x.tolist() for k, x in file.tensors.items()} == {"a": A.tolist(), "b": B.tolist()}


def test_a_prefix_that_not_all_names_have_is_kept(tmp_path):
    files.write(tmp_path / "x.npz", {"module.a": A, "b": B})
    file = files.read(tmp_path / "x.npz")
    assert list(file.tensors) == ["module.a", "b"] and file.wrappers == ()


def test_training_arguments_are_ignored(tmp_path):
    """What VideoMAE and DeepSpeed save in addition to the weights, pickled as Python does it."""
    beside = dict(
        args=argparse.Namespace(lr=1e-3, sizes={1, 2}, raw=b"ab", none=b"", scale=np.float64(2)),
        optimizer=collections.defaultdict(dict, {0: [1, (2,)]}),
        order=collections.OrderedDict(a=frozenset([1])),
        big=2**70,
        own=np.arange(6.0).reshape(2, 3).T,
    )
    for protocol in (2, 3, 4):
        path = torch_zip(tmp_path / f"{protocol}.pth", pickle.dumps(beside, protocol)[2:-1])
        file = files.read(path)
        assert equal(file.tensors["own"], np.ascontiguousarray(beside["own"]))
        assert file.dropped == ("args", "optimizer", "order", "big")


def test_strides_offsets_and_shared_storages_are_read(tmp_path):
    place = storage("0", 6)
    entries = {
        "a": tensor(place, (2, 3), (3, 1)),
        "transposed": tensor(place, (3, 2), (1, 3)),
        "column": tensor(place, (2,), (3,), offset=1),
        "scalar": tensor(place, (), (), offset=5),
        "expanded": tensor(place, (4, 3), (0, 1)),
        "empty": tensor(place, (0, 7), (7, 1)),
    }
    for path in (
        torch_zip(tmp_path / "zip.pth", table(entries), STORAGES),
        torch_stream(tmp_path / "stream.pth", table(entries), {"0": STORAGES["0"]}),
    ):
        got = files.read(path).tensors
        assert np.array_equal(got["transposed"], A.T) and np.array_equal(got["column"], A[:, 1])
        assert got["scalar"].shape == () and got["scalar"] == 5
        assert np.array_equal(got["expanded"], np.tile(A[0], (4, 1))) and got["empty"].shape == (
            0,
            7,
        )
        assert np.shares_memory(got["a"], got["transposed"])


def test_a_folder_is_read_by_its_index_or_rejected(tmp_path):
    rejected(tmp_path, "name the file itself")
    torch_zip(tmp_path / "mp_rank_00_model_states.pt", table({"module": table(TENSORS)}), STORAGES)
    assert files.read(tmp_path).wrappers == ("module",)
    (tmp_path / "mp_rank_01_model_states.pt").touch()
    rejected(tmp_path, "merge them first")
    (tmp_path / "mp_rank_01_model_states.pt").unlink()

    index = tmp_path / "model.safetensors.index.json"
    files.write(tmp_path / "m-1.safetensors", {"module.a": A})
    files.write(tmp_path / "m-2.safetensors", {"b": B})
    places = {"module.a": "m-1.safetensors", "b": "m-2.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    file = files.read(tmp_path)
    assert set(file.tensors) == {"module.a", "b"} and set(file.sha256) == set(places.values())
    for bad, words in {
        '{"weight_map": {"b": "m-2.safetensors", "c": "m-2.safetensors"}}': "disagree on where c",
        '{"weight_map": {"b": "m-1.safetensors"}}': "disagree",
        '{"weight_map": {"b": "../m-2.safetensors"}}': "no name of a file in its own folder",
        '{"weight_map": {"b": "m-3.safetensors"}}': "m-3.safetensors: No such file",
        '{"weight_map": {"b": "."}}': "no name of a file in its own folder",
        '{"weight_map": {"b": ["a"]}}': "no name of a file in its own folder",
        "[]": "must be an object",
    }.items():
        index.write_text(bad)
        with pytest.raises(UserError, match=words):
            files.read(index)

    files.write(tmp_path / "model.safetensors", {"a": A})
    assert list(files.read(tmp_path).tensors) == ["a"]


def test_tensors_that_are_not_finite_are_reported():
    bad = A.copy()
    bad[0, 0] = np.nan
    fine = {"a": A, "b": B, "mask": A > 1, "half": A.astype(ml_dtypes.bfloat16)}
    files.check_finite(fine, "x.npz")
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2):
        with pytest.raises(UserError, match="x.npz has .* in bad, inf$"):
            files.check_finite(
                {**fine, "bad": bad.astype(dtype), "inf": np.array(np.inf, np.float16)}, "x.npz"
            )
    with pytest.raises(UserError, match="and 3 more$"):
        files.check_finite({f"{i}": bad for i in range(8)}, "x.npz")
