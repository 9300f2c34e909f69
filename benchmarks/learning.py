"""What each method learns on the moving shapes in a few minutes, held against chance.

    python -m benchmarks.learning              all of them
    python -m benchmarks.learning snclr coca   these
    python -m benchmarks.learning --out runs   the runs stay there: `python -m vtp_jax.visualize`

Every method trains its own tiny recipe, made a little larger, from random weights on clips drawn in
memory; what it is asked about is held out: combinations of colour, shape, size, motion and ground
that never occur in training. `untrained` is the same net before its first step; for reconstruction,
`chance` is what 0 scores as the answer for every pixel, the mean of its cube. Lines of JSON go to
benchmarks/results/learning.jsonl, the table to docs/learning.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vtp_jax.run import metrics, sharding
from vtp_jax.setup import build, cli
from vtp_jax.types import State, UserError

RESULTS = Path(__file__).parent / "results" / "learning.jsonl"
TABLE = Path(__file__).parents[1] / "docs" / "learning.md"
BAND = dict(side=32, frames=8)  # clips are drawn as large as they are shown
VAL = dict(clips=200, **BAND)

# Pixels: whole clips, whose bands are as wide as cubes, so that what is hidden can be told from
# what is seen (in crops of any scale, 600 steps of 32 clips end where they began, at what 0
# scores); four maskings of each clip, as V2 has them.
PIXELS = dict(
    data__train=dict(clips=6000, **BAND),
    data__evals__val=VAL,
    data__video__crop="centre",
    data__video__repeats=4,
    method__dtype="float32",
)

# SNCLR learns to ignore what its views change. Crops often miss the shape and never the ground, of
# which the colours tell one from the other.
STILL = dict(jittered=0.0, grey=0.0, solarise=0.0)


HEAD = "decoder_head"  # what answers with pixels


class Case(NamedTuple):
    """A config, what of it is changed, and what is measured.

    metric: the name of a number of evaluation; chance: a number, the name of one, or HEAD for what
    the untrained net scores whose head answers 0. better: 1 if more is better, -1 if less
    """

    config: str
    changes: Mapping[str, Any]
    metric: str
    chance: float | str
    better: int = 1


def steps(count: int, **more: Any) -> dict[str, Any]:
    """Overrides of a run of `count` steps: its schedules, and evaluation at the end alone."""
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


def changed(case: Case) -> dict[str, Any]:
    """The case's config as train takes it."""
    config = cli.load_config(case.config)
    with config.unlocked(), config.ignore_type():
        for path, value in case.changes.items():
            *parts, last = path.split(".")
            inner = config
            for part in parts:
                inner = inner[part]
            if last in inner or not path.startswith("optim.lr."):
                inner[last] = value
        for check in config.evals.values():
            check.every = 0  # at the end alone
    return cli.plain(config)


def untrained(cfg: Mapping[str, Any], silent: str | None = None) -> dict[str, float]:
    """What the evaluators say of the net before its first step, the parameters `silent` all 0."""
    mesh = sharding.make_mesh(**cfg["mesh"])
    data = build.data(cfg["data"], batch=cfg["batch"], seed=cfg["seed"])
    method = build.method(cfg, data.facts)
    start, _ = build.start(method, cfg["optim"], data.spec, cfg["seed"])
    with sharding.activate(mesh):
        state: State = jax.jit(start)()
        if silent:
            answer = jax.tree.map(jnp.zeros_like, state.params[silent])
            state = state._replace(params={**state.params, silent: answer})
        checks = build.evaluators(cfg["evals"], method, data.streams, mesh)
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
        last = cli.call(train.train, "config", workdir=str(out / name) if out else folder, **cfg)
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
        clips=cfg["steps"] * cfg["batch"],
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


def write_table(lines: Sequence[Mapping[str, Any]]) -> None:
    rows = {line["method"]: line for line in lines}  # the newest of each
    shown = [
        "| method | config | clips | seconds | metric | chance | untrained | trained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in (n for n in CASES if n in rows):
        line = rows[name]
        cells = (line["chance"], line["untrained"], line["trained"])
        chance, *numbers = (f"{x:.3f}" for x in cells)
        sign = "" if line["better"] > 0 else " (less is better)"
        shown.append(
            f"| {name} | `{line['config']}` | {line['clips']:,} | {line['seconds']} | "
            f"{line['metric']}{sign} | {chance} | {' | '.join(numbers)} |"
        )
    about = (__doc__ or "").split("\n\n")[2].replace("\n", " ")
    missing = ", ".join(name for name in CASES if name not in rows)
    after = [f"Still to be measured: {missing}.", ""] if missing else []
    text = "\n".join(["# What each method learns in minutes", "", about, "", *shown, "", *after])
    TABLE.write_text(text, encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--out", type=Path, help="where the runs are kept; default: nowhere")
    args = parser.parse_args(argv)
    names = args.methods or list(CASES)
    for name in names:
        if name not in CASES:
            raise UserError(
                f"{name}: no row in CASES of benchmarks/learning.py; {', '.join(CASES)} have"
            )
    RESULTS.parent.mkdir(exist_ok=True)
    for name in names:
        line = measure(name, args.out)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        metrics.print_table(
            name, ("what", "value"), [(k, v) for k, v in line.items() if "_all" not in k]
        )
    lines = [json.loads(x) for x in RESULTS.read_text(encoding="utf-8").splitlines()]
    write_table(lines)


if __name__ == "__main__":
    cli.run(main)
