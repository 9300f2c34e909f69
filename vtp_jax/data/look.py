"""The part of a video that is shown: its frames, the crop, the number of views.

Each sampling of frames is an entry of `SAMPLINGS`, each crop an entry of `BOXES`; no other code
branches on their names. Frames are chosen before they are decoded: a reader calls `frames(length)`
with the number of frames of a video, and `boxes(h, w)` with the size of its picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from vtp_jax.data import ops, video
from vtp_jax.data.sources import Clip

LOOK = 2  # purpose of a random generator; those of the other modules differ

Ints = Int[np.ndarray, "n"]
Pixels = UInt8[np.ndarray, "..."]
Boxes = Callable[[int, int], Sequence[ops.Box]]  # (height, width) of a picture -> parts of it


class Look(NamedTuple):
    """The part of a video that is shown.

    frames, stride: the number of frames, and the distance between them
    size:     side of the square picture, in pixels
    crop:     in training: `multiscale` (random, SimVTP's), `resized` (random, Inception's),
              `window` (random, not rescaled) or `centre`
    repeats:  crops of one decoded clip in training, as views "v t h w c" if there are several
    views:    in evaluation: (segments, crops) of SimVTP's test, or None for one clip in the middle
    sampling: `windows` of frames that are `stride` apart, or `segments`: one frame from each of
              `frames` equal parts of the whole video, whatever the stride
    """

    frames: int
    stride: int
    size: int
    crop: str = "multiscale"
    repeats: int = 1
    views: Sequence[int] | None = None
    sampling: str = "windows"

    @property
    def picture(self) -> tuple[int, ...]:
        """The shape of one clip."""
        return (self.frames, self.size, self.size, 3)

    def train_shape(self, pieces: int = 1) -> tuple[int, ...]:
        """The shape of a training row's video, "[v] t h w c": `pieces` clips, or `repeats` crops
        of one."""
        views = pieces if pieces > 1 else self.repeats
        return self.picture if views == 1 else (views, *self.picture)

    def eval_shape(self, pieces: int = 1) -> tuple[int, ...]:
        """The shape of an evaluation row's video, "[v] t h w c"."""
        if self.views is not None:
            return (self.views[0] * self.views[1], *self.picture)
        return self.picture if pieces == 1 else (pieces, *self.picture)


class Sampling(NamedTuple):
    """How frames are chosen in a video of `length` frames.

    draw:   (length, look, rng) -> numbers "t", in training
    middle: (length, look) -> numbers "t", in evaluation
    spread: (length, look, segments) -> numbers "s t" of test clips over the whole video
    """

    draw: Callable[[int, Look, np.random.Generator], Int[np.ndarray, "t"]]
    middle: Callable[[int, Look], Int[np.ndarray, "t"]]
    spread: Callable[[int, Look, int], Int[np.ndarray, "s t"]]


SAMPLINGS: Mapping[str, Sampling] = dict(
    windows=Sampling(
        lambda n, look, rng: ops.sample_frames(n, look.frames, look.stride, rng),
        lambda n, look: ops.centre_frames(n, look.frames, look.stride),
        lambda n, look, segments: ops.view_frames(n, look.frames, look.stride, segments),
    ),
    segments=Sampling(
        lambda n, look, rng: ops.segment_frames(n, look.frames, rng),
        lambda n, look: ops.segment_views(n, look.frames, 1)[0],
        lambda n, look, segments: ops.segment_views(n, look.frames, segments),
    ),
)
BOXES: Mapping[str, Callable[..., ops.Box]] = dict(
    multiscale=ops.box_multiscale,
    resized=ops.box_resized,
    window=ops.box_window,
    centre=ops.box_centre,
)


# The arguments of a reader. These are classes, not functions created for each row: under pytest,
# jaxtyping decorates every `def` when it is executed, and beartype's decoration is slow and not
# thread-safe. A method is decorated once, when its module is imported.


class Drawn(NamedTuple):
    """A training row's frames and boxes, drawn from `rng` in that order."""

    look: Look
    pieces: int
    rng: np.random.Generator

    def frames(self, length: int) -> Ints:
        return ops.in_parts(self.pieces, self.frames_of_part, length)

    def frames_of_part(self, length: int) -> Ints:
        return SAMPLINGS[self.look.sampling].draw(length, self.look, self.rng)

    def boxes(self, h: int, w: int) -> list[ops.Box]:
        box = BOXES[self.look.crop]
        return [box(h, w, self.look.size, self.rng) for _ in range(self.look.repeats)]


class Middle(NamedTuple):
    """The middle of a video, or of each of its `pieces` equal parts."""

    look: Look
    pieces: int

    def frames(self, length: int) -> Ints:
        return ops.in_parts(self.pieces, self.frames_of_part, length)

    def frames_of_part(self, length: int) -> Ints:
        return SAMPLINGS[self.look.sampling].middle(length, self.look)

    def boxes(self, h: int, w: int) -> list[ops.Box]:
        return [ops.box_centre(h, w, self.look.size)]


class Spread(NamedTuple):
    """The frames of `segments` test clips over the whole video, one clip after the other."""

    look: Look
    segments: int

    def frames(self, length: int) -> Ints:
        return SAMPLINGS[self.look.sampling].spread(length, self.look, self.segments).reshape(-1)


@runtime_checkable
class Reader(Protocol):
    """An open clip and its frames. `read` and `show` raise video.Unreadable."""

    @property
    def clip(self) -> Clip: ...

    def read(self, choose: video.Choose) -> UInt8[np.ndarray, "t h w c"]:
        """The chosen frames, whole."""
        ...

    def show(self, choose: video.Choose, boxes: Boxes, out: UInt8[np.ndarray, "v t s s c"]) -> None:
        """Writes the parts `boxes(h, w)` of the chosen frames to `out`, resized to its size."""
        ...


def show(reader: Reader, choice: Drawn | Middle, out: Pixels) -> None:
    """Writes a row's pixels "[v] t h w c": for each box, the frames of all pieces in order."""
    frames, side = choice.pieces * choice.look.frames, choice.look.size
    reader.show(choice.frames, choice.boxes, out.reshape(-1, frames, side, side, 3))


def show_views(reader: Reader, look: Look, out: Pixels) -> None:
    """Writes SimVTP's test views, "v t h w c", v = segments * crops, crops fastest."""
    segments, crops = look.views or (1, 1)
    frames = reader.read(Spread(look, segments).frames)
    views = ops.crop_views(frames, look.size, crops)  # crops (segments t) h w c
    views = views.reshape(crops, segments, look.frames, *views.shape[2:])
    out[...] = views.swapaxes(0, 1).reshape(-1, *views.shape[2:])


def cut_frames(
    frames: UInt8[np.ndarray, "t h w c"], boxes: Boxes, out: UInt8[np.ndarray, "v t s s c"]
) -> None:
    """`Reader.show` for a reader that has whole frames."""
    for box, clip in zip(boxes(*frames.shape[1:3]), out, strict=True):
        clip[...] = ops.cut(frames, box, clip.shape[1])
