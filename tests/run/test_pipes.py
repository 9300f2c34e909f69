"""A reader of the output that goes away: a command ends silently, a training goes on."""

import contextlib
import os
import subprocess
import sys
import threading

import pytest

from vtp_jax.run import pipes, stop


def unread(argv):
    """A process whose stdout nobody reads, and is buffered as by default."""
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {"PYTHONUNBUFFERED": ""}
    try:
        return subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    finally:
        os.close(write)


@contextlib.contextmanager
def broken(monkeypatch):
    """stdout as a pipe whose reader is gone, after `close()`; yields (the stream, close)."""
    read, write = os.pipe()
    with open(write, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield stream, lambda: os.close(read)
        monkeypatch.undo()


LOCAL = ["local", "--config", "a", "--workdir", "b", "--dry-run"]


@pytest.mark.parametrize(
    "argv",
    [
        ["vtp_jax", "--help"],
        ["vtp_jax", "configs"],
        ["vtp_jax", "launch", "--help"],
        ["vtp_jax", "launch", *LOCAL],
        ["launch", *LOCAL],
        ["launch.local", *LOCAL[1:]],
        ["launch.slurm", "--help"],
    ],
    ids=" ".join,
)
def test_a_command_whose_output_is_unread_ends_silently(argv):
    done = unread([sys.executable, "-m", *argv])
    assert (done.returncode, done.stderr) == (stop.Exit.UNREAD, "")


TOLD = """
import sys
from vtp_jax.setup import cli, hosts

@hosts.together
def main(argv):
    {0}

cli.run(main, [])
"""


@pytest.mark.parametrize(
    "body, status",
    [
        ("print('x' * 100_000)", stop.Exit.UNREAD),
        ("raise BrokenPipeError(32, 'of a socket')", stop.Exit.RESTART),
    ],
)
def test_a_pipe_of_the_output_is_no_lost_process_but_a_socket_is(body, status):
    assert unread([sys.executable, "-c", TOLD.format(body)]).returncode == status


def test_a_reader_that_goes_away_ends_the_process_at_the_next_line(monkeypatch):
    with broken(monkeypatch) as (_, close), pytest.raises(SystemExit) as ended, pipes.watched():
        print("read")
        close()
        print("unread")
        pytest.fail("it went on")
    assert ended.value.code == pipes.UNREAD


def test_another_thread_leaves_the_end_to_the_main_one(monkeypatch):
    with broken(monkeypatch) as (_, close), pytest.raises(SystemExit), pipes.watched():
        close()
        other = threading.Thread(target=lambda: print("unread"))
        other.start()
        other.join()
        print("of the main thread")
        pytest.fail("it went on")


def test_what_is_kept_goes_on_unread_and_says_so_once(monkeypatch, capfd):
    with broken(monkeypatch) as (_, close), pipes.watched():
        pipes.keep("the run goes on")
        close()
        for _ in range(3):
            print("unread", flush=True)
    assert capfd.readouterr().err.count("the run goes on") == 1


def test_the_status_of_a_failure_is_kept(monkeypatch):
    with broken(monkeypatch) as (stream, close):
        stream.reconfigure(line_buffering=False)
        with pytest.raises(SystemExit) as ended, pipes.watched():
            print("unread")
            close()
            raise SystemExit(2)
    assert ended.value.code == 2
