"""Goldens of plans: which config on which pod with which mesh, and how two texts are compared.

python -m tests.plans [PART OF A NAME]...    rewrites those that differ

A config that is named gets a golden if it has none.
"""

import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax

from tests.configs import config_files, file_name
from vtp_jax import plan
from vtp_jax.measure import forecast, pods
from vtp_jax.setup import config

GOLDEN = Path(__file__).parent / "golden/plan"
POD = "v6e:16x16"  # every config fits it
LOOSE = 0.15  # of each number: another release of the compiler may choose otherwise
DIGIT = 0.0005 * pods.GIB  # half of the last digit of memory
# Batches that 256 chips do not divide become the next that they do; the parameters and moments of
# nets of a billion parameters are split.
SPLIT = ["--config.mesh.fsdp=16"]
CHANGED = {
    "configs/coca/pretrain.py": SPLIT,
    "configs/demo.py": ["--config.batch=256"],
    "configs/omnivl/answer_msrvtt_qa.py": ["--config.batch=256"],
    "configs/omnivl/pretrain.py": [
        "--config.batch=1024",
        "--config.data.also.images.batch=3072",
        "--config.data.also.image_classes.batch=3072",
    ],
    "configs/simvtp/answer_msrvtt_qa.py": ["--config.batch=256"],
    "configs/simvtp/finetune_msrvtt.py": ["--config.batch=256"],
    "configs/tvtsv2/pretrain_yt_webvid.py": ["--config.batch=1024"],
    "configs/videomae/finetune_k400.py": ["--config.batch=512"],
    "configs/videomae_v2/finetune.py": [*SPLIT, "--config.batch=256"],
    "configs/videomae_v2/pretrain_hybrid.py": SPLIT,
}


TINY = "configs/videomae/pretrain_k400.py:tiny"


def smallest(*overrides):
    """A config that compiles in seconds."""
    cfg = config.load(TINY, overrides)
    cfg.method.update(size=[32, 2, 2, 64], decoder=[32, 1, 2, 64])
    return cfg


def golden(path):
    return GOLDEN / f"{file_name(path)}.txt"


def planned():
    """The configs that have a golden."""
    return [path for path in config_files() if golden(path).exists()]


class Expected(NamedTuple):
    """The part of a golden that needs no compiler: bytes on a chip; FLOPs of a step with remat."""

    batch: int
    fsdp: int
    params: float
    opt: float
    work: float


def expected(path):
    text = golden(path).read_text(encoding="utf-8")

    def number(pattern):
        found = re.search(pattern, text)
        return float(found[1]) if found else 0.0

    work = number(r"work: ([\d.]+) TFLOP") + number(r"and ([\d.]+) again")
    batch, fsdp = (int(number(rf"{name}[ =](\d+)")) for name in ("batch", "fsdp"))
    params, opt = (number(rf"{name} ([\d.]+)") * pods.GIB for name in ("params", "opt"))
    return Expected(batch, fsdp, params, opt, work * 1e12)


def written(path):
    """The golden's text of a config: a minute or more of compiling."""
    overrides = CHANGED.get(path, [])
    cfg, pod = config.load(path, overrides), pods.find_pod(POD)
    made = forecast.make_plan(cfg, pod, quick=True)
    head = plan.title(" ".join([path, *overrides]), made, pod)
    return "\n".join([head, *(f"{what}: {how}" for what, how in plan.rows(made, pod))]) + "\n"


def differences(got, wanted):
    """Lines that differ in words, or by more than LOOSE in a number."""
    number = re.compile(r"\d+\.\d+|\d+")
    got, wanted = got.splitlines(), wanted.splitlines()
    found = [] if len(got) == len(wanted) else [f"{len(got)} lines, not {len(wanted)}"]
    for a, b in zip(got, wanted, strict=False):
        numbers = zip(map(float, number.findall(a)), map(float, number.findall(b)), strict=False)
        near = all(abs(x - y) <= max(LOOSE * abs(y), 0.02) for x, y in numbers)
        if not near or number.sub("#", a) != number.sub("#", b):
            found.append(f"{a!r}, not {b!r}")
    return found


def main(parts):
    named = [path for path in config_files() if any(part in golden(path).name for part in parts)]
    for path in named if parts else planned():
        file = golden(path)
        begun = time.monotonic()
        text = written(path)
        moved = not file.exists() or differences(text, file.read_text(encoding="utf-8"))
        if moved:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        done = "written" if moved else "unchanged"
        print(f"{file.name}: {done}, {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(sys.argv[1:])
