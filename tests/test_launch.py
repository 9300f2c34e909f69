"""The launchers' scripts, parsed as their readers do: words of a shell, YAML, sbatch."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import common, gke, local, sky, slurm, tpu_vm
from vtp_jax.setup import cli, config

ROOT = Path(__file__).parent.parent
TRAIN = ["--config", "configs/demo.py:tiny", "--workdir", "/mnt/my runs/a"]
MORE = ["--config.steps=7", "--config.data.train.root=it's here"]
CLOUD = ["--name", "mine", "--project", "p", "--zone", "z"]
# The words of the launched command, the same in every place.
WORDS = [".venv/bin/python", "-m", "vtp_jax.train", *TRAIN, *MORE]


@pytest.fixture
def rendered(capsys):
    def render(module, *options):
        module.main([*TRAIN, *options, "--dry-run", *MORE])
        return capsys.readouterr().out

    return render


def is_shell(text):
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def holds(words, part):
    return any(words[i : i + len(part)] == part for i in range(len(words)))


def test_the_command_is_one_that_training_understands():
    args = cli.parser("train", "")
    args.add_argument("--config")
    args.add_argument("--workdir")
    found, overrides = cli.parse(args, WORDS[3:])
    assert (found.config, found.workdir, overrides) == (TRAIN[1], TRAIN[3], MORE)


def test_local_is_the_command_itself(rendered):
    memory, command = rendered(local).splitlines()
    assert memory.startswith("export ") and all(w in memory for w in common.keep_memory().values())
    assert shlex.split(command) == WORDS


def test_local_processes_are_numbered_and_meet(rendered):
    text = rendered(local, "--processes", "4", "--devices", "2", "--port", "5000")
    is_shell(text)
    words = shlex.split(text.replace("\n", " ; "))
    assert {"JAX_COORDINATOR_ADDRESS=localhost:5000", "JAX_NUM_PROCESSES=4"} <= set(words)
    assert holds(words, ["JAX_PROCESS_ID=$i", *WORDS, "&"])


def test_tpu_vm_asks_waits_sends_and_starts(rendered):
    text = rendered(tpu_vm, *CLOUD, "--topology", "v5e:4x4", "--spot")
    is_shell(text)
    words = shlex.split(text.replace("\\\n", ""))
    create = words[words.index("create") + 1 : words.index("until")]
    assert create == [
        "mine", "--node-id=mine", "--project=p", "--zone=z", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
    ]  # fmt: skip
    (start,) = [w for w in words if w.startswith("--command=set -e")]
    is_shell(start.removeprefix("--command="))
    assert holds(shlex.split(start), ["nohup", *WORDS, ">"])


def test_tpu_vm_starts_several_slices(rendered):
    text = rendered(tpu_vm, *CLOUD, "--topology", "v6e:16x16", "--slices", "2")
    assert "--node-prefix=mine --node-count=2" in text and "v6e-256" in text
    assert "for node in mine-0 mine-1; do" in text


def test_gke_is_one_xpk_workload(rendered):
    text = rendered(gke, *CLOUD, "--cluster", "c", "--topology", "v5p:4x4x4", "--slices", "2")
    words = shlex.split(text.replace("\\\n", ""))
    assert words[:3] == ["xpk", "workload", "create"]
    given = dict(w.removeprefix("--").split("=", 1) for w in words[3:])
    assert given["tpu-type"] == "v5p-128", "v5p counts cores, two of a chip"
    assert (given["num-slices"], given["workload"], given["cluster"]) == ("2", "mine", "c")
    is_shell(given["command"])
    assert holds(shlex.split(given["command"]), ["&&", *WORDS])


def test_slurm_is_a_batch_script(rendered):
    text = rendered(slurm, "--nodes", "4", "--gpus", "8", "--time", "2:00:00")
    is_shell(text)
    options = dict(
        line.removeprefix("#SBATCH --").split("=")
        for line in text.splitlines()
        if line.startswith("#SBATCH") and "=" in line
    )
    assert (options["nodes"], options["ntasks-per-node"]) == ("4", "1")
    assert (options["gpus-per-node"], options["time"]) == ("8", "2:00:00")
    assert "partition" not in options
    (run,) = [line for line in text.splitlines() if line.startswith("srun")]
    assert shlex.split(run) == ["srun", "--kill-on-bad-exit=1", *WORDS, "&"]


@pytest.mark.parametrize(
    "accelerators, nodes, extra", [("H100:8", 4, "cuda"), ("tpu-v6e-8", 1, "tpu")]
)
def test_sky_is_a_task(rendered, accelerators, nodes, extra):
    task = yaml.safe_load(rendered(sky, "--accelerators", accelerators, "--nodes", str(nodes)))
    assert task["num_nodes"] == nodes
    assert task["resources"] == dict(accelerators=accelerators, use_spot=False)
    is_shell(task["setup"])
    is_shell(task["run"])
    assert f".[{extra}]" in shlex.split(task["setup"])
    assert shlex.split(task["run"].splitlines()[-1]) == WORDS
    assert ("SKYPILOT_NODE_RANK" in task["run"]) == (nodes > 1)


@pytest.mark.parametrize("topology", ["v5e", "v5e:16", "v9:4x4", "v5e:4x"])
def test_an_unknown_topology_is_a_one_line_error(topology):
    with pytest.raises(SystemExit, match="error: no topology") as error:
        common.slice_of(topology)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", [gke, local, sky, slurm, tpu_vm], ids=lambda m: m.__name__)
def test_the_command_in_a_launchers_header_is_understood(module, capsys):
    text = module.__doc__.replace("\\\n", " ")
    (command,) = re.findall(rf"^ +python -m {module.__name__} (.*)$", text, re.M)
    module.main([*shlex.split(command), "--dry-run"])
    words = shlex.split(capsys.readouterr().out.replace("\\\n", ""))
    spec = shlex.split(command)[1]
    assert spec in " ".join(words)
    config.read(spec)


def test_it_runs_and_returns_the_exit_status():
    """As a user starts it; a launcher needs no JAX."""
    command = [sys.executable, "-c", "import sys; sys.modules['jax'] = None; import launch.local\n"]
    command[-1] += "launch.local.main(sys.argv[1:])"
    done = subprocess.run([*command, *TRAIN, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and shlex.split(done.stdout.splitlines()[-1]) == WORDS[:-2]
    done = subprocess.run([*command, *TRAIN, "--what"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown argument '--what'" in done.stderr
