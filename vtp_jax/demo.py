"""Trains SimVTP on moving shapes from nothing to a report: `make demo`.

    vtp demo [--workdir runs/demo] [--ablation no_contrast | no_masking]

Renders a corpus of moving shapes as mp4 files, trains SentencePiece on its captions and SimVTP on
both, retrieves 200 clips of unseen combinations by their captions, draws what the net restores and
retrieves, and writes WORKDIR/report.html and WORKDIR/summary.json. A stopped demo resumes where it
was.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from vtp_jax import evaluate, report
from vtp_jax.data import shapes, sources, text
from vtp_jax.run import metrics, paths
from vtp_jax.setup import build, cli, config
from vtp_jax.show import pictures
from vtp_jax.train import train

WORDS = 300  # upper bound on pieces: each word of the corpus is one
LOSSES = ("loss_video", "loss_text", "loss_vtc", "loss_vtm")
ABLATIONS = ("no_contrast", "no_masking")


class Stages:
    """Seconds by stage, summed over restarts in WORKDIR/stages.json."""

    def __init__(self, path: paths.PathLike):
        self.path = path = paths.path(path)
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.path.write_text(json.dumps(self.seconds), encoding="utf-8")

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"== {name}", flush=True)
        start = time.monotonic()
        yield
        self.add(name, time.monotonic() - start)


def prepare(corpus: Path, stages: Stages) -> None:
    """Makes the corpus and its tokenizer unless they exist."""
    with stages("corpus"):
        plan = shapes.Plan()
        made = shapes.write(corpus, plan)
        print(f"{plan.train} + {plan.val} clips {'rendered to' if made else 'exist in'} {corpus}")
    with stages("tokenizer"):
        clips = sources.load(root=str(corpus), list=str(corpus / "train.csv")).clips
        captions = [caption for clip in clips for caption in clip.captions]
        words = text.train(captions, corpus / "tokenizer.model", WORDS)
        print(f"{words.facts['vocab_size']} pieces; the first caption: {captions[0]}")


def look(workdir: epath.Path, stages: Stages) -> dict[str, float]:
    """Evaluates the newest checkpoint and draws its pictures; returns the numbers."""
    run = build.restore(workdir)
    with stages("evaluation"):
        numbers = evaluate.evaluate(run, workdir)
    with stages("pictures"):
        pictures.write(run, run.data.streams, "val", workdir / "pictures")
    return numbers


def summarise(workdir: paths.PathLike, numbers: dict[str, float], stages: Stages) -> dict[str, Any]:
    """The summary of a run; a loss that the ablation leaves out is None."""
    lines = [x for x in metrics.read(paths.path(workdir) / "metrics.jsonl") if "train/loss" in x]
    speeds = [x["train/clips_per_s"] for x in lines if x.get("train/clips_per_s")]
    return dict(
        t2v_r1=numbers["retrieval/t2v_r1"],
        v2t_r1=numbers["retrieval/v2t_r1"],
        **{name: lines[-1].get(f"train/{name}") for name in LOSSES},
        clips_per_s=statistics.median(speeds) if speeds else None,
        seconds=stages.seconds,
        seconds_total=sum(stages.seconds.values()),
    )


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("demo", __doc__)
    parser.add_argument("--workdir", help="default: runs/demo, or runs/demo_ABLATION")
    parser.add_argument("--ablation", choices=ABLATIONS, help="leave a part of SimVTP out")
    parser.add_argument("--config", default="demo", help="without switches")
    parser.add_argument("--started", type=float, help="start of the setup, in seconds since 1970")
    args, overrides = cli.parse(parser, argv)
    start = time.time()
    workdir = paths.path(args.workdir or f"runs/demo{'_' + args.ablation if args.ablation else ''}")
    workdir.mkdir(parents=True, exist_ok=True)
    stages = Stages(workdir / "stages.json")
    if args.started is not None:
        stages.add("environment", start - args.started)

    cfg = config.load(f"{args.config}:{args.ablation or ''}", overrides)
    prepare(Path(cfg.data["train"]["root"]), stages)
    with stages("training"):
        train(cfg, workdir)
    numbers = look(workdir, stages)

    def write_summary() -> dict[str, Any]:
        summary = summarise(workdir, numbers, stages)
        (workdir / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        return summary

    with stages("report"):
        write_summary()
        path = report.write(workdir, label=args.ablation or "")
    summary = write_summary()  # again, with the seconds of the report
    flat = {**summary, **{f"seconds, {k}": v for k, v in stages.seconds.items()}}
    rows = [(k, v) for k, v in flat.items() if k != "seconds"]
    metrics.print_table("summary", ("what", "value"), rows)
    print(f"numbers: {workdir / 'summary.json'}\nreport:  {path}")


if __name__ == "__main__":
    cli.run(main)
