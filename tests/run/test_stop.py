"""Signals while a call into C++ lasts."""

import signal
import subprocess
import sys

import pytest

from vtp_jax.run import stop

LONG = """
import hashlib
from vtp_jax.run import stop

def work():
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha1", b"a", b"b", 2**31 - 1)  # half an hour, without the interpreter

with stop.on_signals() as stopping:
    stopping.restored(7, 20)
    stop.aside(work)
"""


GC = """
import gc, os, signal
from vtp_jax.run import stop

def callback(phase, info):
    os.kill(os.getpid(), signal.SIGINT)

with stop.on_signals():
    gc.callbacks.append(callback)
    gc.collect()
    print("went on")
"""


def test_a_signal_inside_a_callback_that_loses_exceptions_ends_the_process():
    ended = subprocess.run([sys.executable, "-c", GC], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (stop.Exit.INTERRUPTED, "")
    assert ended.stderr.endswith("nothing new was trained; the same command starts it again\n")


@pytest.mark.parametrize(
    "sent, code", [(signal.SIGINT, stop.Exit.INTERRUPTED), (signal.SIGTERM, stop.Exit.RESTART)]
)
def test_a_signal_is_handled_while_a_call_lasts(sent, code):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", LONG], **pipes)
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(sent)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert told.endswith(": saved step 7 of 20; the same command goes on from there\n")


def test_what_runs_aside_returns_and_raises_as_if_it_were_called():
    assert stop.aside(lambda: 3) == 3
    with pytest.raises(KeyError, match="gone"):
        stop.aside(lambda: {}["gone"])
