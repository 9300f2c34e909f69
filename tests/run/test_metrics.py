"""Metric files that resume, progress lines without control characters, tables."""

import io
import json
import math
import re

import pytest

from vtp_jax.run import metrics


def lines(folder) -> list[dict]:
    return [json.loads(t) for t in (folder / "metrics.jsonl").read_text().splitlines()]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # must not colour a file


def test_lines_are_json_and_written_at_once(tmp_path):
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, {"loss": 2.5, "grad_norm": math.nan})
        writer.write(2, {"loss": math.inf})
        found = lines(tmp_path)  # not closed yet
    assert [(x["step"], x["loss"]) for x in found] == [(1, 2.5), (2, None)]
    assert found[0]["grad_norm"] is None and found[0]["time"] > 1.7e9
    strict = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in strict and "Infinity" not in strict


def test_a_resumed_run_has_one_curve(tmp_path):
    """Killed at step 5 in the middle of a line, restored at 3: steps 1 2 3, then 4 5 6 again."""
    with metrics.Writer(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with metrics.Writer(tmp_path, start=3) as writer:
        for step in range(4, 7):
            writer.write(step, {"loss": -step})
    found = lines(tmp_path)
    assert [(x["step"], x["loss"]) for x in found] == [(s, s if s < 4 else -s) for s in range(1, 7)]
    assert metrics.read(tmp_path / "metrics.jsonl") == found
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ""] == ["metrics.jsonl"]


def test_a_new_run_drops_the_old_curve(tmp_path):
    for _ in range(2):
        with metrics.Writer(tmp_path) as writer:
            writer.write(1, {"loss": 0})
    assert len(lines(tmp_path)) == 1


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    out = Terminal()
    with metrics.Writer(tmp_path / "w") as writer, metrics.Progress(5, rows=1, out=out) as bar:
        writer.write(1, {"loss": 1.0})
        bar.show(1, {"loss": 1.0})
        bar.say("hello")
    assert not (tmp_path / "w").exists() and out.getvalue() == ""


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_rates_exclude_compilation_and_show_the_share_of_waiting():
    """Compilation takes 100 s and is in no rate; then 2 s a step, half of it waiting for data."""
    out, clock = io.StringIO(), Clock()
    with metrics.Progress(2000, rows=64, out=out, clock=clock) as progress:
        clock.now += 100
        first = progress.show(1, {"loss": 7.25}, waited=3.0)
        clock.now += 20
        rates = progress.show(11, {"loss": 3.214, "video": 0.5}, waited=13.0)
        progress.say("saved")
    assert math.isnan(first.eta)
    assert rates == metrics.Rates(clips=32.0, waited=0.5, eta=1989 * 2.0)
    assert out.getvalue().splitlines() == [
        "step 1/2000  0 %  loss 7.25",
        "step 11/2000  0 %  loss 3.21  video 0.500 | 32 clips/s | data 50 % | eta 1:06:18",
        "saved",
    ]


def test_rates_are_of_a_recent_window_and_exclude_pauses():
    clock = Clock()
    progress = metrics.Progress(1000, rows=10, out=io.StringIO(), window=3, clock=clock)
    progress.show(0, {})
    for step in range(1, 6):  # slow at first: 50 s a step
        clock.now += 50
        progress.show(step, {})
    for step in range(6, 9):  # then 1 s a step, with an evaluation of 500 s inside
        clock.now += 1
        with progress.paused():
            clock.now += 500
        rates = progress.show(step, {})
    assert rates == metrics.Rates(clips=10.0, waited=0.0, eta=992.0)


def test_no_control_characters_where_there_is_no_terminal():
    out = io.StringIO()
    with metrics.Progress(3, rows=2, out=out) as progress:
        for step in range(4):
            progress.show(step, {"loss": 1.0 / (step + 1)})
    metrics.print_table("numbers", ("name", "value"), [("t2v_r1", 0.5)], out)
    assert not re.search(r"[^\x20-\x7e\n]", out.getvalue())


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with metrics.Progress(3, rows=2, out=out) as progress:
        progress.show(1, {"loss": 1.0})
    assert out.getvalue() == "step 1/3  33 %  loss 1\n"


def test_a_terminal_gets_a_bar_that_ends_with_the_numbers():
    out = Terminal()
    with metrics.Progress(2, rows=2, out=out) as progress:
        progress.show(1, {"loss": 5.0})
        progress.say("[saved] a line above the bar")
        progress.show(2, {"loss": 0.25})
    text = out.getvalue()
    assert "\x1b[" in text and "[saved] a line above the bar" in text
    assert "step 2/2" in text and "loss 0.250" in text
    assert text.endswith("\x1b[?25h")  # the cursor is shown again


def test_a_plain_table_is_aligned():
    out = io.StringIO()
    rows = [("t2v_r1", 0.705, "of 200"), ("mean rank", 12, "")]
    metrics.print_table("retrieval, step 400", ("name", "value", "note"), rows, out)
    assert out.getvalue().splitlines() == [
        "retrieval, step 400",
        "name       value  note",
        "t2v_r1     0.705  of 200",
        "mean rank     12",
    ]


def test_a_terminal_gets_a_drawn_table():
    out = Terminal()
    metrics.print_table("retrieval", ("name", "value"), [("[t2v]", 0.705)], out)
    assert "[t2v]" in out.getvalue() and "0.705" in out.getvalue() and "─" in out.getvalue()


def test_an_empty_table_has_its_title_and_headings():
    out = io.StringIO()
    metrics.print_table("nothing", ("name", "value"), [], out)
    assert out.getvalue().splitlines() == ["nothing", "name  value"]


def test_damaged_lines_are_kept_aside(tmp_path):
    """Whatever a disk or an editor did to them, the run goes on, and loses no other line."""
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        with metrics.Writer(tmp_path, step) as writer:
            writer.write(step, dict(loss=step))
        path.write_bytes(path.read_bytes() + b"\xff\xfe{\n[1]\n\n" + b'{"step": "x"}\n')
    assert [line["step"] for line in metrics.read(path)] == [1, 2]
    metrics.Writer(tmp_path, 2).close()
    assert [line["step"] for line in metrics.read(path)] == [1, 2]
    assert len((tmp_path / "metrics.jsonl.damaged").read_bytes().split(b"\n")) == 7
