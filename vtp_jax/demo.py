"""Trains SimVTP on drawn scenes from nothing to a report: `make demo`.

    vtp demo [--workdir runs/demo] [--ablation no_contrast | no_masking]

Renders a corpus of small scenes as mp4 files, trains SentencePiece on its captions and SimVTP on
both; measures on 200 clips of unseen scenes what it restores, with the other modality and without
it, and what it retrieves and matches; draws both, and writes WORKDIR/report.html and
WORKDIR/summary.json. A demo that is stopped says how far it came, and resumes there.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from vtp_jax import evaluate, report
from vtp_jax.data import scenes, shapes, sources, text
from vtp_jax.run import metrics, paths, stop
from vtp_jax.setup import build, cli, config
from vtp_jax.show import pictures
from vtp_jax.train import train

WORDS = 300  # upper bound on pieces: each word of the corpus is one
LOSSES = ("loss_video", "loss_text", "loss_vtc", "loss_vtm")
ABLATIONS = ("no_contrast", "no_masking")
MEASURED = dict(  # keys of the summary, and the evaluation's numbers; None where not measured
    t2v_r1="retrieval/t2v_r1",
    v2t_r1="retrieval/v2t_r1",
    match_accuracy="losses/match_accuracy",
    restored_db="restoration/restored_db",
    interpolated_db="restoration/interpolated_db",
    restored_db_without_caption="restoration/restored_db_without_caption",
    words_right="restoration/words_right",
    words_right_without_video="restoration/words_right_without_video",
)


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
        try:
            yield
        finally:
            self.add(name, time.monotonic() - start)


def prepare(corpus: Path, stages: Stages) -> None:
    """Makes the corpus and its tokenizer unless they exist."""
    with stages("corpus"):
        plan = shapes.Plan()
        made = shapes.write(corpus, plan, corpus=scenes.SCENES)
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


def summarise(
    workdir: paths.PathLike, steps: int, done: int, numbers: Mapping[str, float], stages: Stages
) -> dict[str, Any]:
    """The summary of a run: `done` of `steps`; None is what was not measured, or a loss that the
    ablation leaves out."""
    lines = [x for x in metrics.read(paths.path(workdir) / "metrics.jsonl") if "train/loss" in x]
    speeds = [x["train/clips_per_s"] for x in lines if x.get("train/clips_per_s")]
    last = lines[-1] if lines else {}
    return dict(
        steps_done=done,
        steps=steps,
        **{key: numbers.get(name) for key, name in MEASURED.items()},
        **{name: last.get(f"train/{name}") for name in LOSSES},
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
    cfg = config.load(f"{args.config}:{args.ablation or ''}", overrides)
    workdir = paths.path(args.workdir or f"runs/demo{'_' + args.ablation if args.ablation else ''}")
    workdir.mkdir(parents=True, exist_ok=True)
    stages = Stages(workdir / "stages.json")
    if args.started is not None:
        stages.add("environment", start - args.started)
    prepare(Path(cfg.data["train"]["root"]), stages)

    def finish(done: int, numbers: Mapping[str, float]) -> None:
        """Writes the summary and the report, and prints the summary."""

        def write() -> dict[str, Any]:
            summary = summarise(workdir, cfg.steps, done, numbers, stages)
            (workdir / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
            return summary

        with stages("report"):
            write()
            path = report.write(workdir, label=args.ablation or "")
        summary = write()  # again, with the seconds of the report
        flat = {**summary, **{f"seconds, {k}": v for k, v in stages.seconds.items()}}
        rows = [(k, v) for k, v in flat.items() if k != "seconds" and v is not None]
        metrics.print_table(f"{done} of {cfg.steps} steps", ("what", "value"), rows)
        print(f"numbers: {workdir / 'summary.json'}\nreport:  {path}")

    try:
        with stages("training"):
            train(cfg, workdir)
    except stop.Stopped as stopped:
        finish(stopped.step, {})
        raise
    finish(cfg.steps, look(workdir, stages))


if __name__ == "__main__":
    cli.run(main)
