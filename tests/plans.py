"""Goldens of plans: which config on which pod with which mesh, and how two texts are compared.

python -m tests.plans [PART OF A NAME]...    writes those whose program has changed
"""

import contextlib
import hashlib
import importlib.metadata
import re
import sys
import time
from pathlib import Path

import jax

from tests.configs import config_files, file_name
from vtp_jax import plan
from vtp_jax.setup import cli

GOLDEN = Path(__file__).parent / "golden/plan"
PODS = ("v5e:4x4", "v6e:16x16")
LOOSE = 0.15  # of each number: another release of the compiler may choose otherwise
# Batches that 256 chips do not divide become the next that they do; of nets of a billion
# parameters, these and their moments are split.
SPLIT = ["--config.mesh.fsdp=16"]
CHANGED = {
    "configs/coca/pretrain.py": dict.fromkeys(PODS, SPLIT),
    "configs/demo.py": {"v6e:16x16": ["--config.batch=256"]},
    "configs/omnivl/answer_msrvtt_qa.py": {"v6e:16x16": ["--config.batch=256"]},
    "configs/omnivl/pretrain.py": {
        "v6e:16x16": [
            "--config.batch=1024",
            "--config.data.also.images.batch=3072",
            "--config.data.also.image_classes.batch=3072",
        ]
    },
    "configs/simvtp/answer_msrvtt_qa.py": {"v6e:16x16": ["--config.batch=256"]},
    "configs/simvtp/finetune_msrvtt.py": {"v6e:16x16": ["--config.batch=256"]},
    "configs/tvtsv2/pretrain_yt_webvid.py": {"v6e:16x16": ["--config.batch=1024"]},
    "configs/videomae/finetune_k400.py": {"v6e:16x16": ["--config.batch=512"]},
    "configs/videomae_v2/finetune.py": {
        "v5e:4x4": SPLIT,
        "v6e:16x16": [*SPLIT, "--config.batch=256"],
    },
    "configs/videomae_v2/pretrain_hybrid.py": dict.fromkeys(PODS, SPLIT),
}


def cases():
    """(config, topology, overrides) of every golden."""
    for path in config_files():
        for pod in PODS:
            yield path, pod, CHANGED.get(path, {}).get(pod, [])


def golden(path, topology):
    return GOLDEN / f"{file_name(path)}.{topology.replace(':', '_')}.txt"


def lowered(path, topology, overrides):
    """The config, the pod, the step as it is lowered, and the name of that program."""
    cfg, pod = cli.plain(cli.load_config(path, overrides)), plan.find_pod(topology)
    with without_places():
        step = plan.lower(cfg, pod)
    text = step.program.as_text() + importlib.metadata.version("libtpu")
    return cfg, pod, step, hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def without_places():
    """A kernel of Pallas holds the files and lines that it was written in: another folder, or a
    line more above it, would be another program."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def written(path, overrides, made, pod, program):
    """The golden's text."""
    command = " ".join([path, *overrides])
    head = plan.title(command, made, pod)
    lines = [f"{what}: {how}" for what, how in plan.rows(made, pod)]
    return "\n".join([head, *lines, f"program: {program}"]) + "\n"


def differences(got, wanted):
    """Lines that differ in words, or by more than LOOSE in a number; the program's name may."""
    number = re.compile(r"\d+\.\d+|\d+")
    found = []
    pairs = zip(got.splitlines(), wanted.splitlines(), strict=False)
    if len(got.splitlines()) != len(wanted.splitlines()):
        found.append(f"{len(got.splitlines())} lines, not {len(wanted.splitlines())}")
    for a, b in pairs:
        if a.startswith("program: "):
            continue
        numbers = zip(map(float, number.findall(a)), map(float, number.findall(b)), strict=False)
        near = all(abs(x - y) <= max(LOOSE * abs(y), 0.02) for x, y in numbers)
        if not near or number.sub("#", a) != number.sub("#", b):
            found.append(f"{a!r}, not {b!r}")
    return found


def main(parts):
    for path, topology, overrides in cases():
        file = golden(path, topology)
        if parts and not any(part in file.name for part in parts):
            continue
        begun = time.monotonic()
        cfg, pod, step, program = lowered(path, topology, overrides)
        if file.exists() and f"program: {program}\n" in file.read_text(encoding="utf-8"):
            print(f"{file.name}: as it was", flush=True)
            continue
        made = plan.compile_plan(step, cfg, pod, quick=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(written(path, overrides, made, pod, program), encoding="utf-8")
        fits = "fits" if made.fits else "does not fit"
        print(f"{file.name}: {fits}, {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(sys.argv[1:])
