"""Prepares and checks training data: shards, tokenizers, corpora of drawn clips.

vtp prepare tokenizer --captions train.csv --vocab-size 8000 --out spm.model
vtp prepare check --root videos --list train.csv
vtp prepare shapes --out data/shapes
vtp prepare shards --root videos --list train.csv --config own --out data/train
vtp prepare shards --tars openvid/*.tar --out data/openvid
vtp prepare shards --tfds ucf101 --label-column label --out data/ucf101
vtp prepare shards --set vatex --split val_en --root vatex --out data/vatex
vtp prepare remove --shards data/train --ids taken_down.txt
"""

from __future__ import annotations

import argparse
import collections
import functools
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vtp_jax import lines, progress
from vtp_jax.data import inputs, processes, scenes, sets, shapes, shards, sources, text, video
from vtp_jax.data.workers import cores
from vtp_jax.run import metrics
from vtp_jax.setup import auto, cli, config
from vtp_jax.types import UserError, at_least

CORPORA = dict(shapes=shapes.MOVING, scenes=scenes.SCENES)  # moving shapes; the demo's scenes
INFINITY = float("inf")
BOUNDS = dict(
    short_side=(16, INFINITY),
    every=(1, INFINITY),
    quality=(1, 95),
    ratio=(0, INFINITY),
    per_shard=(1, INFINITY),
    seconds=(0.001, INFINITY),
    memory=(0.1, INFINITY),
    pixels=(1, INFINITY),
    workers=(1, INFINITY),
    max_absent=(0, 1),
)


def main(argv: Sequence[str]) -> None:
    commands = cli.Commands("prepare", __doc__)
    command = commands.add("tokenizer", train_tokenizer, "train SentencePiece on captions")
    command.add_argument("--captions", required=True, help=".csv, .jsonl or .json")
    command.add_argument("--vocab-size", type=int, default=8000, help="the largest vocabulary")
    command.add_argument("--out", required=True, help="the model file to write")
    add_columns(command)

    about = "decode every video and list the unreadable ones; exits with 1 if there are any"
    command = commands.add("check", check, about)
    command.add_argument("--root", required=True, help="the folder of the videos")
    about = "check only the videos that this file names"
    command.add_argument("--list", "--captions", dest="list", help=about)
    command.add_argument("--path-column", default="path", help="of a .csv or .jsonl file")
    about = "also check that every row has a caption in this column"
    command.add_argument("--caption-column", default="none", help=about)
    add_pixels(command)

    command = commands.add("shapes", render_shapes, "render a corpus of drawn clips as mp4")
    command.add_argument("--corpus", choices=list(CORPORA), default="shapes")
    command.add_argument("--out", required=True, help="the folder to write")
    plan = shapes.Plan()
    command.add_argument("--train", type=int, default=plan.train, help="clips")
    command.add_argument("--val", type=int, default=plan.val, help="clips")
    command.add_argument("--side", type=int, default=plan.side, help="pixels")
    command.add_argument("--frames", type=int, default=plan.frames, help="of a clip")
    command.add_argument("--seed", type=int, default=plan.seed)

    add_shards(commands.add("shards", make_shards, "store videos as shards of prepared clips"))

    command = commands.add("remove", remove, "delete records from finished shards")
    command.add_argument("--shards", required=True, help="the folder of the shards")
    command.add_argument("--ids", required=True, help="a file with one id per line")
    commands.run(argv)


def add_columns(command: argparse.ArgumentParser) -> None:
    """The columns of a caption file."""
    command.add_argument("--path-column", default="path", help="of a .csv or .jsonl file")
    command.add_argument("--caption-column", default="caption")


def add_pixels(command: argparse.ArgumentParser) -> None:
    most = video.WHOLE.pixels
    command.add_argument("--pixels", type=int, default=most, help="of the largest picture allowed")


def add_shards(command: argparse.ArgumentParser) -> None:
    """The arguments of `shards`."""
    form = shards.Form()
    add = command.add_argument
    given = command.add_mutually_exclusive_group(required=True)
    given.add_argument("--list", "--captions", help="a file that names videos below --root")
    given.add_argument("--tars", nargs="+", help="WebDataset tars, or folders of them")
    given.add_argument("--tfds", help="a data set of TFDS that is prepared already")
    given.add_argument("--set", help="one of the community's data sets; see docs/datasets.md")
    add("--root", help="the folder of --list's videos, of --set's files, or of TFDS's data sets")
    add("--split", default="train", help="of --set, or of --tfds, such as 'train[:60%%]'")
    add("--path-column", default="path", help="of a .csv or .jsonl file")
    add("--caption-column", default="caption", help="of a file, of .json in tars, of TFDS; or none")
    add("--label-column", default="none", help="of a file, or of TFDS")
    add("--video-column", default="video", help="of TFDS")
    add("--id-column", default="none", help="of TFDS")
    add("--source", default="", help="origin of the videos, where their list has none")
    add("--licence", default="", help="licence of the videos, where their list has none")
    add("--max-absent", type=float, default=1.0, help="share of named files that may be absent")
    add("--out", required=True, help="the folder to write; an unfinished run in it is resumed")
    add("--short-side", type=int, default=form.short_side, help="pixels, of larger videos")
    add("--config", help="store the frames that this config shows; its name, or a file")
    add("--every", type=int, help="store frames 0, N, 2 N, ...: --config's stride, or 4")
    add("--quality", type=int, default=form.quality, help="of JPEG, 1 to 95")
    add(
        "--ratio",
        type=float,
        default=form.ratio,
        help="lower --quality where a clip has more than N times its video's bytes",
    )
    add("--per-shard", type=int, default=128, help="clips; a tar is always one shard")
    add("--seconds", type=float, default=form.seconds, help="of one core, that a video may take")
    add_pixels(command)
    add("--memory", type=float, default=4.0, help="GiB that a process may use")
    add("--workers", type=int, default=cores(), help="processes")
    add("--runner", choices=("local", "beam"), default="local")
    add("--beam", action="append", default=[], help="an option of Beam's own, with its dashes")


def make_shards(args: argparse.Namespace) -> None:
    columns = {
        name: None if (given := getattr(args, f"{name}_column")) == "none" else given
        for name in ("caption", "label", "id")
    }
    args.every = choose_every(args, columns)
    for name, (low, high) in BOUNDS.items():
        if not low <= getattr(args, name) <= high:
            most = f" and {high} or less" if high < INFINITY else ""
            raise UserError(f"--{name.replace('_', '-')} must be {low} or more{most}")
    captioned = columns["caption"] is not None and args.set is None
    form = shards.Form(
        args.short_side,
        args.every,
        args.quality,
        args.ratio,
        args.seconds,
        captioned,
        args.pixels,
    )
    tasks = plan_shards(args, columns)
    out = Path(args.out)
    with shards.hold(out):
        left = shards.begin(out, tasks, form)
        if len(left) < len(tasks):
            print(f"{out}: {len(tasks) - len(left)} of {len(tasks)} shards are there already")
        if args.runner == "beam":
            processes.run_beam(left, out, form, args.beam)
        else:
            steps = processes.run(left, out, form, workers=args.workers, memory=args.memory)
            for _ in progress.track(steps, sum(t.count for t in left), "storing", "videos", int):
                pass
        print_manifest(out, shards.finish(out))
    flags = f"--config.data.kind=shards --config.data.train.root={shlex.quote(str(out))}"
    needs = f"a config whose data.video.stride is a multiple of {args.every}"
    print(f"train on them with {args.config or needs}: {flags}")


def choose_every(args: argparse.Namespace, columns: Mapping[str, str | None]) -> int:
    """The distance of stored frames: --every, which must suit --config; or the distance that
    --config asks for. A stride that it leaves to the data is chosen from those of --list."""
    default = shards.Form().every
    if args.config is None:
        if args.overrides:
            raise UserError(f"'{args.overrides[0]}' changes --config, which is not given")
        return default if args.every is None else args.every
    cfg = config.load(args.config, args.overrides)
    data = cfg.data
    if args.list and "data.video.stride" in cfg.auto:
        found = config.read(args.config, args.overrides)
        auto.put(found, "data.kind", "files")
        auto.put(found, "data.train", ConfigDict(list_of(args, columns)))
        stride, _ = auto.choose_stride(auto.Survey(found), found)
        data = {**data, "video": {**data["video"], "stride": stride}}
    shown = [data["video"], *(m.get("video", {}) for m in (data.get("also") or {}).values())]
    looks = [{**data["video"], **look} for look in shown]
    strides = [
        1 if look.get("sampling") == "segments" else look["stride"]
        for look in looks
        if look["frames"] > 1
    ]
    every = math.gcd(*strides) or 1
    if args.every is not None and every % args.every:
        fit = [n for n in range(every, 0, -1) if every % n == 0]
        raise UserError(
            f"--every {args.every}: {args.config} shows frames {every} apart; "
            f"give {' or '.join(map(str, fit))}, or leave --every out"
        )
    if args.every is None:
        print(f"every {every}th frame is stored, as {args.config} shows them", flush=True)
    return every if args.every is None else args.every


def list_of(args: argparse.Namespace, columns: Mapping[str, str | None]) -> dict[str, Any]:
    """The arguments of `sources.load` for --list."""
    return dict(
        root=args.root,
        list=args.list,
        path_column=args.path_column,
        caption_column=columns["caption"],
        label_column=columns["label"],
        max_absent=args.max_absent,
    )


def plan_shards(args: argparse.Namespace, columns: Mapping[str, str | None]) -> list[inputs.Task]:
    terms = args.source, args.licence
    if args.tars:
        return inputs.plan_tars(args.tars, columns["caption"] or "", *terms)
    if args.tfds:
        caption, label, key = (columns[k] or "" for k in ("caption", "label", "id"))
        named = (args.video_column, caption, label, key)
        return inputs.plan_tfds(args.tfds, args.split, args.root, args.per_shard, named, *terms)
    if not args.root:
        given, what = ("--set", "files") if args.set else ("--list", "videos")
        raise UserError(f"{given} needs --root, the folder of its {what}")
    if args.set:
        source = sets.load(args.set, args.split, args.root, max_absent=args.max_absent, parts=True)
    else:
        source = sources.load(**list_of(args, columns))
    clips = [
        c._replace(source=c.source or args.source, licence=c.licence or args.licence)
        for c in source.clips
    ]
    return inputs.plan_files(source._replace(clips=clips), args.per_shard)


def print_manifest(out: Path, made: Mapping[str, Any]) -> None:
    size, before = made["bytes"], made["bytes_before"]
    ratio = f", {size / before:.2f} x the videos'" if before else ""
    print(f"{out}: {made['records']} records, {metrics.number(size / 1e9)} GB{ratio}")
    for cause, count in made["causes"].items():
        print(f"{count:8d} {cause:16s} {shards.CAUSES.get(cause, '')}".rstrip())


def remove(args: argparse.Namespace) -> None:
    ids = Path(args.ids)
    if not ids.exists():
        raise UserError(f"no file '{ids}'; write an id on each line")
    wanted = {one: number for number, one in lines.items(ids)}
    if not wanted:
        raise UserError(f"{ids} is empty; write an id on each line")
    made, gone, unknown = shards.remove(Path(args.shards), wanted)
    print(
        f"{args.shards}: {made['records']} records are left, {gone} have been taken down "
        f"({made['causes'].get('removed', 0)} in all)"
    )
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(wanted)} ids are nowhere in {args.shards}, first "
            f"'{unknown[0]}' ({ids}, line {wanted[unknown[0]]}); correct them and run again"
        )


def train_tokenizer(args: argparse.Namespace) -> None:
    pairs = sources.read_captions(Path(args.captions), args.path_column, args.caption_column)
    tokenizer = text.train((caption for _, caption in pairs), args.out, args.vocab_size)
    print(f"{args.out}: {tokenizer.facts['vocab_size']} pieces")


def check(args: argparse.Namespace) -> None:
    if args.pixels < 1:
        raise UserError("--pixels must be 1 or more")
    if args.list:
        source = sources.load(
            args.root,
            args.list,
            path_column=args.path_column,
            caption_column=None if args.caption_column == "none" else args.caption_column,
            max_absent=1.0,
        )
    else:
        source = sources.from_files([args.root])
    files = [source.file(i) for i in range(len(source.clips))]
    causes: collections.Counter[str] = collections.Counter()
    limits = video.WHOLE._replace(pixels=args.pixels)
    with ThreadPoolExecutor(cores()) as pool:
        scanned = pool.map(functools.partial(scan, limits=limits), files)
        scanned = progress.track(scanned, len(files), "decoding", "videos")
        for file, error in zip(files, scanned, strict=True):
            causes[error.cause if error else "readable"] += 1
            if error:
                print(f"{show(file)}: {show(str(error))}")
    for cause, count in causes.most_common():
        print(f"{count:8d} {cause:16s} {video.CAUSES.get(cause, '')}".rstrip())
    if causes.total() > causes["readable"]:
        sys.exit(1)


def show(name: str) -> str:
    """A name on one line of UTF-8, whatever characters the file system allows."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def scan(file: str, limits: video.Limits) -> video.Unreadable | None:
    """The error of a video that cannot be read."""
    try:
        video.scan(file, limits=limits)
    except video.Unreadable as error:
        return error
    except Exception as error:  # one of a million must not end the check
        return video.Unreadable("failed", f"{type(error).__name__}: {error}")
    return None


def render_shapes(args: argparse.Namespace) -> None:
    at_least("prepare shapes", 1, train=args.train, val=args.val, frames=args.frames)
    at_least("prepare shapes", 16, side=args.side)
    plan = shapes.Plan(args.train, args.val, args.side, args.frames, args.seed)
    made = shapes.write(args.out, plan, corpus=CORPORA[args.corpus])
    print(f"{args.out}: {plan.train} + {plan.val} clips{'' if made else ', as they were'}")


if __name__ == "__main__":
    cli.run(main)
