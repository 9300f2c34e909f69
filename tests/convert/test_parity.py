"""Every method's step can be compared with official code, and the measured differences pass."""

import pytest

from benchmarks import parity as benchmark
from tests import tables
from tests.goldens import GOLDENS
from vtp_jax import parity
from vtp_jax.convert.families import STEPS
from vtp_jax.types import UserError


def test_every_method_has_a_step_with_numbers_of_official_code():
    assert set(tables.parts("methods")) <= set(STEPS)
    assert {name for name, _ in GOLDENS.values()} == set(STEPS)


def test_every_row_is_measured_and_within_its_tolerance():
    found = benchmark.results()
    assert {row.key for row in benchmark.rows()} == set(found), "run python -m benchmarks.parity"
    assert [row.key for row in benchmark.rows() if not found[row.key] <= row.tolerance] == []


def test_help_lists_the_inputs_of_every_step(capsys):
    with pytest.raises(SystemExit):
        parity.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"{name} ({form.step.source}): " in text for name, form in STEPS.items())


def test_files_that_are_not_npz_are_rejected(tmp_path):
    (tmp_path / "w").write_text("no")
    with pytest.raises(UserError, match="cannot read .*/w as .npz"):
        parity.main(["coca", *(f"--{x}={tmp_path / 'w'}" for x in ("weights", "inputs", "out"))])
