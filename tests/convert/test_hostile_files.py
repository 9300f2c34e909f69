"""Nothing in a file can run, hide or exhaust the memory; damage is detected."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.convert.crafted import (
    MAKERS,
    STORAGES,
    TENSORS,
    A,
    B,
    call,
    equal,
    many,
    name,
    number,
    pickled,
    rejected,
    storage,
    table,
    tensor,
    text,
    torch_stream,
    torch_zip,
)
from vtp_jax.convert import files, torch_files
from vtp_jax.types import UserError

# Malice: pickles ---------------------------------------------------------------------------------


class Evil(NamedTuple):
    body: bytes
    words: str


def evil(trap):
    """Pickles that create the file `trap`, or try to, by every means a pickle has."""
    command = text(f"touch {trap}")
    system = name("os", "system")
    reduced = pickle.dumps(Reduced(str(trap)), 2)[2:-1]
    return {
        "system": Evil(call(system, command), "os.system"),
        "posix": Evil(call(name("posix", "system"), command), "posix.system"),
        "eval": Evil(
            call(name("builtins", "eval"), text(f"open({str(trap)!r}, 'w')")), "builtins.eval"
        ),
        "python 2": Evil(call(name("__builtin__", "exec"), text("1")), "builtins.exec"),
        "reduce": Evil(reduced, "open"),
        "getattr": Evil(
            call(name("builtins", "getattr"), name("os", "path"), text("os")), "getattr"
        ),
        "dotted": Evil(name("collections", "OrderedDict.fromkeys"), "OrderedDict.fromkeys"),
        "in torch": Evil(call(name("torch.serialization", "os.system"), command), "os.system"),
        "stack": Evil(text("os") + text("system") + b"\x93" + many(command) + b"R", "os.system"),
        "joined": Evil(text("os system") + text("") + b"\x93", "os.system"),
        "inst": Evil(b"(" + command + b"ios\nsystem\n", "INST"),
        "obj": Evil(b"(" + system + command + b"o", "os.system"),
        "newobj": Evil(name("subprocess", "Popen") + many(command) + b"\x81", "subprocess.Popen"),
        "extension": Evil(b"\x82\x01", "EXT1"),
        "module": Evil(name("torch.nn.modules.linear", "Linear") + b")\x81", "torch.nn.modules"),
        "load": Evil(call(name("numpy", "load"), text("x.npy")), "numpy.load"),
        "torch.load": Evil(call(name("torch", "load"), text("x")), "torch.load"),
        "from bytes": Evil(
            call(name("torch.storage", "_load_from_bytes"), text("x")), "_load_from"
        ),
        "partial": Evil(call(name("functools", "partial"), system, command), "functools.partial"),
        "not a function": Evil(call(text("os.system"), command), "damaged"),
        "its instance": Evil(call(call(name("argparse", "Namespace")), command), "damaged"),
        "factory": Evil(call(name("collections", "defaultdict"), system), "os.system"),
        "state of a call": Evil(name("torch", "Size") + b"}b", "gives a state"),
        "setitem of a call": Evil(name("torch", "Size") + text("a") + b"Ns", "not a dictionary"),
        "append to a call": Evil(name("torch", "Size") + b"Na", "not a list"),
        "objects": Evil(call(name("numpy", "dtype"), text("O8"), b"\x89", b"\x88"), "'O8'"),
        "structured": Evil(call(name("numpy", "dtype"), text("V8"), b"\x89", b"\x88"), "'V8'"),
        "persistent": Evil(text("http://x") + b"Q", "odd storages"),
        "persistent module": Evil(
            many(text("module"), b"N", text("a"), text("b"), number(1)) + b"Q", "odd storages"
        ),
        "deep key": Evil(b"}" + b"N" + b"2\x86" * 64 + b"Ns", "DUP"),
        "deeper key": Evil(b"}" + b"N" + b"q\x01h\x01\x86" * 64 + b"Ns", "not plain data"),
        "self key": Evil(b"}q\x01h\x01Ns", "not plain data"),
    }


class Reduced:
    def __init__(self, trap):
        self.trap = trap

    def __reduce__(self):
        return open, (self.trap, "w")


@pytest.mark.parametrize("kind", evil("trap"))
def test_what_a_pickle_would_run_is_rejected_by_name(tmp_path, kind):
    trap = tmp_path / "trap"
    body, words = evil(trap)[kind]
    for place in (body, table({"model": table(TENSORS), "args": body})):
        rejected(torch_zip(tmp_path / "zip.pth", place, STORAGES), words)
        rejected(torch_stream(tmp_path / "stream.pth", place, STORAGES), words)
    bare = tmp_path / "bare.pth"
    bare.write_bytes(pickled(body))
    rejected(bare, "not safetensors, npz or a PyTorch file")
    assert not trap.exists()


def test_python_itself_runs_the_malicious_pickles(tmp_path):
    """The pickles above are malicious: Python itself executes them."""
    traps = evil(tmp_path / "trap")
    for kind in ("system", "eval", "reduce", "stack", "inst", "obj"):
        pickle.loads(pickled(traps[kind].body))
        (tmp_path / "trap").unlink()


def test_object_arrays_are_rejected(tmp_path):
    np.savez(tmp_path / "x.npz", a=A, b=np.array([Reduced(str(tmp_path / "trap"))], object))
    rejected(tmp_path / "x.npz", "Python objects")
    array = pickle.dumps({"a": np.array([None])}, 2)[2:-1]
    rejected(torch_zip(tmp_path / "x.pth", array), "'O8'")
    assert not (tmp_path / "trap").exists()


def test_bombs_next_to_the_tensors_are_not_expanded(tmp_path):
    """Doubling by reference is small until it is walked or copied, which the reader does not."""
    doubled = b"N" + b"q\x01h\x01\x86" * 200
    own = b"}q\x02" + text("model") + b"h\x02s"  # a dictionary that is its own model
    far = b"Nr\xff\xff\xff\xff"  # a memo place at 2^32 - 1
    body = table({"doubled": doubled, "own": own, "far": far, **TENSORS})
    file = files.read(torch_zip(tmp_path / "x.pth", body, STORAGES))
    assert file.dropped == ("doubled", "own", "far") and set(file.tensors) == {"a", "b"}
    rejected(torch_zip(tmp_path / "y.pth", own), "no tensors by name; it holds 'model'")
    rejected(torch_zip(tmp_path / "z.pth", b"\x8e" + struct.pack("<Q", 2**62)), "damaged")


def memo(place, body):
    return body + b"r" + struct.pack("<I", place)


def again(place):
    return b"j" + struct.pack("<I", place)


LONG = memo(7, text("w" * 2**16))
WEIGHT = b"}" + text("w") + TENSORS["a"] + b"s"


def nested(depth):
    """Modules inside each other, under one long name."""
    module, state = name("__torch__", "Net") + b")\x81", WEIGHT
    for _ in range(depth):
        state = b"}" + again(7) + module + state + b"bs"
    return name("__torch__", "Net") + many(LONG) + b"\x81" + state + b"b"


REPEATED = {  # what a few bytes ask for again and again, and why it is rejected
    "a tensor by strides": (
        table({f"{n}": tensor(storage("0", 6), (2**22,), (0,)) for n in range(9)}),
        "repeat their storages",
    ),
    "a shape of long numbers": (
        table({"a": tensor(storage("0", 6), (2**62,) * 64, (2**62,) * 64)}),
        "reaches beyond",
    ),
    "a key": (b"}" + memo(1, many(b"N" * 200)) + b"Ns" + (again(1) + b"Ns") * 200, "keys"),
    "a name of a module": (nested(200), "copies"),
    "modules": (
        name("__torch__", "Net") + many(memo(7, WEIGHT)) + b"\x81}("
        + b"".join(
            text(f"{n}") + name("__torch__", "Net") + b")\x81" + again(7) + b"b"
            for n in range(9)
        ) + b"ub",
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REPEATED)
def test_what_is_repeated_has_a_budget(tmp_path, kind):
    body, words = REPEATED[kind]
    path = torch_zip(tmp_path / "x.pth", body, STORAGES)
    if words:
        rejected(path, words)
    else:  # few enough
        assert len(files.read(path).tensors) == 9


def test_a_storage_is_read_once_under_whatever_size(tmp_path):
    """Each tensor may claim another size of its storage."""
    entries = {f"{n}": tensor(storage("0", 6 - n % 2), (2,), (1,)) for n in range(8)}
    entries["last"] = TENSORS["a"]
    found = files.read(torch_stream(tmp_path / "x.pth", table(entries), {"0": STORAGES["0"]}))
    bases = {x.__array_interface__["data"][0] for x in found.tensors.values()}
    assert len(bases) == 1


@pytest.mark.parametrize(
    "entry, words",
    [
        (tensor(storage("0", 6), (2, 4), (3, 1)), "'x' reaches beyond its storage"),
        (tensor(storage("0", 6), (2, 3), (3, 1), offset=1), "reaches beyond"),
        (tensor(storage("0", 6), (2**62, 5), (4, 1)), "reaches beyond"),
        (tensor(storage("0", 6), (2**40,), (0,)), "repeat their storages"),
        (tensor(storage("0", 6), (2**63,), (0,)), "not counts"),
        (tensor(storage("0", 6), (2, 3), (-3, 1), offset=3), "not counts"),
        (tensor(storage("0", 6), (2, 3), (3,)), "not counts"),
        (tensor(storage("0", 6), (1,) * 65, (1,) * 65), "65 axes"),
        (tensor(storage("0", -6), (2, 3), (3, 1)), "odd storages"),
        (tensor(storage("9", 6), (2, 3), (3, 1)), "damaged"),
        (tensor(storage("0", 7), (2, 3), (3, 1)), "truncated"),
        (tensor(storage("0", 2**60), (2, 3), (3, 1)), "truncated"),
        (tensor(storage("0", 6, "QInt8"), (2, 3), (3, 1)), "torch.QInt8Storage"),
    ],
)
def test_tensors_stay_inside_their_storages(tmp_path, entry, words):
    rejected(torch_zip(tmp_path / "zip.pth", table({"x": entry}), STORAGES), words)
    with pytest.raises(UserError):
        files.read(torch_stream(tmp_path / "s.pth", table({"x": entry}), {"0": STORAGES["0"]}))


def test_other_faults_of_torch_files_are_reported(tmp_path):
    path = tmp_path / "x.pth"
    rejected(torch_zip(path, table(TENSORS), STORAGES, order=b"big"), "big-endian")
    rejected(torch_stream(path, table(TENSORS), STORAGES, little=b"\x89"), "big-endian")
    rejected(torch_zip(path, table(TENSORS), STORAGES, zipfile.ZIP_DEFLATED), "compressed")
    rejected(torch_zip(path, TENSORS["a"], STORAGES), "save a state dict")
    rejected(torch_zip(path, table({"epoch": number(1)})), "no tensors by name; it holds 'epoch'")
    rejected(torch_zip(path, table({"a\nb": TENSORS["a"]}), STORAGES), r"unprintable name 'a\nb'")
    rejected(torch_stream(path, table(TENSORS), {**STORAGES, "0": b"12345678"}), "size is not")


# Malice: the others ------------------------------------------------------------------------------


def safetensors(path, header, data=b"\0" * 24, length=None):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(head) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + head + data)
    return path


def entry(start=0, stop=24, dtype="F32", shape=(2, 3)):
    return dict(dtype=dtype, shape=shape, data_offsets=[start, stop])


@pytest.mark.parametrize(
    "header, words",
    [
        (
            {"a": entry(0, 12, shape=[3]), "b": entry(8, 24, shape=[4])},
            "'b' should be at 12 to 28",
        ),
        ({"a": entry(0, 24), "b": entry(0, 24)}, "'b' should be at 24"),
        ({"a": entry(0, 8, shape=[2]), "b": entry(12, 24, shape=[3])}, "'b' should be at 8"),
        ({"a": entry(8, 24, shape=[4])}, "'a' should be at 0"),
        ({"a": entry(0, 48, shape=[12])}, "data end at 24"),
        ({"a": entry(0, 2**62, shape=[2**60])}, "data end at 24"),
        ({"a": entry(0, 16, shape=[4])}, "8 bytes that belong to no tensor"),
        ({"a": entry(dtype="F16")}, "'a' should be at 0 to 12"),
        ({"a": entry(dtype="F4")}, "unknown dtype 'F4'"),
        ({"a": entry(shape=[-2, -3])}, "not counts"),
        ({"a": entry(shape=[2.0, 3])}, "not counts"),
        ({"a": entry(shape=[True, 6])}, "not counts"),
        ({"a": entry(shape=[2, 3] + [1] * 63)}, "65 axes"),
        ({"a": entry(), "__metadata__": {"n": 1}}, "metadata are not strings"),
        ({"a": entry(), "__metadata__": []}, "metadata are not strings"),
        ({"a": [1]}, "damaged"),
        ({"a": {}}, "damaged"),
        ({}, "belong to no tensor"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "twice"),
        (b"{nonsense", "damaged"),
        (b'{"a": ' + b"[" * 100_000, "damaged"),
        (b'{"a": "\xff"}', "damaged"),
    ],
)
def test_a_false_safetensors_header_is_reported(tmp_path, header, words):
    rejected(safetensors(tmp_path / "x.safetensors", header), words)


def test_a_header_above_the_limit_is_rejected(tmp_path):
    path = safetensors(tmp_path / "x.safetensors", {"a": entry()}, length=3_000_000_000)
    rejected(path, "claims a header of 3,000,000,000 bytes")
    safetensors(path, {"a": entry()}, length=2**24 + 1)
    with open(path, "r+b") as f:
        f.truncate(2**24 + 100)  # it is there
    rejected(path, "the limit is 16,777,216")
    path.unlink()


def npy(header):
    text = (header + " " * 40 + "\n").encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "content, words",
    [
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"), "not as long"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"), "x.npz"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"), "Python objects"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': ()}") + b"12345", "not as long"),
        (npy("__import__('os').system('touch trap')"), "damaged"),
        (npy("(" * 5000), "damaged"),
        (b"", "damaged"),
    ],
)
def test_a_false_npy_header_is_reported(tmp_path, content, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", content)
    rejected(tmp_path / "x.npz", words)
    assert os.listdir(tmp_path) == ["x.npz"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_false_zips_are_reported(tmp_path):
    path = tmp_path / "x.npz"
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(50_000_000, np.uint8))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(2):
            archive.writestr(f"{i}.npy", buffer.getvalue())
    rejected(path, "more than 8 times its size")
    np.save(buffer := io.BytesIO(), A)
    with zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            archive.writestr("a.npy", buffer.getvalue())
    rejected(path, "overlap")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", buffer.getvalue())
    rejected(path, "compressed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    rejected(path, "neither numpy nor PyTorch")
    zipfile.ZipFile(path, "w").close()
    rejected(path, "no tensors by name")


MEASURE = """
import resource, sys
from vtp_jax.convert import files
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
found = files.read(sys.argv[1])
print(sum(x.nbytes for x in found.tensors.values()), peak() - before)
"""


@pytest.mark.parametrize("kind", ["x.npz", "x.safetensors", "compressed.npz"])
def test_memory_has_the_tensors_of_a_file_once(tmp_path, kind):
    """In a process of its own."""
    noise = np.random.default_rng(0).integers(0, 16, 20_000_000, np.uint8)
    if kind == "compressed.npz":
        np.savez_compressed(tmp_path / kind, a=noise)
    else:
        files.write(tmp_path / kind, {"a": noise})
    call = [sys.executable, "-c", MEASURE, str(tmp_path / kind)]
    size, used = map(int, subprocess.run(call, capture_output=True, check=True).stdout.split())
    assert size == noise.nbytes and used < 1.5 * size


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02"]
)
def test_files_of_no_known_kind_are_rejected(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    rejected(tmp_path / "x.pth", "not safetensors, npz or a PyTorch file")
    rejected(tmp_path / "none.pth", "No such file")


# Accidents ---------------------------------------------------------------------------------------


def read_or_reject(path):
    try:
        return files.read(path).tensors
    except UserError as error:
        assert "\n" not in str(error)
        return None


@pytest.mark.parametrize("kind", MAKERS)
def test_no_truncated_file_is_read(tmp_path, kind):
    path = tmp_path / kind
    MAKERS[kind](path)
    whole = path.read_bytes()
    for end in [*range(0, len(whole), 5), *range(len(whole) - 80, len(whole))]:
        path.write_bytes(whole[:end])
        assert read_or_reject(path) is None, end


@pytest.mark.parametrize("kind", MAKERS)
def test_any_flipped_byte_is_detected_or_harmless(tmp_path, kind):
    """Zips have checksums: the same tensors or an error. Other files are read or rejected."""
    path = tmp_path / kind
    MAKERS[kind](path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in range(0, len(whole), 2):
        data = bytearray(whole)
        data[place] ^= rng.integers(1, 256)
        path.write_bytes(data)
        got = read_or_reject(path)
        if got is not None and kind in ("x.npz", "zip.pth"):
            assert got.keys() == {"a", "b"} and equal(got["a"], A) and equal(got["b"], B), place


PIECES = st.sampled_from(
    [bytes([code]) for code in range(256)]
    + [name(*key.split(" ")) for key in torch_files.ADMITTED]
    + [name("__torch__", "Net"), name("os", "system"), storage("0", 6), *TENSORS.values()]
    + [b"q\x01", b"h\x01", b"}(", b"u", b")R", b"N\x85R", b"]", b"\x86", b"}b", text("model")]
)


@given(st.lists(PIECES, max_size=30).map(b"".join))
def test_any_pickle_is_read_or_rejected(tmp_path_factory, body):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    for place in (body, table({"x": body, **TENSORS}), b"}(" + body + b"u"):
        read_or_reject(torch_zip(folder / "zip.pth", place, STORAGES))
        read_or_reject(torch_stream(folder / "stream.pth", place, STORAGES))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_rejected(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes"
    for head in (b"", b"PK\x03\x04", len(content).to_bytes(8, "little") + b"{"):
        path.write_bytes(head + content)
        read_or_reject(path)
