"""Evaluations are kept side by side: what was written is read back, and nothing is overwritten."""

import json
import math
import time

import pytest

from vtp_jax.run import evaluations
from vtp_jax.run.evaluations import Subject
from vtp_jax.types import UserError

OF = Subject("retrieval", "retrieval", "val", "data/a", "val.csv", "cosines", {"rows": [1, 2]})


def test_what_is_written_is_read_in_its_order(tmp_path):
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    start = time.time()
    other = OF._replace(stream="b", set="data/b", protocol="other cosines")
    wrote = [
        evaluations.write(tmp_path, of, step, {"r1": value}, by)
        for of, step, value, by in [
            (OF, 10, 0.5, "training"),
            (OF, 20, 0.75, "training"),
            (other, 20, 0.25, "vtp evaluate"),
            (OF, 20, 0.75, "vtp evaluate"),
        ]
    ]
    assert evaluations.read(tmp_path) == wrote
    assert [one.checkpoint for one in wrote] == ["", *["checkpoints/20"] * 3]
    assert start <= wrote[0].time <= wrote[-1].time <= time.time()


def test_numbers_that_are_not_finite_survive_as_json(tmp_path):
    evaluations.write(tmp_path, OF, 1, dict(loss=math.inf, r1=0.5), "training")
    json.loads((tmp_path / evaluations.FILE).read_text(), parse_constant=pytest.fail)
    (found,) = evaluations.read(tmp_path)
    assert math.isnan(found.numbers["loss"]) and found.numbers["r1"] == 0.5


def test_a_line_cut_off_by_a_kill_is_left_out_and_a_damaged_one_is_named(tmp_path):
    assert evaluations.read(tmp_path) == []
    made = evaluations.write(tmp_path, OF, 1, {}, "training")
    path = tmp_path / evaluations.FILE
    line = path.read_text()
    path.write_text(line + line[: len(line) // 2])
    assert evaluations.read(tmp_path) == [made]
    path.write_text("[1]\n" + line)
    with pytest.raises(UserError, match="evaluations.jsonl, line 1 is no evaluation"):
        evaluations.read(tmp_path)
