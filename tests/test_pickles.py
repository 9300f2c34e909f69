"""Plain pickles of every protocol are read as Python reads them, and no code in them is run."""

import collections
import contextlib
import os
import pickle

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


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_rejected(tmp_path_factory, data):
    path = write(tmp_path_factory.getbasetemp(), b"\x80\x02" + data)
    with contextlib.suppress(UserError):
        pickles.read(path)
