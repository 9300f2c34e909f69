"""Draws the reconstructions and retrieval results of a run.

    vtp visualize --workdir RUN [--videos A.mp4 B.mp4 ...] [--captions "..." ...]

Each video gets a storyboard (input, masked, restored, and interpolated for comparison; the caption,
masked, and the words predicted) and an animation of the four; each caption gets its five nearest
videos. Without --videos they are those of the run's own evaluation stream. `index.json`, next to
the pictures, describes each one.

Statistics. A net that predicts pixels needs none (`method.target="pixels"`). One that predicts
normalised cubes leaves out the brightness and contrast that a picture needs. By default these are
taken from the visible cubes around; the reference uses the true ones of the hidden cubes, which
shows more than the net restored. Every picture states which were used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vtp_jax.data import pipeline
from vtp_jax.run import paths
from vtp_jax.setup import build, cli
from vtp_jax.show import pictures
from vtp_jax.show.pictures import AT_ONCE, STATISTICS
from vtp_jax.types import Stream, UserError


def given(
    run: build.Run, paths: Sequence[str], captions: Sequence[str] | None
) -> dict[str, Stream]:
    """Streams `given` and `given/captions` of video files, read as the run's evaluation reads."""
    ways = math.prod(run.mesh.shape.values())
    return pipeline.given(run.config.data, paths, captions, at_once=AT_ONCE, ways=ways)


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("visualize", __doc__)
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--step", default="latest", help="a step, latest or best")
    parser.add_argument("--videos", nargs="+", help="files or folders; by default the run's own")
    parser.add_argument("--captions", nargs="+", help="one per video")
    parser.add_argument("--stream", help="the evaluation stream to draw, without --videos")
    parser.add_argument("--clips", type=int, default=6, help="number drawn of the stream")
    parser.add_argument(
        "--statistics", help=f"by default what the net allows: {', '.join(STATISTICS)}"
    )
    parser.add_argument("--out", help="folder to write; WORKDIR/pictures by default")
    args, overrides = cli.parse(parser, argv)
    if args.statistics:
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
    out = paths.path(args.out or paths.path(args.workdir) / "pictures")
    index = pictures.write(
        run, streams, stream, out, statistics=args.statistics, clips=clips, questions=questions
    )
    drawn, asked = len(index["reconstructions"]), len(index["retrieval"])
    print(f"{drawn} videos and {asked} answers drawn; see {out}")


if __name__ == "__main__":
    cli.run(main)
