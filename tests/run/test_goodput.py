"""Goodput: the parts sum to the wall time, whatever ends a process."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtp_jax.run import goodput


class Time:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def live(folder, time, first, steps, *, save=2, killed=False, start=5.0, step=3.0):
    """A life: each step takes `step` s and 1 s of waiting, each save 2 s, and the evaluation after
    it 7 s; a killed one writes nothing at its end."""
    clock = goodput.Clock(folder, every=0.0, clock=time, wall=time)
    time.pass_(start)
    clock.begin(first)
    with clock("compile"):
        time.pass_(11.0)
    for done in range(first + 1, first + steps + 1):
        with clock("data"):
            time.pass_(1.0)
        time.pass_(step)
        clock.did(done)
        if done % save == 0:
            with clock("save"):
                time.pass_(2.0)
            clock.kept(done)
            with clock("evaluate"):
                time.pass_(7.0)
            clock.kept(done)
    if not killed:
        clock.close()


def test_a_run_of_one_process(tmp_path):
    time = Time()
    live(tmp_path, time, 0, 4)
    found = goodput.read(tmp_path)
    want = dict(start=5, compile=11, data=4, step=12, evaluate=14, save=4, lost=0, between=0)
    assert found.parts == want and found.lives == 1
    assert found.whole == time.now - 1000 == 50 and found.goodput == 12 / 50


def test_steps_that_were_not_saved_are_lost_with_what_followed_them(tmp_path):
    """5 steps, saved at 4, killed; an hour later, restored at 4, 1 step; and again from 4."""
    time = Time()
    live(tmp_path, time, 0, 5, killed=True)
    time.pass_(3600)
    live(tmp_path, time, 4, 1, killed=True)
    time.pass_(60)
    live(tmp_path, time, 4, 2)
    found = goodput.read(tmp_path)
    want = dict(start=15, compile=33, data=6, step=18, evaluate=21, save=6, lost=8, between=3660)
    assert found.parts == want and found.lives == 3
    assert found.whole == time.now - 1000


def test_the_newest_checkpoint_was_damaged(tmp_path):
    """What followed the one that was restored is lost, over two lives."""
    time = Time()
    live(tmp_path, time, 0, 4)
    live(tmp_path, time, 4, 2)
    live(tmp_path, time, 2, 4)
    found = goodput.read(tmp_path).parts
    assert found["step"] == 6 * 3 and found["data"] == 6 and found["evaluate"] == 21
    assert found["lost"] == 4 * 4 + 2 * 9


lives = st.lists(st.tuples(st.integers(0, 7), st.booleans(), st.floats(0, 99)), min_size=1)


@given(lives, st.data())
def test_the_parts_sum_to_the_wall_time(tmp_path_factory, lives, data):
    folder, time = tmp_path_factory.mktemp("run"), Time()
    saved = {0}
    for steps, killed, gap in lives:
        first = data.draw(st.sampled_from(sorted(saved)))
        saved = {s for s in saved if s <= first}  # it may be an older one, if a newer is damaged
        live(folder, time, first, steps, killed=killed)
        saved |= {s for s in range(first + 1, first + steps + 1) if s % 2 == 0}
        end = time.now
        time.pass_(gap)
    found = goodput.read(folder)
    assert found.lives == len(lives)
    # A kill without a step loses what the file did not yet have: the compilation.
    unseen = 11.0 if lives[-1][:2] == (0, True) else 0.0
    assert found.whole == pytest.approx(end - 1000 - unseen, abs=0.01)
    assert sum(found.parts.values()) == pytest.approx(found.whole)
    assert all(seconds >= 0 for seconds in found.parts.values())
    assert found.parts["step"] <= 3 * (max(saved) + 7)


def test_a_finished_run_that_is_started_again_was_not_waiting(tmp_path):
    time = Time()
    for _ in range(2):
        with goodput.Clock(tmp_path, clock=time, wall=time) as clock:
            time.pass_(1)
            clock.begin(4)
            clock.finish()
        time.pass_(1e6)
    assert goodput.read(tmp_path).whole == 2


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    time = Time()
    live(tmp_path, time, 0, 2)
    with (tmp_path / "goodput.jsonl").open("a") as file:
        file.write('{"start": 1')
    assert goodput.read(tmp_path).lives == 1
    live(tmp_path, time, 2, 2)
    lines = (tmp_path / "goodput.jsonl").read_text().splitlines()
    assert [json.loads(x)["done"] for x in lines] == [2, 4]


def test_a_run_without_the_file_has_none(tmp_path):
    assert goodput.read(tmp_path) is None
