"""Files of JSON lines: what a kill cut off costs no other line, neither when read nor when the file
goes on."""

import json

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from vtp_jax.run import jsonl

LINES = [{"step": 1}, {"step": 2, "text": "\u2028 é"}]


@pytest.fixture
def file(tmp_path):
    file = epath.Path(tmp_path / "a.jsonl")
    for line in LINES:
        jsonl.append(file, line)
    return file


def test_damaged_lines_are_told_from_what_a_kill_leaves(file):
    """A blank line and a torn last one say nothing; any other line that is no object is named."""
    torn = file.read_bytes()
    file.write_bytes(torn + b'\n \n[1]\n\xff{\n{"other": 3}\n' + torn[:9])
    good, damaged = jsonl.read(file, lambda line: {"step": line["step"], **line})
    assert good == LINES
    assert [(one.number, one.text) for one in damaged] == [
        (5, b"[1]"),
        (6, b"\xff{"),
        (7, b'{"other": 3}'),
    ]
    assert "not an object" in damaged[0].why and "step" in damaged[2].why


@given(st.data())
def test_a_kill_at_any_byte_costs_at_most_the_line_it_hit(tmp_path_factory, data):
    file = epath.Path(tmp_path_factory.mktemp("cut") / "a.jsonl")
    for line in LINES:
        jsonl.append(file, line)
    written = file.read_bytes()
    cut = data.draw(st.integers(0, len(written)))
    file.write_bytes(written[:cut])
    left = [line for line in LINES if written[:cut].find(json.dumps(line).encode()) >= 0]
    assert jsonl.read(file, dict) == (left, [])
    jsonl.append(file, {"step": 3})
    assert jsonl.read(file, dict) == ([*left, {"step": 3}], [])


def test_an_absent_file_has_no_lines(tmp_path):
    assert jsonl.read(epath.Path(tmp_path / "a.jsonl"), dict) == ([], [])
