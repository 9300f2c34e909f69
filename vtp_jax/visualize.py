"""Pictures of what a net restores and finds.

    python -m vtp_jax.visualize --workdir RUN [--videos A.mp4 B.mp4 ...] [--captions "..." ...]

Each video gets a storyboard (input, masked, restored; the caption, masked, and the words predicted)
and an animation of the three; each caption gets its five nearest videos. Without --videos they are
those of the run's own evaluation stream. `index.json` beside the pictures says what each one shows.

Statistics. The net predicts hidden cubes normalised: without their own brightness and contrast,
which a picture needs. By default they are taken from the visible cubes around; the reference adds
back the true ones of the hidden cubes, which shows more than the net restored. Every picture says
which way it was made.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from vtp_jax import evals
from vtp_jax.data import pipeline, sources, video
from vtp_jax.evals import retrieval
from vtp_jax.run import sharding
from vtp_jax.setup import build, cli
from vtp_jax.types import Stream, UserError

STATISTICS = {
    "visible": "brightness and contrast of hidden cubes come from the visible cubes around them",
    "true": "hidden cubes were given their TRUE mean and deviation (the reference's way): "
    "this shows more than the net restored",
    "normalised": "hidden cubes are the bare normalised prediction around mid-grey",
}

INK, SOFT, PAPER, LINE = "#1c2024", "#5d666f", "#ffffff", "#d5dae0"
RIGHT, WRONG, HIDDEN = "#12722f", "#c0271d", "#e6e9ed"
CELL = 128  # small frames are enlarged to about this side, large ones shrunk to it
COLUMNS = 8  # frames in a storyboard
LABEL = 96  # width of the column of row titles
TEXT = 15
GAP = 4
AT_ONCE = 8  # videos restored in one call


class Words(NamedTuple):
    """A caption as tokens; special ones left out."""

    true: Sequence[str]
    said: Sequence[str]  # the net's word where it was asked, the true one elsewhere
    hidden: Sequence[bool]

    def right(self) -> int:
        """How many hidden words were found."""
        return sum(h and t == s for t, s, h in zip(self.true, self.said, self.hidden, strict=True))


class Restored(NamedTuple):
    """One video and what the net made of it: u8 frames, and words where there is a caption."""

    id: int
    video: UInt8[np.ndarray, "t h w c"]
    hidden: Bool[np.ndarray, "t h w"]
    restored: UInt8[np.ndarray, "t h w c"]
    words: Words | None


class Answer(NamedTuple):
    """What a caption found."""

    caption: str
    own: int  # id of its video
    rank: int  # of its video, from 1
    found: Sequence[int]  # ids, best first
    scores: Sequence[float]


# Drawing: arrays -> images, nothing else.


def strips(clip: Restored) -> dict[str, UInt8[np.ndarray, "t h w c"]]:
    """The three rows of every picture of a reconstruction."""
    masked = np.where(clip.hidden[..., None], hatch(*clip.video.shape[1:3])[..., None], clip.video)
    share = f"{100 * clip.hidden.mean():.0f} % hidden"
    return {"input": clip.video, share: masked, "restored": clip.restored}


def hatch(h: int, w: int) -> UInt8[np.ndarray, "h w"]:
    """What hidden pixels look like: pale stripes, which no plain colour of a video is taken for."""
    width = max(h // 16, 2)
    y, x = np.mgrid[:h, :w]
    return np.where((x + y) // width % 2, 226, 246).astype(np.uint8)


def fit(frame: UInt8[np.ndarray, "h w c"], side: int = CELL) -> Image.Image:
    """Enlarges a small frame by a whole factor, pixels kept square; shrinks a large one."""
    image = Image.fromarray(frame)
    short = min(image.size)
    if short < side:
        factor = round(side / short + 0.25)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = side / short
    size = (round(image.width * scale), round(image.height * scale))
    return image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)


def storyboard(clip: Restored, note: str, title: str = "") -> Image.Image:
    """Rows input, masked and restored over at most COLUMNS frames, then words, then the note."""
    rows = strips(clip)
    t = len(clip.video)
    shown = np.linspace(0, t - 1, min(t, COLUMNS)).round().astype(int)
    cells = {label: [fit(frames[i]) for i in shown] for label, frames in rows.items()}
    w, h = next(iter(cells.values()))[0].size
    width = max(LABEL + len(shown) * (w + GAP), LABEL + 5 * CELL) + GAP
    canvas = Canvas(width)
    if title:
        canvas.line(title, color=INK)
    for label, images in cells.items():
        canvas.label(label, h // 2 - TEXT // 2)
        for i, image in enumerate(images):
            canvas.paste(image, LABEL + i * (w + GAP))
        canvas.down(h + GAP)
    canvas.down(2 * GAP)
    if clip.words:
        words = clip.words
        canvas.words("caption", [Chip(w) for w in words.true])
        canvas.words(
            "masked",
            [
                Chip("[MASK]", SOFT, HIDDEN) if hidden else Chip(word)
                for word, hidden in zip(words.true, words.hidden, strict=True)
            ],
        )
        canvas.words("predicted", [chip(*w) for w in zip(*words, strict=True)])
        canvas.line(
            f"{words.right()} of {sum(words.hidden)} hidden words right (green); "
            "wrong ones are red and underlined",
            x=LABEL,
        )
    canvas.line(note, x=LABEL)
    return canvas.image()


def animation(clip: Restored, note: str) -> list[Image.Image]:
    """One image per frame: input, masked and restored side by side, titles above, note below."""
    frames = []
    rows = strips(clip)
    for i in range(len(clip.video)):
        cells = {label: fit(video[i], 2 * CELL) for label, video in rows.items()}
        w, h = next(iter(cells.values())).size
        canvas = Canvas(3 * w + 4 * GAP)
        for j, label in enumerate(cells):
            canvas.text(label, GAP + j * (w + GAP))
        canvas.down(TEXT + 2 * GAP)
        for j, image in enumerate(cells.values()):
            canvas.paste(image, GAP + j * (w + GAP))
        canvas.down(h + 2 * GAP)
        canvas.line(note)
        frames.append(canvas.image())
    return frames


def save_animation(images: Sequence[Image.Image], path: Path, per_second: float = 6.0) -> None:
    """An endless animation; the suffix of `path` (.webp, .gif) chooses the format."""
    images[0].save(
        path,
        save_all=True,
        append_images=list(images[1:]),
        duration=round(1000 / per_second),
        loop=0,
        quality=85,
    )


def answers(answer: Answer, thumbnails: Mapping[int, UInt8[np.ndarray, "h w c"]]) -> Image.Image:
    """A caption and its nearest videos with their scores; the right one is framed in green, and
    stands at the end where it is not among them."""
    shown = [
        (i, f"{n}.  {x:.3f}")
        for n, (i, x) in enumerate(zip(answer.found, answer.scores, strict=True), 1)
    ]
    if answer.own not in answer.found:
        shown.append((answer.own, f"{answer.rank}."))
    images = {i: fit(thumbnails[i]) for i, _ in shown}
    w, h = images[answer.own].size
    step = w + 4 * GAP
    canvas = Canvas(max(step, CELL + 4 * GAP) * 6 + 2 * GAP)  # one width for all answers
    color = RIGHT if answer.rank == 1 else WRONG
    canvas.words("", [Chip(w) for w in answer.caption.split()], x=2 * GAP)
    canvas.line(f"its video is number {answer.rank}", x=2 * GAP, color=color)
    canvas.down(GAP)
    for j, (i, _) in enumerate(shown):
        if i == answer.own:
            canvas.frame(GAP + j * step, w + 2 * GAP, h + 2 * GAP)
        canvas.paste(images[i], 2 * GAP + j * step, GAP)
    canvas.down(h + 3 * GAP)
    for j, (_, text) in enumerate(shown):
        canvas.text(text, 2 * GAP + j * step)
    canvas.down(TEXT + 2 * GAP)
    return canvas.image()


class Chip(NamedTuple):
    """A word with its colour and, where it stands out, a ground or an underline."""

    text: str
    color: str = INK
    ground: str | None = None
    underlined: bool = False


def chip(true: str, said: str, hidden: bool) -> Chip:
    """A predicted word: as it is, right, or wrong."""
    if not hidden:
        return Chip(true, SOFT)
    return (
        Chip(said or "(none)", RIGHT) if said == true else Chip(said or "(none)", WRONG, None, True)
    )


class Canvas:
    """White paper that is filled from top to bottom and cut where it ends."""

    def __init__(self, width: int):
        self._image = Image.new("RGB", (width, 64), PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self._font = ImageFont.load_default(TEXT)
        self._y = GAP

    def down(self, pixels: int) -> None:
        self._y += pixels

    def image(self) -> Image.Image:
        return self._image.crop((0, 0, self._image.width, self._y + GAP))

    def _room(self, pixels: int) -> None:
        """Makes sure that `pixels` more rows exist below the present one."""
        if (needed := self._y + pixels) > self._image.height:
            taller = Image.new("RGB", (self._image.width, 2 * needed), PAPER)
            taller.paste(self._image, (0, 0))
            self._image, self._draw = taller, ImageDraw.Draw(taller)

    def paste(self, image: Image.Image, x: int, y: int = 0) -> None:
        self._room(y + image.height)
        self._image.paste(image, (x, self._y + y))

    def frame(self, x: int, width: int, height: int) -> None:
        self._room(height)
        box = (x, self._y, x + width - 1, self._y + height - 1)
        self._draw.rectangle(box, outline=RIGHT, width=3)

    def text(self, text: str, x: int, y: int = 0, color: str = INK) -> None:
        self._room(y + 2 * TEXT)
        self._draw.text((x, self._y + y), text, color, self._font)

    def label(self, text: str, y: int) -> None:
        """A row's title, in the left column."""
        self.text(text, GAP, y, SOFT)

    def line(self, text: str, x: int = GAP, color: str = SOFT) -> None:
        """A line of running text, broken where it must be."""
        self.words("", [Chip(word, color) for word in text.split()], x)

    def words(self, label: str, chips: Sequence[Chip], x: int = LABEL) -> None:
        """A titled row of words, broken where it must be."""
        self.label(label, 0)
        space, at = self._font.getlength(" "), float(x)
        for one in chips:
            length = self._font.getlength(one.text)
            if at > x and at + length > self._image.width - GAP:
                at = float(x)
                self.down(TEXT + 2 * GAP)
            self._room(2 * TEXT)
            top, bottom = self._y, self._y + TEXT + 3
            if one.ground:
                self._draw.rectangle((at - 1, top, at + length + 1, bottom), one.ground)
            self._draw.text((at, self._y), one.text, one.color, self._font)
            if one.underlined:
                self._draw.line((at, bottom, at + length, bottom), one.color)
            at += length + space + 2
        self.down(TEXT + 2 * GAP)


# Looking: a run and streams -> what is drawn.


def restore(
    run: build.Run, stream: Stream, count: int, statistics: str = "visible", seed: int = 0
) -> list[Restored]:
    """The first `count` readable videos of the stream as the net restores them.

    The masks are a function of `seed` and of the video's place.
    """
    ways = math.prod(run.mesh.shape.values())
    size = -(-AT_ONCE // ways) * ways
    rows = first_rows(stream, count)
    if rows["video"].ndim == 6:
        rows["video"] = rows["video"][:, 0]  # the first of its views
    reconstruct = jax.jit(run.method.encode["reconstruct"])
    clips = []
    for start in range(0, len(rows["valid"]), size):
        batch = {k: fill(v[start : start + size], size) for k, v in rows.items()}
        key = jax.random.fold_in(jax.random.key(seed), start)
        with sharding.activate(run.mesh):
            placed = sharding.put(batch, run.mesh)
            made = jax.device_get(reconstruct(run.state.params, run.state.extra, placed, key))
        for i in np.flatnonzero(batch["valid"]):
            words = None
            if "predicted_text" in made:  # a method of videos alone reads none
                said = (made[k][i] for k in ("text", "predicted_text", "text_hidden"))
                words = words_of(run, batch["text_mask"][i], *said)
            clips.append(
                Restored(
                    int(batch["id"][i]),
                    to_bytes(made["video"][i]),
                    made["hidden"][i],
                    to_bytes(made["restored"][statistics][i]),
                    words,
                )
            )
    return clips


def words_of(
    run: build.Run,
    text_mask: Bool[np.ndarray, "l"],
    text: Int[np.ndarray, "l"],
    predicted_text: Int[np.ndarray, "l"],
    text_hidden: Bool[np.ndarray, "l"],
) -> Words | None:
    """A row's words, None without a caption. Each token is decoded by itself."""
    true = run.data.decode(text[:, None])
    said = run.data.decode(predicted_text[:, None])
    shown = [i for i in np.flatnonzero(text_mask) if true[i]]
    if not shown:
        return None
    return Words(
        [true[i] for i in shown], [said[i] for i in shown], [bool(text_hidden[i]) for i in shown]
    )


def first_rows(stream: Stream, count: int) -> dict[str, np.ndarray]:
    """The first `count` valid rows of a stream, or as many as it has."""
    parts: list[dict[str, np.ndarray]] = []
    missing = count
    for batch in stream.batches():
        chosen = np.flatnonzero(batch["valid"])[:missing]
        parts.append({k: np.asarray(v)[chosen] for k, v in batch.items()})
        missing -= len(chosen)
        if not missing:
            break
    if missing == count:
        raise UserError("none of the videos can be read; look with vtp_jax.prepare check")
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def fill(rows: Shaped[np.ndarray, "n ..."], size: int) -> Shaped[np.ndarray, "b ..."]:
    """Filled up with zeros (and so not valid) to `size` rows."""
    return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def to_bytes(pixels: Float[np.ndarray, "t h w c"]) -> UInt8[np.ndarray, "t h w c"]:
    """[0, 1] -> 0..255."""
    return (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)


def ask(run: build.Run, streams: Mapping[str, Stream], stream: str, k: int = 5) -> list[Answer]:
    """What each caption finds among the stream's videos, in the stream's order."""
    embed = retrieval.embedder(
        encode=run.method.encode, streams=streams, mesh=run.mesh, stream=stream
    )
    videos, texts = embed(run.state)
    owner = retrieval.owners(texts.id, videos.id, stream)
    known = np.flatnonzero(owner >= 0)
    ranks = retrieval.rank(texts.vector[known], videos.vector, owner[known]).t2v
    scores, found = retrieval.top(texts.vector[known], videos.vector, k)
    captions = captions_of(run, streams[retrieval.captions_of(streams, stream)])
    return [
        Answer(captions[i], int(texts.id[i]), int(r) + 1, videos.id[f].tolist(), s.tolist())
        for i, r, f, s in zip(known, ranks, found, scores, strict=True)
    ]


def captions_of(run: build.Run, stream: Stream) -> list[str]:
    """The captions of a stream's valid rows, as the net reads them."""
    lines: list[str] = []
    for batch in stream.batches():
        lines += run.data.decode(np.asarray(batch["text"])[batch["valid"]])
    return lines


def choose(asked: Sequence[Answer], count: int) -> list[Answer]:
    """At most `count` answers to show: failures first, the worst at the head and at most two
    thirds, then successes."""
    failed = sorted((a for a in asked if a.rank > 1), key=lambda a: -a.rank)
    right = [a for a in asked if a.rank == 1]
    first = failed[: max(count - len(right), -(-2 * count // 3))]
    return first + right[: count - len(first)]


def thumbnails(stream: Stream, ids: set[int]) -> dict[int, UInt8[np.ndarray, "h w c"]]:
    """The middle frame of each of these videos."""
    found = {}
    for batch in stream.batches():
        for i in np.flatnonzero(batch["valid"]):
            if (id_ := int(batch["id"][i])) in ids:
                video = np.asarray(batch["video"][i])
                video = video[0] if video.ndim == 5 else video
                found[id_] = np.array(video[len(video) // 2])
        if len(found) == len(ids):
            break
    return found


def write(
    run: build.Run,
    streams: Mapping[str, Stream],
    stream: str,
    out: Path,
    *,
    statistics: str = "visible",
    clips: int = 6,
    questions: int = 9,
) -> dict[str, Any]:
    """Draws the stream's first `clips` videos and `questions` captions' answers into `out`.

    Writes `index.json`, and returns it: {"statistics", "note", "reconstructions": [{"title",
    "picture", "animation", "words_right", "words_hidden"}], "retrieval": [{"caption", "rank",
    "picture"}]}; file names are relative to `out`.
    """
    verbs = set(run.method.encode)
    if not {"video", "text"} <= verbs:
        questions = 0
    if questions:
        told = retrieval.captions_of(streams, stream)
        if "text" not in evals.structure("visualize", streams, told):
            questions = 0
    if "reconstruct" not in verbs:
        if not questions:
            raise UserError(
                "nothing to draw: it restores no videos (no encode 'reconstruct'), and no captions "
                "are asked (encode 'video' and 'text', and a stream with captions)"
            )
        clips = 0
    out.mkdir(parents=True, exist_ok=True)
    titles = streams[stream].table.get("path", [])
    index: dict[str, Any] = {
        "statistics": statistics,
        "note": STATISTICS[statistics],
        "reconstructions": [],
        "retrieval": [],
    }
    restored = restore(run, streams[stream], clips, statistics) if clips else []
    for n, clip in enumerate(restored):
        title = Path(titles[clip.id]).name if titles else f"video {clip.id}"
        names = dict(picture=f"restored_{n:02}.png", animation=f"restored_{n:02}.webp")
        storyboard(clip, STATISTICS[statistics], title).save(out / names["picture"])
        save_animation(animation(clip, STATISTICS[statistics]), out / names["animation"])
        words = clip.words
        index["reconstructions"].append(
            dict(
                title=title,
                **names,
                words_right=words.right() if words else 0,
                words_hidden=sum(words.hidden) if words else 0,
            )
        )
    asked = ask(run, streams, stream) if questions else []
    shown = choose(asked, questions)
    frames = thumbnails(streams[stream], {i for a in shown for i in (a.own, *a.found)})
    for n, answer in enumerate(shown):
        picture = f"retrieval_{n:02}.png"
        answers(answer, frames).save(out / picture)
        index["retrieval"].append(dict(caption=answer.caption, rank=answer.rank, picture=picture))
    (out / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return index


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
    parser.add_argument("--videos", nargs="+", help="files or folders; else the run's own")
    parser.add_argument("--captions", nargs="+", help="one for each of the videos")
    parser.add_argument("--stream", help="the run's own stream to draw, without --videos")
    parser.add_argument("--clips", type=int, default=6, help="of the stream to draw")
    parser.add_argument("--statistics", default="visible", help=f"{', '.join(STATISTICS)}")
    parser.add_argument("--out", help="folder to write; WORKDIR/pictures by default")
    args, overrides = cli.parse(parser, argv)
    if args.statistics not in STATISTICS:
        raise UserError(
            f"--statistics {args.statistics}{cli.suggest(args.statistics, list(STATISTICS))}"
        )
    if args.captions and not args.videos:
        raise UserError("--captions goes with --videos: one caption for each video")
    run = build.restore(args.workdir, args.step, overrides)
    streams, stream, clips, questions = run.data.streams, args.stream, args.clips, 9
    if args.videos:
        streams, stream = given(run, args.videos, args.captions), "given"
        clips = streams[stream].rows
        questions = clips if args.captions and clips > 1 else 0
    elif stream is None:
        if not streams:
            raise UserError("the run has no evaluation stream; give --videos")
        stream = next(iter(streams))
    if stream not in streams:
        raise UserError(f"no stream '{stream}'{cli.suggest(stream, list(streams))}")
    out = Path(args.out or Path(args.workdir) / "pictures")
    index = write(
        run, streams, stream, out, statistics=args.statistics, clips=clips, questions=questions
    )
    drawn, asked = len(index["reconstructions"]), len(index["retrieval"])
    print(f"{drawn} videos and {asked} answers drawn; see {out}")


if __name__ == "__main__":
    cli.run(main)
