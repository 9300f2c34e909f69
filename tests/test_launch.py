"""The launchers' scripts, parsed as their readers do (words of a shell, YAML, sbatch), and run
where the cluster's tools are scripts that do as their documentation says."""

import itertools
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import __main__ as launch
from launch import common, gke, local, sky, slurm, tpu_vm
from vtp_jax import __main__ as vtp
from vtp_jax.setup import cli, config

ROOT = Path(__file__).parent.parent
TRAIN = ["--config", "configs/demo.py:tiny", "--workdir", "/mnt/my runs/a"]
MORE = ["--config.steps=7", "--config.data.train.root=it's here"]
CLOUD = ["--name", "mine", "--project", "p", "--zone", "z"]
KEPT = ["--bucket", "gs://b:/mnt/my runs"]
# The words of the launched command, the same in every place.
WORDS = [".venv/bin/python", "-m", "vtp_jax.train", *TRAIN, *MORE]
# A command line for every place that is remote.
REMOTE = {
    gke: [*CLOUD, "--cluster", "c", "--topology", "v5e:4x4"],
    sky: ["--nodes", "2", "--spot"],
    slurm: ["--nodes", "2"],
    tpu_vm: [*CLOUD, "--topology", "v5e:4x4", "--spot"],
}
remote = pytest.mark.parametrize("module", REMOTE, ids=lambda m: m.__name__.partition(".")[2])


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def rendered(capsys):
    def render(module, *options):
        module.main([*TRAIN, *options, "--dry-run", *MORE])
        return capsys.readouterr().out

    return render


@pytest.fixture
def refused(capsys):
    """The one line with which a launcher refuses its arguments."""

    def refuse(module, *options):
        with pytest.raises(SystemExit) as done:
            module.main([*options, "--dry-run"])
        told = capsys.readouterr()
        assert done.value.code == 2 and not told.out
        assert re.fullmatch(r"error: .*\n", told.err)
        return told.err

    return refuse


def is_shell(text):
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def holds(words, part):
    return any(words[i : i + len(part)] == part for i in range(len(words)))


def joined(text):
    """Words of a script, with continued lines."""
    return shlex.split(text.replace("\\\n", ""))


def sbatch(text):
    """{option: value} of the #SBATCH lines, split as sbatch does: quotes group, # is a comment."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "), comments=True)
            name, _, value = word.removeprefix("--").partition("=")
            found[name] = value
    return found


def host(text):
    """The script that srun starts on a node."""
    (line,) = re.findall(r"^srun .*?(?= &$)", text, re.M | re.S)
    *_, bash, option, script = shlex.split(line)
    assert (bash, option) == ("bash", "-ec")
    return script


def started(text):
    """The words of the command that a script ends with, in the shell's place."""
    found = shlex.split(text.strip().splitlines()[-1])
    assert found[0] == "exec"
    return found[1:]


def test_the_command_is_one_that_training_understands():
    args = cli.parser("train", "")
    args.add_argument("--config")
    args.add_argument("--workdir")
    found, overrides = cli.parse(args, WORDS[3:])
    assert (found.config, found.workdir, overrides) == (TRAIN[1], TRAIN[3], MORE)


def test_local_is_the_command_itself(rendered):
    memory, command = rendered(local).splitlines()
    assert memory.startswith("export ") and all(w in memory for w in common.keep_memory().values())
    assert started(command) == WORDS


def test_local_processes_are_numbered_and_meet(rendered):
    text = rendered(local, "--processes", "4", "--devices", "2", "--port", "5000")
    is_shell(text)
    words = shlex.split(text.replace("\n", " ; "))
    assert {"JAX_COORDINATOR_ADDRESS=localhost:5000", "JAX_NUM_PROCESSES=4"} <= set(words)
    assert holds(words, ["JAX_PROCESS_ID=$i", *WORDS, "&"])


def test_tpu_vm_asks_waits_sends_and_starts(rendered):
    text = rendered(tpu_vm, *REMOTE[tpu_vm], *KEPT)
    is_shell(text)
    words = joined(text)
    create = words[words.index("create") + 1 :][:7]
    assert create == [
        "mine", "--node-id=mine", "--project=p", "--zone=z", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
    ]  # fmt: skip
    (start,) = [w for w in words if w.startswith("--command=set -e")]
    is_shell(start.removeprefix("--command="))
    detached = shlex.split(start)
    loop = detached[detached.index("nohup") + 3]
    is_shell(loop)
    assert holds(shlex.split(loop), WORDS)


def test_tpu_vm_starts_several_slices(rendered):
    text = rendered(tpu_vm, *CLOUD, "--topology", "v6e:16x16", "--slices", "2", *KEPT)
    assert "--node-prefix=mine --node-count=2" in text and "v6e-256" in text
    assert "for node in mine-0 mine-1; do" in text


def created(text):
    """(options of `xpk workload create`, every one of its words)"""
    words = joined(text)
    words = words[
        next(i for i in range(len(words)) if words[i : i + 2] == ["workload", "create"]) :
    ]
    return dict(w.removeprefix("--").split("=", 1) for w in words[2:] if "=" in w), words


def test_gke_is_one_xpk_workload(rendered):
    options = [*CLOUD, "--cluster", "c", "--topology", "v5p:4x4x4", "--slices", "2"]
    given, _ = created(rendered(gke, *options, *KEPT))
    assert given["tpu-type"] == "v5p-128", "v5p counts cores, two of a chip"
    assert (given["num-slices"], given["workload"], given["cluster"]) == ("2", "mine", "c")
    is_shell(given["command"])
    assert holds(shlex.split(given["command"]), ["&&", "exec", *WORDS])
    # What xpk always restarts after are the codes from 127 on: signals.
    assert given["restart-on-exit-codes"] == "75" and int(given["max-restarts"]) > 0


def test_slurm_is_a_batch_script(rendered):
    text = rendered(slurm, "--nodes", "4", "--gpus", "8", "--cpus", "96", "--time", "2:00:00")
    is_shell(text)
    options = sbatch(text)
    assert (options["nodes"], options["ntasks-per-node"]) == ("4", "1")
    assert (options["gpus-per-node"], options["time"]) == ("8", "2:00:00")
    assert "partition" not in options and "requeue" in options
    assert re.fullmatch(r"B:USR1@\d+", options["signal"])
    (run,) = [line for line in text.splitlines() if line.startswith("srun")]
    # srun does not take it from sbatch: without it a task is bound to one core.
    assert options["cpus-per-task"] == "96" and "--cpus-per-task=96" in run.split()
    assert started(host(text)) == WORDS


@pytest.mark.parametrize(
    "accelerators, nodes, extra", [("H100:8", 4, "cuda"), ("tpu-v6e-8", 1, "tpu")]
)
def test_sky_is_a_task(rendered, accelerators, nodes, extra):
    given = ["--accelerators", accelerators, "--nodes", str(nodes), *KEPT]
    task = yaml.safe_load(rendered(sky, *given))
    assert task["num_nodes"] == nodes
    recovery = dict(recover_on_exit_codes=[75])
    assert task["resources"] == dict(
        accelerators=accelerators, use_spot=False, job_recovery=recovery
    )
    is_shell(task["setup"])
    is_shell(task["run"])
    assert f".[{extra}]" in shlex.split(task["setup"])
    assert started(task["run"]) == WORDS
    assert ("SKYPILOT_NODE_RANK" in task["run"]) == (nodes > 1)


@pytest.mark.parametrize("topology", ["v5e", "v5e:16", "v9:4x4", "v5e:4x"])
def test_an_unknown_topology_is_a_one_line_error(topology, refused):
    assert "no topology" in refused(gke, *TRAIN, *REMOTE[gke], *KEPT, "--topology", topology)


def test_tpu7x_is_launched_on_gke_alone(rendered, refused):
    options = [*CLOUD, *KEPT, "--topology", "tpu7x:4x4x4"]
    given, words = created(rendered(gke, *options, "--cluster", "c"))
    assert given["tpu-type"] == "tpu7x-128" and "--no-use-parallel-containers" in words
    assert "launch it on GKE" in refused(tpu_vm, *TRAIN, *options)


def options_of(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    return capsys.readouterr().out


@remote
def test_storage_has_the_same_options_everywhere(module, capsys):
    shown = options_of(module, capsys)
    for option in ("--bucket URL:PATH", "--mount SRC:PATH", "--setup COMMAND"):
        assert option in shown


def test_data_is_mounted_where_each_place_mounts_it(rendered):
    options = ["--bucket", "gs://b-1:/mnt", "--setup", "export A='it is'; echo $A"]
    task = yaml.safe_load(rendered(sky, *options, "--mount", "vol:/v", "--mount", "./x:/x"))
    mount = dict(source="gs://b-1", mode="MOUNT")
    assert task["file_mounts"] == {"/mnt": mount, "/x": "./x"} and task["volumes"] == {"/v": "vol"}
    assert options[-1] in task["run"].splitlines()

    text = rendered(gke, *REMOTE[gke], *options, "--mount", "nfs:/data")
    given, words = created(text)
    assert [w for w in words if w.startswith("--storage=")] == [
        "--storage=b-1-mnt",
        "--storage=nfs",
    ]
    attach = joined(text)[joined(text).index("attach") :]
    assert {"b-1-mnt", "--type=gcsfuse", "--bucket=b-1", "--mount-point=/mnt"} <= set(attach)
    assert holds(shlex.split(given["command"]), ["&&", "eval", options[-1], "&&"])

    lines = host(rendered(slurm, *options, "--mount", "/shared/d:/tmp/data/d")).splitlines()
    assert "mountpoint -q /mnt || gcsfuse --implicit-dirs b-1 /mnt" in lines
    assert "ln -sfn /shared/d /tmp/data/d" in lines and options[-1] in lines

    text = rendered(tpu_vm, *REMOTE[tpu_vm], *options, "--mount", "host:/share:/data")
    (start,) = [w for w in joined(text) if w.startswith("--command=set -e")]
    lines = start.splitlines()
    assert "mountpoint -q /mnt || gcsfuse --implicit-dirs b-1 /mnt" in lines
    assert "mountpoint -q /data || sudo mount -t nfs host:/share /data" in lines
    assert options[-1] in lines


@remote
@pytest.mark.parametrize("text", ["gs://b", "b:mnt", ":/mnt", "gs://b:"])
def test_storage_that_is_not_understood_is_refused(module, text, refused):
    for option in ("--bucket", "--mount"):
        assert "as in gs://B:/mnt/data" in refused(module, *TRAIN, *REMOTE[module], option, text)


@pytest.mark.parametrize("module", [gke, slurm, tpu_vm], ids=lambda m: m.__name__)
def test_a_bucket_that_cannot_be_mounted_is_refused(module, refused):
    given = [*TRAIN, *REMOTE[module], "--bucket", "az://b:/mnt"]
    assert "az://b:/mnt: " in refused(module, *given)


@pytest.mark.parametrize(
    "module, workdir, options, kept",
    [
        *((m, "runs/a", [], False) for m in (gke, sky, tpu_vm)),
        *((m, "/mnt/a", [], False) for m in (gke, sky, tpu_vm)),
        *((m, "file:///mnt/a", [], False) for m in (gke, sky, tpu_vm)),
        *((m, "/mnt2/a", ["--bucket", "gs://b:/mnt"], False) for m in (gke, sky, tpu_vm)),
        *((m, "/mnt/../a", ["--bucket", "gs://b:/mnt"], False) for m in (gke, sky, tpu_vm)),
        *((m, "/mnt/a", ["--bucket", "gs://b:/mnt"], True) for m in (gke, sky, tpu_vm)),
        *((m, "gs://b/a", [], True) for m in REMOTE),
        (gke, "/mnt/a", ["--mount", "nfs:/mnt"], True),
        (tpu_vm, "/mnt/a", ["--mount", "host:/share:/mnt"], True),
        (sky, "/mnt/a", ["--mount", "volume:/mnt"], True),
        (sky, "/mnt/a", ["--mount", "./files:/mnt"], False),  # copied to every machine
        (slurm, "runs/a", [], True),  # the nodes share the folder that it starts in
        (slurm, "/tmp/a", [], False),
    ],
)
def test_a_workdir_that_does_not_outlive_its_machine_is_refused(
    module, workdir, options, kept, refused, capsys
):
    given = ["--config", "demo", "--workdir", workdir, *REMOTE[module], *options]
    if kept:
        module.main([*given, "--dry-run"])
        assert workdir in capsys.readouterr().out
    else:
        assert f"--workdir {workdir} is on the machine's own disk" in refused(module, *given)


def test_a_workdir_on_one_machine_that_stays_is_accepted(rendered):
    for module, options in {sky: [], tpu_vm: [*CLOUD, "--topology", "v5e:2x4"]}.items():
        assert "my runs" in rendered(module, *options)
    for module, options in {
        sky: ["--nodes", "2"],
        tpu_vm: [*CLOUD, "--topology", "v5e:4x4"],
    }.items():
        with pytest.raises(SystemExit):
            rendered(module, *options)


@pytest.mark.parametrize("name", ["my run", "it's", 'a "b"', "#1", "a;b", "$(x)", r"a\b"])
def test_options_reach_their_reader_as_they_are(name, rendered):
    """Each is read by a shell, by sbatch or from YAML, which split or expand what is not quoted."""
    text = rendered(slurm, "--name", name, "--partition", name, "--time", name)
    given = sbatch(text)
    assert (given["job-name"], given["partition"], given["time"]) == (name,) * 3
    assert given["output"] == f"{name}-%j.log"
    is_shell(text)
    task = yaml.safe_load(rendered(sky, "--name", name, "--accelerators", name))
    assert (task["name"], task["resources"]["accelerators"]) == (name, name)
    cloud = ["--name", name, "--project", name, "--zone", name, *KEPT, "--topology", "v5e:4x4"]
    given, _ = created(rendered(gke, *cloud, "--cluster", name, "--image", name))
    assert {given[k] for k in ("workload", "project", "zone", "cluster", "base-docker-image")} == {
        name
    }
    text = rendered(tpu_vm, *cloud, "--slices", "2")
    is_shell(text)
    assert holds(joined(text), [f"--node-prefix={name}", "--node-count=2", f"--project={name}"])


def test_a_line_break_is_kept_or_refused(rendered, refused, capsys):
    override = "--config.data.train.root=a\n  b\u2028c\x85d"
    for module in (sky, slurm, tpu_vm):
        module.main([*TRAIN, *REMOTE[module], *KEPT, "--dry-run", override])
        text = capsys.readouterr().out
        if module is sky:
            assert shlex.split(yaml.safe_load(text)["run"])[-1] == override
        elif module is slurm:
            assert shlex.split(host(text))[-1] == override
        else:
            assert shlex.quote(shlex.quote(override))[1:-1] in text or override in text
    assert "line break" in refused(gke, *TRAIN, *REMOTE[gke], *KEPT, "--setup", "a\nb")
    assert "line break" in refused(slurm, *TRAIN, "--name", "a\n#SBATCH --nodes=9")


def test_what_is_installed_is_this_checkout_or_a_wheel_or_a_requirement(
    tmp_path, monkeypatch, rendered, refused
):
    wheel = "vtp_jax-0.1.0-py3-none-any.whl"
    given, _ = created(rendered(gke, *REMOTE[gke], *KEPT))
    assert holds(shlex.split(given["command"]), ["-e", ".[tpu]"])
    monkeypatch.chdir(tmp_path)
    assert "no checkout of vtp_jax" in refused(gke, *TRAIN, *REMOTE[gke], *KEPT)
    assert "no wheel" in refused(sky, *TRAIN, "--package", wheel)
    (tmp_path / wheel).write_bytes(b"")
    setup = yaml.safe_load(rendered(sky, "--package", wheel))["setup"]
    assert shlex.split(setup)[-1] == f"./{wheel}[cuda]"
    setup = yaml.safe_load(rendered(sky, "--package", "vtp_jax>=0.1"))["setup"]
    assert shlex.split(setup)[-1] == "vtp_jax[cuda]>=0.1"


@pytest.mark.parametrize("workdir, extras", [("gs://b/run", "tpu,gs"), (TRAIN[-1], "tpu")])
def test_a_workdir_in_a_bucket_has_its_clients_installed(workdir, extras, capsys):
    tpu_vm.main([*TRAIN[:-1], workdir, *REMOTE[tpu_vm], *KEPT, "--dry-run"])
    assert f".[{extras}]" in capsys.readouterr().out


@pytest.mark.parametrize("module", [gke, local, sky, slurm, tpu_vm], ids=lambda m: m.__name__)
def test_the_command_in_a_launchers_header_is_understood(module, capsys):
    text = module.__doc__.replace("\\\n", " ")
    place = module.__name__.partition(".")[2]
    (command,) = re.findall(rf"^ +vtp launch {place} (.*)$", text, re.M)
    vtp.dispatch(["launch", place, *shlex.split(command), "--dry-run"])
    words = joined(capsys.readouterr().out)
    spec = shlex.split(command)[1]
    assert spec in " ".join(words)
    config.read(spec)


def test_a_place_is_chosen_by_name(capsys):
    launch.main([])
    shown = capsys.readouterr().out
    for place in launch.PLACES:
        assert re.search(rf"^  {place} +Trains on ", shown, re.M)
        assert (ROOT / f"launch/{place}.py").exists()
    with pytest.raises(SystemExit) as done:
        launch.main(["slrum"])
    assert done.value.code == 2 and "no place 'slrum'" in capsys.readouterr().err


def test_it_runs_and_returns_the_exit_status():
    """As a user starts it; a launcher needs no JAX."""
    code = "import sys; sys.modules['jax'] = None; from vtp_jax.__main__ import main; main()"
    command = [sys.executable, "-c", code, "launch", "local", *TRAIN]
    done = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and started(done.stdout) == WORDS[:-2]
    done = subprocess.run([*command, "--wrokdir=x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean --workdir" in done.stderr


# -- Clusters whose tools are scripts.


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with a project whose Python is a script, as are the tools on PATH. `log` has a line
    for everything that was called."""
    tools, home = tmp_path / "tools", tmp_path / "home"
    for folder in (tools, home / "vtp_jax", home / ".venv/bin", home / ".local/bin"):
        folder.mkdir(parents=True)
    (home / "setup.py").write_text("")
    monkeypatch.chdir(home)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)

    def script(name, text="true"):
        path = home / name if "/" in name else tools / name
        path.write_text(f'#!/bin/bash\necho "{Path(name).name} $*" >> $LOG\n{text}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    script.log = tmp_path / "log"
    script.lines = lambda: script.log.read_text().splitlines() if script.log.exists() else []
    return script


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


# Training that goes on until it is told to stop, and takes a while to save.
LONG = """trap 'sleep 0.3; echo saved >> $LOG; exit 75' TERM
echo $$ > pid
while true; do sleep 0.02; done"""


@pytest.fixture
def batch(cluster, capsys):
    """A batch script on one node of SLURM, by the manuals of srun, scancel, scontrol and squeue."""
    cluster("srun", 'while [[ $1 == -* ]]; do shift; done\nexec "$@"')
    cluster("scancel", 'kill -s "${1#--signal=}" $(cat pid)')
    cluster("scontrol", "echo requeue >> $LOG")
    cluster("squeue", "cat state 2> /dev/null || echo RUNNING")

    def start(training, *options, **environ):
        cluster(".venv/bin/python", training)
        slurm.main([*TRAIN, "--dry-run", *options])
        text = capsys.readouterr().out
        return subprocess.Popen(
            ["bash", "-c", text], env={**os.environ, "SLURM_JOB_ID": "7", **environ}
        )

    return start


@pytest.mark.parametrize(
    "code, count, again",
    [(0, 0, 0), (1, 0, 0), (2, 0, 0), (75, 0, 1), (137, 0, 1), (75, 3, 1), (75, 4, 0)],
)
def test_a_slurm_job_queues_again_after_a_stop_or_a_loss_alone(code, count, again, batch, cluster):
    job = batch(f"exit {code}", "--restarts", "4", SLURM_RESTART_COUNT=str(count))
    assert job.wait(30) == code
    assert cluster.lines().count("requeue") == again


def test_a_slurm_job_saves_before_it_queues_again(batch, cluster):
    job = batch(LONG)
    until(lambda: Path("pid").exists())
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 75
    lines = cluster.lines()
    assert "scancel --signal=TERM 7.0" in lines
    assert lines.index("saved") < lines.index("requeue") and lines.count("requeue") == 1


def test_a_slurm_job_whose_save_takes_too_long_queues_again_before_the_limit(batch, cluster):
    job = batch(LONG.replace("sleep 0.3", "sleep 3"), "--grace", "21")
    until(lambda: Path("pid").exists())
    job.send_signal(signal.SIGUSR1)
    until(lambda: "requeue" in cluster.lines())
    assert "saved" not in cluster.lines()
    assert job.wait(30) == 75


def test_a_cancelled_slurm_job_saves_and_does_not_come_back(batch, cluster):
    job = batch(LONG)
    until(lambda: Path("pid").exists())
    Path("state").write_text("COMPLETING")
    job.send_signal(signal.SIGTERM)
    os.kill(int(Path("pid").read_text()), signal.SIGTERM)
    assert job.wait(30) == 75
    assert "saved" in cluster.lines() and "requeue" not in cluster.lines()


@pytest.fixture
def gcloud(cluster):
    """A queue of TPU VMs that is in one state after the other, and machines that do nothing. Its
    ssh reads stdin, as ssh does."""

    def states(*names):
        Path("states").write_text("".join(f"{name}\n" for name in names))
        cluster("sleep")
        cluster("git")
        cluster(
            "gcloud",
            """case "$*" in
  *describe*) sed -n 1p states; [ $(wc -l < states) = 1 ] || sed -i 1d states ;;
  *ssh*) cat > /dev/null; exit ${SSH_STATUS:-0} ;;
esac""",
        )

    return states


def launched(module, *options):
    """(exit status, stderr) of a launcher, started as a user does."""
    command = [sys.executable, "-m", module.__name__, *TRAIN, *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "SUSPENDING", "DELETING"])
def test_a_tpu_request_that_cannot_be_met_ends_the_wait(state, gcloud):
    gcloud("ACCEPTED", "ACCEPTED", "WAITING_FOR_RESOURCES", state)
    status, told = launched(tpu_vm, *REMOTE[tpu_vm], *KEPT)
    assert status == 1 and re.fullmatch(rf"error: the request for the slice is {state}; .*\n", told)
    assert "gcloud compute tpus queued-resources delete mine --force --project=p --zone=z" in told


def test_a_tpu_slice_is_waited_for_and_every_slice_is_started(gcloud, cluster):
    gcloud("ACCEPTED", "PROVISIONING", "ACTIVE")
    status, told = launched(tpu_vm, *REMOTE[tpu_vm], *KEPT, "--slices", "2")
    calls = [line.split()[3:6] for line in cluster.lines() if line.startswith("gcloud ")]
    assert status == 0, told
    for node in ("mine-0", "mine-1"):
        assert ["tpu-vm", "ssh", node] in calls


def test_a_tpu_slice_that_is_taken_while_it_trains_is_told(gcloud, monkeypatch):
    monkeypatch.setenv("SSH_STATUS", "0")
    gcloud("ACTIVE", "ACTIVE", "SUSPENDED")
    status, told = launched(tpu_vm, *REMOTE[tpu_vm], *KEPT)
    assert status == 1 and "the request for the slice is SUSPENDED" in told


@pytest.mark.parametrize(
    "codes, status", [((75, 137, 0), 0), ((2, 0), 2), ((1, 0), 1), ((75, 75, 75, 75, 0), 75)]
)
def test_a_tpu_machine_starts_training_again_after_a_stop_or_a_loss_alone(
    codes, status, cluster, capsys
):
    cluster("sleep")
    Path("codes").write_text("".join(f"{code}\n" for code in codes))
    cluster(".venv/bin/python", "code=$(sed -n 1p codes); sed -i 1d codes; exit $code")
    tpu_vm.main([*TRAIN, *REMOTE[tpu_vm], *KEPT, "--restarts", "3", "--dry-run"])
    (start,) = [w for w in joined(capsys.readouterr().out) if w.startswith("--command=set -e")]
    detached = shlex.split(start)
    subprocess.run(["bash", "-c", detached[detached.index("nohup") + 3]], capture_output=True)
    assert int(Path("status").read_text()) == status
    runs = itertools.takewhile(lambda code: code == 75 or code > 128, codes)
    wanted = min(len(list(runs)) + 1, 4)
    assert sum(line.startswith("python ") for line in cluster.lines()) == wanted


def in_pod(command):
    """What a pod runs, by xpk's manifest: the command in a subshell, which it signals."""
    return f"""_sigterm() (kill -SIGTERM $! 2>/dev/null;)
trap _sigterm SIGTERM
({command}) & PID=$!
while kill -0 $PID 2>/dev/null; do sleep 0.05; done
wait $PID
exit $?"""


@pytest.fixture
def pod(cluster, capsys):
    def start(training, *options):
        for tool in ("python3", ".local/bin/uv", "mountpoint"):
            cluster(tool)
        cluster(".venv/bin/python", training)
        gke.main([*TRAIN, *REMOTE[gke], *KEPT, *options, "--dry-run"])
        given, _ = created(capsys.readouterr().out)
        return subprocess.Popen(["bash", "-c", in_pod(given["command"])])

    return start


def test_a_drained_pod_saves_and_is_started_again(pod, cluster):
    process = pod(LONG)
    until(lambda: Path("pid").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75, "not 0, which would count as done"
    assert "saved" in cluster.lines()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_pod_ends_with_the_exit_status_of_training(code, pod):
    assert pod(f"exit {code}", "--setup", "true # or not").wait(30) == code


def test_a_pod_without_its_storage_does_not_start(pod, cluster):
    process = pod("exit 0", "--setup", "export A=1")
    assert process.wait(30) == 0
    cluster("mountpoint", "exit 1")
    assert subprocess.run(["bash", "-c", process.args[2]], capture_output=True).returncode == 2


def test_a_bucket_is_attached_to_a_cluster_once(cluster):
    cluster("xpk", 'case "$*" in "storage list"*) cat known 2> /dev/null; true ;; esac')
    options = [*REMOTE[gke], "--bucket", "gs://b:/mnt"]
    assert launched(gke, *options) == (0, "")
    assert [line.split()[1:3] for line in cluster.lines()] == [
        ["storage", "list"], ["storage", "attach"], ["workload", "create"],
    ]  # fmt: skip
    cluster.log.unlink()
    Path("known").write_text("NAME    TYPE\n------  ----\nb-mnt   gcsfuse\n")
    assert launched(gke, *options) == (0, "")
    assert [line.split()[1:3] for line in cluster.lines()] == [
        ["storage", "list"], ["workload", "create"],
    ]  # fmt: skip


def test_local_processes_end_together(cluster):
    cluster(".venv/bin/python", "[ $JAX_PROCESS_ID = 1 ] && exit 2\nexec sleep 60")
    assert launched(local, "--processes", "3")[0] == 2
    cluster(".venv/bin/python", LONG.replace("pid", "pid$JAX_PROCESS_ID"))
    command = [sys.executable, "-m", "launch.local", *TRAIN, "--processes", "2", "--dry-run"]
    text = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ).stdout
    process = subprocess.Popen(["bash", "-c", text])
    until(lambda: Path("pid0").exists() and Path("pid1").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75 and cluster.lines().count("saved") == 2


def test_what_is_not_the_project_is_not_sent():
    """xpk sends the folder with Docker, which leaves out what .dockerignore names."""
    ignored = set((ROOT / ".dockerignore").read_text().split("\n"))
    assert {".git", ".venv", "runs"} <= ignored
    for line in (ROOT / ".gitignore").read_text().split():
        assert {line.rstrip("/"), f"**/{line.rstrip('/')}"} & ignored, line
