"""Drawing restored clips and retrieval results: arrays -> images, nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from vtp_jax.evals.restoration import decibels

INK, SOFT, PAPER = "#1c2024", "#5d666f", "#ffffff"
RIGHT, WRONG, HIDDEN = "#12722f", "#c0271d", "#e6e9ed"
CELL = 128  # pixels: small frames are enlarged to about this side, large ones shrunk to it
COLUMNS = 8  # frames in a storyboard
LABEL = 96  # pixels, width of the column of row titles
TEXT = 15  # pixels, height of the font
GAP = 4


class Words(NamedTuple):
    """A caption as tokens, without special tokens. All fields have one entry per token."""

    true: Sequence[str]
    predicted: Sequence[str]  # the predicted word where hidden, the true one elsewhere
    hidden: Sequence[bool]

    def right(self) -> int:
        """The number of hidden words predicted correctly."""
        return sum(
            h and t == s for t, s, h in zip(self.true, self.predicted, self.hidden, strict=True)
        )


class Restored(NamedTuple):
    """A video and its reconstruction; words is None without a caption. interpolated: hidden pixels
    filled in from the visible ones around them, without a net; statistics: those that were used."""

    id: int
    video: UInt8[np.ndarray, "t h w c"]
    hidden: Bool[np.ndarray, "t h w"]
    restored: UInt8[np.ndarray, "t h w c"]
    words: Words | None
    interpolated: UInt8[np.ndarray, "t h w c"]
    statistics: str


class Answer(NamedTuple):
    """The videos retrieved for a caption."""

    caption: str
    own: int  # id of the caption's own video
    rank: int  # of that video, from 1
    found: Sequence[int]  # ids of the nearest videos, best first
    scores: Sequence[float]  # their cosines


def strips(clip: Restored) -> dict[str, UInt8[np.ndarray, "t h w c"]]:
    """The rows of a reconstruction by title: input, masked, restored and, to compare, interpolated,
    with the PSNR of hidden pixels."""
    masked = np.where(clip.hidden[..., None], hatch(*clip.video.shape[1:3])[..., None], clip.video)
    share = f"{100 * clip.hidden.mean():.0f} % hidden"
    rows = {"input": clip.video, share: masked}
    for name, video in (("restored", clip.restored), ("interpolated", clip.interpolated)):
        rows[f"{name}\n{psnr(video, clip):.1f} dB" if clip.hidden.any() else name] = video
    return rows


def psnr(video: UInt8[np.ndarray, "t h w c"], clip: Restored) -> float:
    """The PSNR of the clip's hidden pixels, in dB, at most 99.9."""
    return min(decibels(video[clip.hidden] / 255, clip.video[clip.hidden] / 255), 99.9)


def hatch(h: int, w: int) -> UInt8[np.ndarray, "h w"]:
    """The pattern of hidden pixels: pale stripes, not to be confused with a plain colour."""
    width = max(h // 16, 2)
    y, x = np.mgrid[:h, :w]
    return np.where((x + y) // width % 2, 226, 246).astype(np.uint8)


def fit(frame: UInt8[np.ndarray, "h w c"], side: int = CELL) -> Image.Image:
    """Enlarges a small frame by an integer factor, keeping pixels square; shrinks a large one."""
    image = Image.fromarray(frame)
    short = min(image.size)
    if short < side:
        factor = round(side / short + 0.25)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = side / short
    size = (round(image.width * scale), round(image.height * scale))
    return image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)


def storyboard(clip: Restored, note: str, title: str = "") -> Image.Image:
    """Rows input, masked, restored and interpolated, over at most COLUMNS frames, then words and
    note."""
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
            f"{words.right()} of {sum(words.hidden)} hidden words correct (green); "
            "wrong ones are red and underlined",
            x=LABEL,
        )
    canvas.line(note, x=LABEL)
    return canvas.image()


def animation(clip: Restored, note: str) -> list[Image.Image]:
    """One image per frame: input, masked, restored and interpolated side by side under titles, with
    the note below."""
    frames = []
    rows = strips(clip)
    for i in range(len(clip.video)):
        cells = {label: fit(video[i], 2 * CELL) for label, video in rows.items()}
        w, h = next(iter(cells.values())).size
        canvas = Canvas(len(cells) * (w + GAP) + GAP)
        for j, label in enumerate(cells):
            canvas.text(label.replace("\n", "  "), GAP + j * (w + GAP))
        canvas.down(TEXT + 2 * GAP)
        for j, image in enumerate(cells.values()):
            canvas.paste(image, GAP + j * (w + GAP))
        canvas.down(h + 2 * GAP)
        canvas.line(note)
        frames.append(canvas.image())
    return frames


def save(image: Image.Image, path: os.PathLike[str], **options: Any) -> None:
    """Writes an image; the suffix of `path` chooses the format."""
    path = epath.Path(path)
    with path.open("wb") as file:
        image.save(file, path.suffix.removeprefix("."), **options)


def save_animation(
    images: Sequence[Image.Image], path: os.PathLike[str], per_second: float = 6.0
) -> None:
    """Writes an endless animation; the suffix of `path` (.webp, .gif) chooses the format."""
    save(
        images[0],
        path,
        save_all=True,
        append_images=list(images[1:]),
        duration=round(1000 / per_second),
        loop=0,
        quality=85,
    )


def answers(answer: Answer, thumbnails: Mapping[int, UInt8[np.ndarray, "h w c"]]) -> Image.Image:
    """A caption and its nearest videos with their scores. Its own video is framed in green, and is
    added at the end if it is not among them. thumbnails: a frame of each video by id."""
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
    canvas.line(f"its video ranks {answer.rank}", x=2 * GAP, color=color)
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
    """A word with its colour and, optionally, a background or an underline."""

    text: str
    color: str = INK
    background: str | None = None
    underlined: bool = False


def chip(true: str, predicted: str, hidden: bool) -> Chip:
    """The chip of a word: visible, predicted correctly, or predicted wrongly."""
    if not hidden:
        return Chip(true, SOFT)
    return (
        Chip(predicted or "(none)", RIGHT)
        if predicted == true
        else Chip(predicted or "(none)", WRONG, None, True)
    )


class Canvas:
    """A white image that is filled from top to bottom and cropped at the end."""

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
        """Makes sure that at least `pixels` rows exist below the current one."""
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
        """Running text, wrapped at the right edge."""
        self.words("", [Chip(word, color) for word in text.split()], x)

    def words(self, label: str, chips: Sequence[Chip], x: int = LABEL) -> None:
        """A titled row of words, wrapped at the right edge."""
        self.label(label, 0)
        space, at = self._font.getlength(" "), float(x)
        for one in chips:
            length = self._font.getlength(one.text)
            if at > x and at + length > self._image.width - GAP:
                at = float(x)
                self.down(TEXT + 2 * GAP)
            self._room(2 * TEXT)
            top, bottom = self._y, self._y + TEXT + 3
            if one.background:
                self._draw.rectangle((at - 1, top, at + length + 1, bottom), one.background)
            self._draw.text((at, self._y), one.text, one.color, self._font)
            if one.underlined:
                self._draw.line((at, bottom, at + length, bottom), one.color)
            at += length + space + 2
        self.down(TEXT + 2 * GAP)
