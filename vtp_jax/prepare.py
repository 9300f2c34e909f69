"""Makes and checks what training reads.

python -m vtp_jax.prepare tokenizer --captions train.csv --vocab-size 8000 --out spm.model
python -m vtp_jax.prepare check --root videos --captions train.csv
python -m vtp_jax.prepare shapes --out data/shapes
"""

from __future__ import annotations

import argparse
import collections
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vtp_jax import cli
from vtp_jax.data import shapes, sources, text, video
from vtp_jax.types import UserError


def main(argv: Sequence[str]) -> None:
    """Runs the command that argv names."""
    parser = argparse.ArgumentParser(prog="python -m vtp_jax.prepare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    columns = argparse.ArgumentParser(add_help=False)
    columns.add_argument("--path-column", default="path", help="of a .csv or .jsonl file")
    columns.add_argument("--caption-column", default="caption")

    about = "train SentencePiece on captions"
    command = commands.add_parser("tokenizer", help=about, description=about, parents=[columns])
    command.add_argument("--captions", required=True, help=".csv, .jsonl or .json")
    command.add_argument("--vocab-size", type=int, default=8000, help="at most so many pieces")
    command.add_argument("--out", required=True, help="the model file to write")
    command.set_defaults(run=train_tokenizer)

    about = "decode every video and list those that cannot be read"
    command = commands.add_parser("check", help=about, description=about, parents=[columns])
    command.add_argument("--root", required=True, help="the folder of the videos")
    command.add_argument("--captions", help="only the videos that this file names")
    command.set_defaults(run=check)

    about = "render the corpus of moving shapes to mp4 files"
    command = commands.add_parser("shapes", help=about, description=about)
    command.add_argument("--out", required=True, help="the folder to write")
    plan = shapes.Plan()
    command.add_argument("--train", type=int, default=plan.train, help="clips")
    command.add_argument("--val", type=int, default=plan.val, help="clips")
    command.add_argument("--side", type=int, default=plan.side, help="pixels")
    command.add_argument("--frames", type=int, default=plan.frames, help="of a clip")
    command.add_argument("--seed", type=int, default=plan.seed)
    command.set_defaults(run=render_shapes)

    args, overrides = cli.parse(parser, argv)
    if overrides:
        raise UserError(f"'{overrides[0]}': this entry takes no config")
    args.run(args)


def train_tokenizer(args: argparse.Namespace) -> None:
    pairs = sources.read_captions(Path(args.captions), args.path_column, args.caption_column)
    tokenizer = text.train((caption for _, caption in pairs), args.out, args.vocab_size)
    print(f"{args.out}: {tokenizer.facts['vocab_size']} pieces")


def check(args: argparse.Namespace) -> None:
    if args.captions:
        source = sources.load(
            args.root,
            args.captions,
            path_column=args.path_column,
            caption_column=args.caption_column,
            max_absent=1.0,
        )
    else:
        source = sources.from_files([args.root])
    files = [source.file(i) for i in range(len(source.clips))]
    causes: collections.Counter[str] = collections.Counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        scanned = pool.map(scan, files)
        for file, error in zip(
            files, shapes.show_progress(scanned, len(files), "decoding"), strict=True
        ):
            causes[error.cause if error else "readable"] += 1
            if error:
                print(f"{file}: {error}")
    for cause, count in causes.most_common():
        print(f"{count:8d} {cause:16s} {video.CAUSES.get(cause, '')}".rstrip())


def scan(file: str) -> video.Unreadable | None:
    """Why a video cannot be read, if it cannot."""
    try:
        video.scan(file)
    except video.Unreadable as error:
        return error
    return None


def render_shapes(args: argparse.Namespace) -> None:
    plan = shapes.Plan(args.train, args.val, args.side, args.frames, args.seed)
    made = shapes.write(args.out, plan)
    print(f"{args.out}: {plan.train} + {plan.val} clips{'' if made else ', as they stood there'}")


if __name__ == "__main__":
    cli.run(main)
