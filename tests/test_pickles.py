"""Plain pickles of every protocol are read as Python reads them, and no code in them is run."""

import collections
import contextlib
import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtp_jax import pickles
from vtp_jax.types import UserError

VALUE = {
    "-4wsuPCjDBc_5_15": [["a", "squirrel", "is", "eating"], ["une", "écureuil"]],
    "n": [1, -2, 3.5, True, None, 10**20],
    ("a", 1): collections.OrderedDict(x=("y",)),
}
KEYS = st.text(max_size=3) | st.integers()
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


def write(tmp_path, data):
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(tmp_path, protocol):
    assert pickles.read(write(tmp_path, pickle.dumps(VALUE, protocol))) == VALUE
    counts = {"video7020": np.int64(3), "x": np.float32(0.5)}
    assert pickles.read(write(tmp_path, pickle.dumps(counts, protocol))) == counts
    grouped = collections.defaultdict(list, a=["b"])
    assert pickles.read(write(tmp_path, pickle.dumps(grouped, protocol))) == grouped


@given(PLAIN, st.sampled_from((0, 2, 4)))
def test_any_plain_data_is_read(tmp_path_factory, value, protocol):
    folder = tmp_path_factory.getbasetemp()
    assert pickles.read(write(folder, pickle.dumps(value, protocol))) == value


def test_a_pickle_of_python_2_is_read(tmp_path):
    """protocol 0 of {'vid': [['a', u'caf\\xe9']]}"""
    written = b"(dp0\nS'vid'\np1\n(lp2\n(lp3\nS'a'\np4\naVcaf\xe9\np5\naas."
    assert pickles.read(write(tmp_path, written)) == {"vid": [["a", "café"]]}


class Evil:
    def __reduce__(self):
        return os.system, ("touch /nowhere",)


@pytest.mark.parametrize(
    "data, message",
    [
        (pickle.dumps(Evil()), "refers to Python's .*system.*nothing was executed"),
        (pickle.dumps({"a": np.arange(3)}), "refers to Python's 'numpy"),
        (b"cos\nsystem\n(S'true'\ntR.", "refers to Python's 'os.system'"),
        (b"(S'true'\nios\nsystem\n.", "instruction INST"),
        (b"P1\n.", "instruction PERSID"),
        (b"cnumpy.core.multiarray\nscalar\n(S'i8'\nS'x'\ntR.", "without a type"),
        (b"\x80\x02U\x01aQ.", "instruction BINPERSID"),
        (pickle.dumps(VALUE)[:-9], "damaged"),
        (b"", "damaged"),
        (b"hello", "damaged"),
    ],
)
def test_everything_else_is_rejected(tmp_path, data, message):
    with pytest.raises(UserError, match=message) as error:
        pickles.read(write(tmp_path, data))
    assert "\n" not in str(error.value) and "x.pkl" in str(error.value)


def again(place=1):
    return b"j" + struct.pack("<I", place)


def memo(body, place=1):
    return body + b"r" + struct.pack("<I", place)


SCALAR = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\2\0\0\0i8\x89\x88tR"
TEXT = b"X" + struct.pack("<I", 1 << 16) + b"a" * (1 << 16)
DOUBLED = b"N" + memo(b"\x85") + (again() + b"\x86q\1") * 99
HASH = 2**61 - 1  # integers that are a multiple of it apart have equal hashes


@pytest.mark.parametrize(
    "body, words",
    [
        (
            b"}" + memo(b"(" + b"N" * 500 + b"t") + b"N" + (b"s" + again() + b"N") * 500 + b"s",
            "keys",
        ),
        (b"}(" + b"".join(b"(K" + bytes([n % 256]) + b"tN" for n in range(9000)) + b"u", "keys"),
        (
            b"}(" + b"".join(pickle.dumps(n * HASH, 2)[2:-1] + b"N" for n in range(9, 99)) + b"u",
            "64",
        ),
        (b"}" + memo(b"\x8b" + struct.pack("<I", 999) + b"\1" * 999) + b"Ns", "64 bits"),
        (
            b"]("
            + memo(b"](" + b"N" * 9000 + b"e")
            + (b"c__builtin__\nlist\n" + again() + b"\x85R") * 2000
            + b"e",
            "copies",
        ),
        (memo(TEXT) + again() + b"\x93", "name that is too long"),
        (memo(TEXT) + b"\x85" + SCALAR + again() + b"tR", "longer than their type"),
        (
            b"cnumpy\ndtype\n(" + b"N" + memo(b"\x85") * 1 + (again() + b"\x86q\1") * 99 + b"tR",
            "numpy values",
        ),
        (b"](" + b"N" * 3000 + b"e", "instructions"),
    ],
)
def test_what_is_repeated_has_a_budget(tmp_path, monkeypatch, body, words):
    """Some kilobytes would be copied, hashed or compared for minutes."""
    if words == "instructions":
        monkeypatch.setattr(pickles, "INSTRUCTIONS", 2000)
    with pytest.raises(UserError, match=words):
        pickles.read(write(tmp_path, b"\x80\x02" + body + b"."))


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_rejected(tmp_path_factory, data):
    path = write(tmp_path_factory.getbasetemp(), b"\x80\x02" + data)
    with contextlib.suppress(UserError):
        pickles.read(path)
