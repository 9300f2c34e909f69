"""Files made by hand, PyTorch's from pickle instructions, so that no PyTorch is needed; those that
PyTorch makes are in tests/torch/test_files.py.
"""

import struct
import zipfile

import numpy as np
import pytest

from vtp_jax.convert import files, torch_files
from vtp_jax.types import UserError

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.array([7, -8], np.int64)


def equal(a, b):
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def rejected(path, *words):
    """The one-line error with which a file is rejected."""
    with pytest.raises(UserError) as caught:
        files.read(path)
    line = str(caught.value)
    assert str(path.name) in line and "\n" not in line and len(line) < 700
    for word in words:
        assert word in line
    return line


# By hand: PyTorch's files ------------------------------------------------------------------------


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(s):
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def number(n):
    return (
        b"J" + struct.pack("<i", n)
        if -(2**31) <= n < 2**31
        else b"\x8a\x09" + n.to_bytes(9, "little")
    )


def many(*items):
    return b"(" + b"".join(items) + b"t"


def call(function, *arguments):
    return function + many(*arguments) + b"R"


def table(entries):
    return b"}(" + b"".join(text(k) + v for k, v in entries.items()) + b"u"


def pickled(body):
    return b"\x80\x02" + body + b"."


def storage(key, count, kind="Float"):
    parts = text("storage"), name("torch", f"{kind}Storage"), text(key), text("cpu"), number(count)
    return many(*parts) + b"Q"


def tensor(place, shape, stride, offset=0):
    hooks = call(name("collections", "OrderedDict"))
    counts = (many(*map(number, x)) for x in (shape, stride))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, place, number(offset), *counts, b"\x89", hooks)


def torch_zip(path, body, storages=(), method=zipfile.ZIP_STORED, order=b"little"):
    members = {"data.pkl": pickled(body), "byteorder": order, "version": b"3\n"}
    with zipfile.ZipFile(path, "w", method) as archive:
        for key, data in {**members, **{f"data/{k}": v for k, v in dict(storages).items()}}.items():
            archive.writestr(zipfile.ZipInfo(f"net/{key}"), data, method)
    return path


def torch_stream(path, body, storages=(), items=(4, 8), little=b"\x88"):
    head = [
        b"\x8a\x0a" + torch_files.STREAM,
        number(1001),
        table({"little_endian": little}),
        body,
        b"](" + b"".join(text(k) for k in dict(storages)) + b"e",
    ]
    data = [
        struct.pack("<q", len(v) // item) + v
        for v, item in zip(dict(storages).values(), items, strict=False)
    ]
    path.write_bytes(b"".join(pickled(b) for b in head) + b"".join(data))
    return path


STORAGES = {"0": A.tobytes(), "1": B.tobytes()}
TENSORS = {
    "a": tensor(storage("0", 6), (2, 3), (3, 1)),
    "b": tensor(storage("1", 2, "Long"), (2,), (1,)),
}
MAKERS = {
    "x.safetensors": lambda path: files.write(path, {"a": A, "b": B}),
    "x.npz": lambda path: np.savez(path, a=A, b=B),
    "zip.pth": lambda path: torch_zip(path, table(TENSORS), STORAGES),
    "stream.pth": lambda path: torch_stream(path, table(TENSORS), STORAGES),
}
