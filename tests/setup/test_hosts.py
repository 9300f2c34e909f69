"""Several processes as one run: what the environment defines, and the same numbers as one process.

The processes are real: `launch.local` starts them, they meet over a port and sum over gloo.
"""

import errno
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import common
from vtp_jax import tree
from vtp_jax.run import checkpoint, stop
from vtp_jax.run.stop import Exit
from vtp_jax.setup import hosts
from vtp_jax.train import main as train
from vtp_jax.types import UserError

ROOT = Path(__file__).parents[2]
CONFIG = "configs/videomae/pretrain_k400.py:tiny"
PLAIN = dict(JAX_COORDINATOR_ADDRESS="10.0.0.2:1234", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3")
SLURM = dict(
    SLURM_JOB_ID="7", SLURM_NTASKS="2", SLURM_PROCID="1", SLURM_LOCALID="0",
    SLURM_STEP_NODELIST="node[1-2]", SLURM_STEP_NUM_NODES="2",
)  # fmt: skip
MEET = dict(coordinator_address="10.0.0.2:1234", num_processes=4, process_id=3)


@pytest.mark.parametrize(
    "environ, given",
    [
        ({}, None),
        (PLAIN, MEET),
        ({**PLAIN, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        # An indexed job of Kubernetes numbers its pods.
        ({**{k: v for k, v in PLAIN.items() if "ID" not in k}, "JOB_COMPLETION_INDEX": "3"}, MEET),
        ({**PLAIN, "JOB_COMPLETION_INDEX": "0"}, MEET),
        (SLURM, dict(cluster_detection_method="slurm")),
        # A task alone on its node uses all of its GPUs; JAX by itself would use the first.
        (
            {**SLURM, "SLURM_GPUS_ON_NODE": "4"},
            dict(cluster_detection_method="slurm", local_device_ids=[0, 1, 2, 3]),
        ),
        (
            {**SLURM, "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS": "8"},
            dict(cluster_detection_method="slurm"),
        ),
        # A shell in an allocation, not started by srun.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({"TPU_ML_PLATFORM": "JAX"}, {}),
        ({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "cpu"}, None),
        ({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "tpu,cpu"}, {}),
    ],
)
def test_processes_are_found_from_the_environment(environ, given):
    assert hosts.find(environ) == given


@pytest.mark.parametrize(
    "wrong, told",
    [
        (dict(JAX_PROCESS_ID="4"), "JAX_PROCESS_ID=4 is not one of JAX_NUM_PROCESSES=4"),
        (dict(JAX_PROCESS_ID="one"), "JAX_PROCESS_ID='one' is not a number"),
        (dict(JAX_COORDINATOR_ADDRESS="host"), "must be HOST:PORT"),
        (dict(JAX_NUM_PROCESSES=None), "JAX_NUM_PROCESSES is not set"),
        (dict(JAX_PROCESS_ID=None), "JAX_PROCESS_ID is not set"),
    ],
)
def test_an_incomplete_environment_is_an_error(wrong, told):
    environ = {k: v for k, v in {**PLAIN, **wrong}.items() if v is not None}
    with pytest.raises(UserError, match=told) as error:
        hosts.find(environ)
    assert "\n" not in str(error.value)


def test_help_does_not_wait_for_other_processes(monkeypatch):
    monkeypatch.setattr(hosts, "join", lambda: pytest.fail("joined"))
    assert hosts.together(lambda argv: argv)(["--help"]) == ["--help"]


def raised_from(error, cause):
    error.__cause__ = cause
    return error


GLOO = "UNKNOWN: Gloo all-reduce failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:4784"
JaxError = jax.errors.JaxRuntimeError


@pytest.mark.parametrize(
    "error, saved, code",
    [
        (UserError("a typo"), True, Exit.MISTAKE),
        (hosts.Lost("no answer"), False, Exit.RESTART),
        (KeyError("a bug"), False, Exit.FAILED),
        # A bug that returns at the same step returns before the next checkpoint, and then ends it.
        (KeyError("a bug"), True, Exit.RESTART),
        (JaxError(GLOO), False, Exit.RESTART),
        (JaxError("UNAVAILABLE: the coordinator"), False, Exit.RESTART),
        (JaxError("INTERNAL: NCCL operation ncclGroupEnd() failed"), False, Exit.RESTART),
        (JaxError("RESOURCE_EXHAUSTED: Out of memory"), False, Exit.FAILED),
        (JaxError("INTERNAL: Mosaic failed to compile"), False, Exit.FAILED),
        (raised_from(ValueError("while saving"), JaxError(GLOO)), False, Exit.RESTART),
        (OSError(errno.ESTALE, "Stale file handle"), False, Exit.RESTART),
        (OSError(errno.ENOSPC, "No space left on device"), False, Exit.FAILED),
        (FileNotFoundError(errno.ENOENT, "No such file"), False, Exit.FAILED),
    ],
    ids=str,
)
def test_an_error_is_worth_another_start_or_not(error, saved, code):
    if saved:
        stop.after_save(error)
    assert hosts.exit_of(error) == code


def test_a_lost_device_ends_a_run_with_the_status_that_restarts_it(capsys):
    def main(argv):
        raise JaxError(GLOO)

    with pytest.raises(SystemExit) as done:
        hosts.together(main)([])
    assert done.value.code == Exit.RESTART
    assert "Gloo all-reduce failed" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        hosts.together(lambda argv: 1 / 0)([])


def test_the_launchers_know_the_exit_statuses():
    assert (common.MISTAKE, common.RESTART) == (Exit.MISTAKE, Exit.RESTART)


@pytest.mark.parametrize(
    "platforms, installed, machine, told",
    [
        (None, [], "cuda", "warning: this machine has a NVIDIA GPU.* 'vtp_jax.cuda.'"),
        (None, [], "tpu", "warning: this machine has a TPU.* 'vtp_jax.tpu.'"),
        ("cpu", [], "cuda", ""),
        (None, ["jax_cuda13_plugin"], "cuda", ""),
        (None, ["libtpu"], "tpu", ""),
        (None, [], None, ""),
        (
            "cuda,cpu",
            [],
            None,
            "JAX_PLATFORMS=cuda,cpu: JAX cannot drive a NVIDIA GPU; pip install",
        ),
        ("tpu,cpu", ["jax_cuda13_plugin"], "cuda", "JAX cannot drive a TPU; .* 'vtp_jax.tpu.'"),
        ("cuda,cpu", ["jax_cuda12_plugin"], "cuda", ""),
    ],
)
def test_jax_without_the_driver_of_its_accelerator_says_what_to_install(
    platforms, installed, machine, told, tmp_path, capsys
):
    if machine:
        file = tmp_path / hosts.ACCELERATORS[machine][1].lstrip("/")
        file.parent.mkdir(parents=True)
        file.touch()
    environ = {} if platforms is None else dict(JAX_PLATFORMS=platforms)
    given = dict(environ=environ, installed=installed.__contains__, root=tmp_path)
    if told and not told.startswith("warning"):
        with pytest.raises(UserError, match=told):
            hosts.check_accelerator(**given)
        return
    hosts.check_accelerator(**given)
    shown = capsys.readouterr().err
    assert shown.count("\n") == bool(told) and re.search(told, shown)


def test_cores_are_those_that_the_process_may_use():
    """SLURM binds a task to its CPUs; the machine's count stays what it is."""
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + (
        "from vtp_jax.data.workers import cores; print(cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr
    asking = [
        path.name
        for path in (ROOT / "vtp_jax").rglob("*.py")
        if re.search(r"\bcpu_count\(", path.read_text(encoding="utf-8"))
    ]
    assert asking == ["workers.py"]


def lines(workdir):
    """{step: the numbers written at it}, without what depends on time."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        numbers = json.loads(line)
        own = ("time", "_per_s", "waited", "data/rows")  # rows: what the first process has read
        kept = {k: v for k, v in numbers.items() if not k.endswith(own)}
        found.setdefault(numbers["step"], {}).update(kept)
    return found


def launch(workdir, processes, steps, *more):
    """`processes` processes that share eight devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "launch.local", "--config", CONFIG, "--workdir", str(workdir),
        "--processes", str(processes), "--devices", str(8 // processes), "--port", str(port),
        f"--config.steps={steps}", *more,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


EVERY = ["--config.checkpoint.every=2", "--config.checkpoint.keep=9", "--config.log.every=1"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of four steps in this process, on eight devices; and its workdir after two steps."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        whole = ["--config", CONFIG, "--workdir", str(folder / "whole"), "--config.steps=4"]
        train([*whole, *EVERY])
    shutil.copytree(folder / "whole", folder / "begun")
    shutil.rmtree(folder / "begun/checkpoints/4")
    return folder


def hold(alone, workdir, first):
    """The run in workdir has the numbers of the whole one from step `first`, and its parameters."""
    wanted, got = lines(alone / "whole"), lines(workdir)
    assert set(got) == set(wanted)
    for step in range(first, 5):
        more = got[step].keys() - wanted[step].keys()
        assert wanted[step].keys() <= got[step].keys()
        assert all(name.startswith("eval/") for name in more)  # its last step is evaluated
        for name, value in wanted[step].items():
            assert got[step][name] == pytest.approx(value, rel=1e-5, abs=1e-6), (step, name)
    here, there = (
        tree.flatten(checkpoint.restore_params(w, 4)) for w in (alone / "whole", workdir)
    )
    for name, value in here.items():
        np.testing.assert_allclose(there[name], value, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow(reason="three processes compile a step")
def test_two_processes_resume_a_run_of_one_with_the_same_numbers(alone, tmp_path):
    """Restoring, training, evaluating and saving over processes; one process then reads it."""
    workdir = shutil.copytree(alone / "begun", tmp_path / "two")
    told = launch(workdir, 2, 4, *EVERY)
    assert told.count("step 2 of 4") == 1, "only the first process speaks"
    hold(alone, workdir, 3)


@pytest.mark.slow(reason="four processes compile four times what two do, and prove the same")
@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_train_stop_and_resume(alone, tmp_path, processes):
    launch(tmp_path / "many", processes, 2, *EVERY)
    launch(tmp_path / "many", processes, 4, *EVERY)
    hold(alone, tmp_path / "many", 1)
