"""Draws what a run's net restores and retrieves.

    vtp visualize --workdir RUN [--videos A.mp4 B.mp4 ...] [--captions "..." ...]

Each video gets a storyboard (input, masked, restored; the caption, masked, and the words predicted)
and an animation of the three; each caption gets its five nearest videos. Without --videos they are
those of the run's own evaluation stream. `index.json`, next to the pictures, describes each one.

Statistics. The net predicts hidden cubes normalised: without their own brightness and contrast,
which a picture needs. By default they are taken from the visible cubes around; the reference adds
back the true ones of the hidden cubes, which shows more than the net restored. Every picture says
which way it was made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

from vtp_jax.data import pipeline, sources, video
from vtp_jax.setup import build, cli
from vtp_jax.show import pictures
from vtp_jax.show.pictures import AT_ONCE, STATISTICS
from vtp_jax.types import Stream, UserError


def given(
    run: build.Run, paths: Sequence[str], captions: Sequence[str] | None
) -> dict[str, Stream]:
    """Streams `given` and `given/captions` of video files, read as the run's evaluation reads."""
    cfg = run.config["data"]
    source = sources.from_files(paths, captions)
    source = source._replace(
        clips=tuple(clip._replace(captions=clip.captions or ("",)) for clip in source.clips)
    )
    clips = pipeline.Clips(source, lambda i, choose: video.read_frames(source.file(i), choose))
    look = pipeline.fit("data.video", pipeline.Look, {**cfg["video"], "views": None})
    opened = dict(files=pipeline.open_files, shapes=pipeline.open_shapes)[cfg["kind"]]
    words = None
    if text := cfg.get("text"):
        words = pipeline.open_text(opened("train", **cfg["train"]).source, **text)
    ways = math.prod(run.mesh.shape.values())
    rows = -(-min(len(source.clips), AT_ONCE) // ways) * ways
    order = functools.partial(pipeline.list_order, rows, (0, 1))
    here = functools.partial(pipeline.run_here, workers=1)
    streams = {"given": pipeline.stream_videos(clips, look, words, order, here)}
    if words:
        streams["given/captions"] = pipeline.stream_captions(source, words, order)
    return streams


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("visualize", __doc__)
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--step", default="latest", help="a step, latest or best")
    parser.add_argument("--videos", nargs="+", help="files or folders; by default the run's own")
    parser.add_argument("--captions", nargs="+", help="one per video")
    parser.add_argument("--stream", help="the evaluation stream to draw, without --videos")
    parser.add_argument("--clips", type=int, default=6, help="number drawn of the stream")
    parser.add_argument("--statistics", default="visible", help=", ".join(STATISTICS))
    parser.add_argument("--out", help="folder to write; WORKDIR/pictures by default")
    args, overrides = cli.parse(parser, argv)
    cli.choose("vtp visualize", "--statistics", args.statistics, STATISTICS)
    if args.captions and not args.videos:
        raise UserError("--captions needs --videos: one caption per video")
    run = build.restore(args.workdir, args.step, overrides)
    streams, stream, clips, questions = run.data.streams, args.stream, args.clips, 9
    if args.videos:
        streams, stream = given(run, args.videos, args.captions), "given"
        clips = streams[stream].rows
        questions = clips if args.captions and clips > 1 else 0
    elif stream is None:
        if not streams:
            raise UserError("the run has no evaluation stream; pass --videos")
        stream = next(iter(streams))
    cli.choose("vtp visualize", "stream", stream, streams)
    out = Path(args.out or Path(args.workdir) / "pictures")
    index = pictures.write(
        run, streams, stream, out, statistics=args.statistics, clips=clips, questions=questions
    )
    drawn, asked = len(index["reconstructions"]), len(index["retrieval"])
    print(f"{drawn} videos and {asked} answers drawn; see {out}")


if __name__ == "__main__":
    cli.run(main)
