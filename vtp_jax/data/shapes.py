"""A corpus of moving shapes: videos whose captions describe everything in them.

A clip has five attributes: colour, shape, size, motion and background, 25,344 combinations. Some
combinations are held out: they never occur in training, so a held-out clip can be found by its
caption only if the words were learnt separately. Position, phase, speed, hue, outline and wording
vary within a combination. Every clip is a function of (seed, split, index).
"""

from __future__ import annotations

import colorsys
import contextlib
import csv
import functools
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from vtp_jax import progress
from vtp_jax.data.sources import Clip, Source
from vtp_jax.data.workers import cores
from vtp_jax.types import UserError

# The words for each value of each attribute. No word belongs to two values, so a caption determines
# every attribute; there are few words, so a small model learns them in minutes.
COLOURS: Mapping[str, tuple[str, ...]] = dict(
    red=("red", "scarlet"),
    orange=("orange",),
    yellow=("yellow", "golden"),
    lime=("lime",),
    green=("green",),
    mint=("mint",),
    cyan=("cyan", "turquoise"),
    azure=("azure",),
    blue=("blue",),
    violet=("violet", "purple"),
    magenta=("magenta",),
    rose=("rose", "pink"),
)
SHAPES: Mapping[str, tuple[str, ...]] = dict(
    disc=("disc", "circle"),
    ring=("ring", "hoop"),
    plank=("plank", "beam"),
    pillar=("pillar", "pole"),
)
SIZES: Mapping[str, tuple[str, ...]] = dict(
    small=("small", "little", "tiny"), large=("large", "big", "huge")
)
# For motions: (present tense, participle).
MOTIONS: Mapping[str, tuple[tuple[str, str], ...]] = dict(
    sliding=(("slides", "sliding"), ("moves right", "moving right")),
    falling=(("falls", "falling"), ("moves down", "moving down")),
    resting=(("rests", "resting"), ("stays still", "staying still")),
    blinking=(("blinks", "blinking"), ("flashes", "flashing")),
)
GROUNDS: Mapping[str, tuple[int, int, int]] = dict(  # RGB
    black=(18, 18, 18), grey=(120, 120, 120), white=(236, 236, 236), navy=(22, 30, 92),
    maroon=(96, 24, 34), olive=(92, 90, 24), teal=(20, 88, 84), plum=(84, 32, 88),
    tan=(186, 156, 116), sky=(142, 178, 206), forest=(16, 64, 28), brown=(122, 74, 40),
)  # fmt: skip
# Broad bands of two colours, named in either order.
BACKGROUNDS: Mapping[str, tuple[str, ...]] = {
    f"{a} and {b}": (f"{a} and {b}", f"{b} and {a}") for a, b in itertools.combinations(GROUNDS, 2)
}
ATTRIBUTES: Mapping[str, Mapping[str, tuple]] = dict(
    colour=COLOURS, shape=SHAPES, size=SIZES, motion=MOTIONS, background=BACKGROUNDS
)
TEMPLATES = (
    "a {size} {colour} {shape} {does} on {background} bands",
    "on {background} bands a {size} {colour} {shape} {does}",
    "a {colour} {shape} of {size} size is {doing} over {background}",
    "the {shape} is {colour} and {size} and {does} on {background}",
    "{background} bands with a {size} {colour} {shape} {doing}",
    "a {size} {shape} is {doing} on {background} and it is {colour}",
)
PROMPTS = ("a video of {}", "this is {}", "{} can be seen here")
QUESTIONS = dict(
    colour="what colour is the shape",
    shape="which shape is it",
    size="how large is the shape",
    motion="what does the shape do",
    background="which colours are the bands",
)
ANSWERS = [(name, value) for name, values in ATTRIBUTES.items() for value in values]
CAPTIONS = {
    "attributes": "",
    "class": "needs a label",
    "question": "has its own labels; drop label",
}
HELD_OUT = 200  # combinations that never occur in training
SPLITS = ("train", "val")
RATE = 8  # frames per second
CHUNK = 25  # clips that a process renders at a time

HUES = {name: 30 * i for i, name in enumerate(COLOURS)}  # degrees
RADII = dict(small=0.145, large=0.255)  # relative to the picture's side
# Half the width and height of outlines, in radii; their areas are about equal.
OUTLINES = dict(disc=(1.0, 1.0), ring=(1.2, 1.2), plank=(1.6, 0.5), pillar=(0.5, 1.6))
HOLE = 0.55  # of the ring's radius
DRAWN = 4  # outlines are drawn this many times larger, then averaged: smooth edges


class Attributes(NamedTuple):
    """The attributes of a clip; the values are keys of the tables in `ATTRIBUTES`."""

    colour: str
    shape: str
    size: str
    motion: str
    background: str


class Plan(NamedTuple):
    """The parameters of a corpus of drawn clips. Equal plans give equal videos.

    train, val: clips of the two splits; side: pixels; frames: per clip, shown at 8 per second.
    """

    train: int = 6000
    val: int = HELD_OUT
    side: int = 64
    frames: int = 16
    seed: int = 0


class Corpus(NamedTuple):
    """How a corpus is drawn.

    name:     in its manifest; another name is another corpus
    held_out: upper bound of clips in `val`
    fields:   the names of a clip's attributes
    describe: (seed, split, index) -> the attributes of a clip, and its caption
    read:     (plan, split, index) -> its frames, uint8 RGB "t h w c", before any compression
    """

    name: str
    held_out: int
    fields: tuple[str, ...]
    describe: Callable[[int, str, int], tuple[Any, str]]
    read: Callable[[Plan, str, int], UInt8[np.ndarray, "t h w c"]]


@functools.lru_cache(maxsize=4)
def combinations(seed: int) -> tuple[tuple[Attributes, ...], tuple[Attributes, ...]]:
    """(training combinations, the 200 held out), in an order that depends on the seed."""
    every = [Attributes(*values) for values in itertools.product(*ATTRIBUTES.values())]
    order = np.random.default_rng([seed, 0]).permutation(len(every))
    shuffled = [every[i] for i in order]
    return tuple(shuffled[HELD_OUT:]), tuple(shuffled[:HELD_OUT])


def describe(seed: int, split: str, index: int) -> tuple[Attributes, str]:
    """The attributes and the caption of a clip."""
    train, held_out = combinations(seed)
    choices = train if split == "train" else held_out
    attributes = choices[index % len(choices)]
    rng = generator(seed, split, index, 0)
    words = {
        name: pick(rng, ATTRIBUTES[name][value])
        for name, value in attributes._asdict().items()
        if name != "motion"
    }
    does, doing = pick(rng, MOTIONS[attributes.motion])
    return attributes, pick(rng, TEMPLATES).format(does=does, doing=doing, **words)


def render(
    attributes: Attributes, rng: np.random.Generator, side: int, frames: int
) -> UInt8[np.ndarray, "t h w c"]:
    """Draws a clip: uint8 RGB "t h w c" with h = w = `side`; properties that captions do not
    describe are drawn from `rng`."""
    radius = RADII[attributes.size] * side * rng.uniform(0.94, 1.06)
    centres, seen = move(attributes.motion, radius, rng, side, frames)
    outline = draw_outline(attributes.shape, radius, rng.uniform(-0.14, 0.14))
    cover = np.stack([cover_frame(outline, centre, side) for centre in centres]).astype(np.uint16)
    cover = ((cover + (cover >> 7)) * seen[:, None, None])[..., None]  # 0 to 256
    hue = (HUES[attributes.colour] + rng.uniform(-5, 5)) % 360 / 360
    colour = colorsys.hsv_to_rgb(hue, rng.uniform(0.85, 1.0), rng.uniform(0.88, 1.0))
    paint = np.asarray([255 * c for c in colour], np.uint16)
    ground = draw_bands(attributes.background, rng, side)
    return ((cover * paint + (256 - cover) * ground + 128) >> 8).astype(np.uint8)


def read(plan: Plan, split: str, index: int) -> UInt8[np.ndarray, "t h w c"]:
    """The frames of a clip as drawn, before any compression."""
    attributes, _ = describe(plan.seed, split, index)
    rng = generator(plan.seed, split, index, 1)
    return render(attributes, rng, plan.side, plan.frames)


def source(plan: Plan, split: str, label: str | None = None, caption: str = "attributes") -> Source:
    """The clips of a split and their captions, as `write` lists them; no file is needed.

    label: the attribute whose values are the classes, numbered as in its table
    caption: "attributes": describes all of them; "class": a prompt with a word for the class;
             "question": about one attribute; the class is the answer, numbered as in `ANSWERS`
    """
    if label is not None and label not in ATTRIBUTES:
        raise UserError(f"shapes: no attribute '{label}'; known: {', '.join(ATTRIBUTES)}")
    if caption not in CAPTIONS:
        raise UserError(f"shapes: caption={caption!r}; known: {', '.join(CAPTIONS)}")
    if (caption == "class") != (label is not None) and caption != "attributes":
        raise UserError(f"shapes: caption={caption!r} {CAPTIONS[caption]}")

    def clip(index: int) -> Clip:
        attributes, text = describe(plan.seed, split, index)
        number = None
        if label:
            number = list(ATTRIBUTES[label]).index(getattr(attributes, label))
        rng = generator(plan.seed, split, index, 2)
        if caption == "class":
            text = pick(rng, PROMPTS).format(say(rng, attributes, str(label)))
        elif caption == "question":
            asked = pick(rng, list(QUESTIONS))
            text, number = QUESTIONS[asked], ANSWERS.index((asked, getattr(attributes, asked)))
        return Clip(clip_path(split, index), (text,), number)

    return Source(root="", clips=tuple(map(clip, range(clip_count(plan, split)))))


def say(rng: np.random.Generator, attributes: Attributes, name: str) -> str:
    """A word for the value of one attribute; for a motion, the participle."""
    word = pick(rng, ATTRIBUTES[name][getattr(attributes, name)])
    return word[1] if name == "motion" else word


MOVING = Corpus("moving shapes 1", HELD_OUT, Attributes._fields, describe, read)


def write(
    out: str | os.PathLike[str], plan: Plan, workers: int | None = None, corpus: Corpus = MOVING
) -> bool:
    """Renders a corpus to H.264 files under `out`; returns False if it exists already.

    Next to the videos: train.csv and val.csv (path, caption and the attributes) and, written last,
    manifest.json. If a folder's manifest has another plan, raises UserError and leaves the folder
    unchanged.
    """
    out = Path(out)
    if plan.val > corpus.held_out:
        raise UserError(
            f"{corpus.name}: val={plan.val} clips; only {corpus.held_out} combinations are held out"
        )
    manifest = dict(corpus=corpus.name, rate=RATE, **plan._asdict())
    kept = out / "manifest.json"
    if kept.exists():
        if json.loads(kept.read_text(encoding="utf-8")) == manifest:
            return False
        raise UserError(f"{out} holds another corpus (manifest.json); remove it or choose another")
    for split in SPLITS:
        (out / split).mkdir(parents=True, exist_ok=True)
    jobs = [(split, i) for split in SPLITS for i in range(clip_count(plan, split))]
    chunks = [jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK)]
    # Processes: drawing holds the interpreter's lock. Each takes a second to start.
    workers = min(workers or cores(), len(chunks) // 4)
    work = functools.partial(write_clips, out, plan, corpus)
    with contextlib.ExitStack() as stack:
        each = map
        if workers > 1:
            context = multiprocessing.get_context("forkserver")
            each = stack.enter_context(ProcessPoolExecutor(workers, context)).map
        for _ in progress.track(each(work, chunks), len(jobs), "rendering", "clips", int):
            pass
    for split in SPLITS:
        write_table(out / f"{split}.csv", plan, corpus, split)
    kept.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return True


def write_clips(out: Path, plan: Plan, corpus: Corpus, jobs: Sequence[tuple[str, int]]) -> int:
    """Writes the clips of `jobs`, and returns their number."""
    for split, index in jobs:
        encode(out / clip_path(split, index), corpus.read(plan, split, index), RATE)
    return len(jobs)


def write_table(path: Path, plan: Plan, corpus: Corpus, split: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "caption", *corpus.fields])
        for index in range(clip_count(plan, split)):
            attributes, caption = corpus.describe(plan.seed, split, index)
            table.writerow([clip_path(split, index), caption, *attributes])


def encode(path: Path, frames: UInt8[np.ndarray, "t h w c"], rate: int) -> None:
    """Writes frames as H.264 in an mp4 file, in one GOP, without B-frames."""
    options = dict(preset="veryfast", crf="16", tune="fastdecode", g=str(len(frames)), bf="0")
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def clip_path(split: str, index: int) -> str:
    return f"{split}/{index:05d}.mp4"


def clip_count(plan: Plan, split: str) -> int:
    return {"train": plan.train, "val": plan.val}[split]


def generator(seed: int, split: str, index: int, use: int) -> np.random.Generator:
    return np.random.default_rng([seed, 1 + SPLITS.index(split), index, use])


def pick(rng: np.random.Generator, choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def move(
    motion: str, radius: float, rng: np.random.Generator, side: int, frames: int
) -> tuple[Float[np.ndarray, "t 2"], UInt8[np.ndarray, "t"]]:
    """Centres (x, y) in pixels, and 1 where the shape is shown, for every frame.

    A period of blinking is at least 8 frames of 16, so that every second frame still shows it.
    """
    t = np.arange(frames) / max(frames - 1, 1)  # 0 to 1
    low, high = 1.2 * radius, side - 1.2 * radius
    place = rng.uniform(low, high, 2)
    pace = rng.uniform(0.85, 1.0)
    path = low + (high - low) * ((1 - pace) * rng.uniform() + pace * t)
    still = np.ones_like(t)
    x = path if motion == "sliding" else place[0] * still
    y = path if motion == "falling" else place[1] * still
    on = np.sin(2 * np.pi * (2 * pace * t + rng.uniform())) > -0.2
    seen = on if motion == "blinking" else still
    return np.stack([x, y], 1), seen.astype(np.uint8)


def draw_outline(shape: str, radius: float, tilt: float) -> Image.Image:
    """The shape in white on black, centred, at `DRAWN` times its size; long shapes are rotated by
    `tilt` radians."""
    half = int(np.ceil(1.8 * radius)) * DRAWN
    image = Image.new("L", (2 * half, 2 * half))
    pen = ImageDraw.Draw(image)
    w, h = (radius * DRAWN * extent for extent in OUTLINES[shape])
    if w == h:
        pen.ellipse((half - w, half - w, half + w, half + w), fill=255)
        if shape == "ring":
            w *= HOLE
            pen.ellipse((half - w, half - w, half + w, half + w), fill=0)
        return image
    corners = [(-w, -h), (w, -h), (w, h), (-w, h)]
    sin, cos = np.sin(tilt), np.cos(tilt)
    pen.polygon(
        [(half + x * cos - y * sin, half + x * sin + y * cos) for x, y in corners], fill=255
    )
    return image


def cover_frame(
    outline: Image.Image, centre: Float[np.ndarray, "2"], side: int
) -> UInt8[np.ndarray, "h w"]:
    """The coverage of each pixel by the outline, 0 to 255, when placed at `centre`."""
    canvas = Image.new("L", (side * DRAWN, side * DRAWN))
    half = outline.width // 2
    corner = [round(float(c) * DRAWN) - half for c in centre]
    canvas.paste(outline, (corner[0], corner[1]))
    return np.asarray(canvas.reduce(DRAWN))


def draw_bands(background: str, rng: np.random.Generator, side: int) -> UInt8[np.ndarray, "s c"]:
    """A row of a background: vertical bands of its two colours in turn, side / 4 wide."""
    pair = np.asarray([GROUNDS[name] for name in background.split(" and ")])
    pair = np.clip(pair + rng.integers(-8, 9), 0, 255)
    band = (np.arange(side) + rng.uniform(0, side / 2)) // (side / 4)
    return pair[band.astype(int) % 2].astype(np.uint8)
