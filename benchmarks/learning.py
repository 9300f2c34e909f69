"""What each method learns on the moving shapes in a few minutes, compared with chance.

    python -m benchmarks.learning              every method
    python -m benchmarks.learning snclr coca   these methods
    python -m benchmarks.learning --out runs   keeps the runs, for `python -m vtp_jax.visualize`

Each method trains its tiny recipe, slightly enlarged, from random weights on clips drawn in
memory. Evaluation uses held-out clips: combinations of colour, shape, size, motion and background
that never occur in training. `untrained` is the score of the same net before its first step; for
reconstruction, `chance` is the score of predicting 0 for every pixel, the mean of its cube. Each
run appends a line to benchmarks/results/learning.jsonl, from which tests/tables.py makes the table
of docs/learning.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vtp_jax.run import metrics, sharding
from vtp_jax.setup import build, cli, config
from vtp_jax.types import State, UserError

RESULTS = Path(__file__).parent / "results" / "learning.jsonl"
BAND = dict(side=32, frames=8)  # clips are drawn at the size the net sees
VAL = dict(clips=200, **BAND)

# Pixels: whole clips, whose bands are as wide as cubes, so that hidden cubes can be inferred from
# visible ones (with crops of any scale, the loss after 600 steps of 32 clips is still the score of
# predicting 0); four masks for each clip, as in V2.
PIXELS = dict(
    data__train=dict(clips=6000, **BAND),
    data__evals__val=VAL,
    data__video__crop="centre",
    data__video__repeats=4,
    method__dtype="float32",
)

# SNCLR learns to ignore whatever differs between its views. Crops often miss the shape but never
# the background, and backgrounds differ in colour: the views keep their colours.
STILL = dict(jittered=0.0, grey=0.0, solarise=0.0)

HEAD = "decoder_head"  # predicts pixels


class Case(NamedTuple):
    """A config, its changes, and what is measured.

    metric: the name of an evaluation result
    chance: a number, the name of an evaluation result, or HEAD: the score of the untrained net
        whose head predicts 0
    better: 1 if more is better, -1 if less
    """

    config: str
    changes: Mapping[str, Any]
    metric: str
    chance: float | str
    better: int = 1


def steps(count: int, **more: Any) -> dict[str, Any]:
    """Overrides for a run of `count` steps: its schedules, and evaluation at the end only."""
    return {
        "steps": count,
        "optim.lr.steps": count,
        "optim.lr.warmup": count // 10,
        "log.every": max(count // 10, 1),
        "checkpoint.every": count,
        **{k.replace("__", "."): v for k, v in more.items()},
    }


CASES: Mapping[str, Case] = dict(
    videomae=Case(
        "configs/videomae/pretrain_k400.py:tiny",
        steps(1000, batch=16, **PIXELS),
        "eval/val/loss_video",
        HEAD,
        -1,
    ),
    videomae_v2=Case(
        "configs/videomae_v2/pretrain_hybrid.py:tiny",
        steps(1000, batch=16, **PIXELS),
        "eval/val/loss_video",
        HEAD,
        -1,
    ),
    coca=Case(
        "configs/coca/pretrain.py:tiny",
        steps(1000, batch=32, data__train=dict(clips=6000, **BAND), data__evals__val=VAL),
        "eval/retrieval/t2v_r1",
        1 / 200,
    ),
    snclr=Case(
        "configs/snclr/pretrain_imagenet.py:tiny",
        steps(
            800,
            batch=64,
            data__train=dict(clips=6000, **BAND),
            data__evals__val=dict(VAL, label="background"),
            method__queue=1024,
            method__first=STILL,
            method__second=STILL,
        ),
        "eval/val/knn1",
        "eval/val/chance",
    ),
    tvtsv2=Case(
        "configs/tvtsv2/pretrain_yt_webvid.py:tiny",
        steps(
            1000,
            optim__lr__at=[600, 800],
            data__train=dict(clips=1500, pieces=4, **BAND),
            data__evals__val=VAL,
            data__evals__order=dict(clips=50, pieces=4, **BAND),
        ),
        "eval/retrieval/t2v_r1",
        1 / 200,
    ),
    omnivl=Case(
        "configs/omnivl/pretrain.py:tiny",
        steps(800, data__train=dict(clips=6000, **BAND), data__evals__val=VAL),
        "eval/retrieval/t2v_r1",
        1 / 200,
    ),
)


def changed(case: Case) -> config.Config:
    """The config of a case, as `train` takes it."""
    cfg = config.read(case.config)
    with cfg.unlocked(), cfg.ignore_type():
        for path, value in case.changes.items():
            *parts, last = path.split(".")
            inner = cfg
            for part in parts:
                inner = inner[part]
            if last in inner or not path.startswith("optim.lr."):
                inner[last] = value
        for check in cfg.evals.values():
            check.every = 0  # at the end only
    return config.make(cfg)


def untrained(cfg: config.Config, silent: str | None = None) -> dict[str, float]:
    """The evaluation results of the net before its first step, the parameters `silent` set to 0."""
    mesh = build.mesh(cfg)
    data = build.data(cfg.data, batch=cfg.batch, seed=cfg.seed)
    parts = build.prepare(cfg, data, mesh)
    with sharding.activate(mesh):
        state: State = jax.jit(parts.start)()
        if silent:
            answer = jax.tree.map(jnp.zeros_like, state.params[silent])
            state = state._replace(params={**state.params, silent: answer})
        checks = build.evaluators(cfg.evals, parts.method, data.streams, mesh)
        return {
            f"eval/{name}/{key}": value
            for name, (_, check) in checks.items()
            for key, value in check.run(state)
        }


def measure(name: str, out: Path | None = None) -> dict[str, Any]:
    from vtp_jax import train

    case = CASES[name]
    cfg = changed(case)
    before = untrained(cfg)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        last = train.train(cfg, out / name if out else folder)
        took = time.monotonic() - began
    chance = case.chance
    if chance == HEAD:
        chance = untrained(cfg, HEAD)[case.metric]
    elif isinstance(chance, str):
        chance = last[chance]
    scores = {k.removeprefix("eval/"): v for k, v in last.items() if k.startswith("eval/")}
    return dict(
        method=name,
        config=case.config,
        clips=cfg.steps * cfg.batch,
        seconds=round(took),
        metric=case.metric.removeprefix("eval/"),
        better=case.better,
        chance=chance,
        untrained=before[case.metric],
        trained=last[case.metric],
        untrained_all={k.removeprefix("eval/"): v for k, v in before.items()},
        trained_all=scores,
        machine=f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
        jax=jax.__version__,
    )


def table() -> Iterator[str]:
    """The table of docs/learning.md: the newest line of each method in the results."""
    lines = [json.loads(x) for x in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {line["method"]: line for line in lines}
    yield "| method | config | clips | seconds | metric | chance | untrained | trained |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, case in CASES.items():
        if line := newest.get(name):
            sign = "" if line["better"] > 0 else " (less is better)"
            cells = [f"{line['clips']:,}", str(line["seconds"]), line["metric"] + sign]
            cells += [f"{line[what]:.3f}" for what in ("chance", "untrained", "trained")]
        else:
            cells = ["not measured yet", *[""] * 5]
        yield f"| {' | '.join((name, f'`{case.config}`', *cells))} |"


def main(argv: Sequence[str]) -> None:
    from tests import tables

    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument("methods", nargs="*", help=f"any of {', '.join(CASES)}; default: all")
    parser.add_argument("--out", type=Path, help="a folder that keeps the runs; default: none")
    args = parser.parse_args(argv)
    names = args.methods or list(CASES)
    for name in names:
        if name not in CASES:
            raise UserError(
                f"{name}: no such case in benchmarks/learning.py; known: {', '.join(CASES)}"
            )
    RESULTS.parent.mkdir(exist_ok=True)
    for name in names:
        line = measure(name, args.out)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        metrics.print_table(
            name, ("what", "value"), [(k, v) for k, v in line.items() if "_all" not in k]
        )
    tables.main()


if __name__ == "__main__":
    cli.run(main)
