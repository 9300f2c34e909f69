"""Progress of long work: a bar, lines or nothing; numbers and durations as text."""

import io
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtp_jax import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def track(out, items=(3, 0, 3, 3), total=8, seconds=6.0):
    """Work whose items take 6 s; the last one is padded."""
    now = [100.0]
    for item in progress.track(items, total, "reading", "rows", int, out=out, clock=lambda: now[0]):
        now[0] += seconds
        yield item


def test_lines_come_at_intervals_and_tell_how_much_time_is_left():
    out = io.StringIO()
    assert list(track(out)) == [3, 0, 3, 3]  # lines are due at 10 s and at 20 s
    assert out.getvalue().splitlines() == [
        "reading: 3/8 rows, 0.250/s, 0:20 left",
        "reading: 8/8 rows, 0.333/s, 0:00 left",
    ]


@pytest.mark.parametrize("items", [(), (0, 0, 0, 0), (1,)])
def test_work_that_is_empty_short_or_stuck_prints_nothing(items):
    out = io.StringIO()
    assert tuple(track(out, items)) == items and out.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    steps = track(out)
    assert next(steps) == 3 and "reading" in out.getvalue() and "0/8" in out.getvalue()
    steps.close()
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1  # the cursor


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    assert len(list(track(out))) == 4
    assert "\x1b" not in out.getvalue() and out.getvalue().count("\n") == 2


def test_results_in_a_file_are_not_drawn_above_the_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal, results = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", results)
    for _ in track(terminal):
        print("bad.mp4: missing")
    assert results.getvalue() == "bad.mp4: missing\n" * 4 and "bad" not in terminal.getvalue()


def test_other_processes_show_nothing(monkeypatch):
    monkeypatch.setattr(progress.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(progress.jax, "process_index", lambda: 1)
    out = Terminal()
    assert list(track(out)) == [3, 0, 3, 3] and out.getvalue() == ""


def test_a_single_process_does_not_start_the_devices(monkeypatch):
    monkeypatch.setattr(progress.jax, "process_index", pytest.fail)
    assert list(track(io.StringIO())) == [3, 0, 3, 3]


@given(st.floats(1e-6, 1e6))
def test_numbers_keep_three_figures(value):
    assert math.isclose(float(progress.number(value)), value, rel_tol=6e-3)
    assert progress.number(-value) == "-" + progress.number(value)


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (512.0, "512"), (3.2149, "3.21"), (6e-4, "0.000600"), (6e-5, "6.00e-05")]
    + [(12345.6, "12346"), (math.nan, "nan"), (-math.inf, "-inf"), (0.5, "0.500")],
)
def test_numbers_are_formatted_by_their_size(value, text):
    assert progress.number(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0:00"), (9.0, "0:09"), (59.6, "1:00"), (200.0, "3:20"), (7205.0, "2:00:05")]
    + [(3600.0 * 52 + 59, "2 d 4 h")],
)
def test_durations_are_formatted_by_their_size(seconds, text):
    assert progress.duration(seconds) == text
