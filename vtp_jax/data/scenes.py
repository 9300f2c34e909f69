"""A corpus of small scenes: videos whose pixels and whose words tell about each other.

On a patterned ground, one thing moves above or below a ring that rests, while the light in the
corner turns from one colour to another. The caption says all of this, so a hidden word can be read
off the video, and the colours of a hidden light off the caption. What a caption does not say
varies: positions, how fine and how bright the pattern is, the skin of things. Patterns repeat every
8 or every 4 pixels, with any phase, so what a hidden cube of 8 x 8 shows follows from visible ones,
though no interpolation between them finds it.

Every scene is a function of (seed, split, index). Scenes of `val` never occur in training: their
checksum differs from those of all training scenes. One pair in eight of them are twins, whose light
turns the other way: captions of the same words, and videos of the same frames but for their order.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from vtp_jax.data.shapes import Corpus, Plan, generator, pick

Map = Float[np.ndarray, "h w"]  # a number for each pixel

COLOURS: Mapping[str, tuple[int, int, int]] = dict(  # RGB
    red=(214, 40, 40), yellow=(245, 220, 60), blue=(50, 90, 220), pink=(245, 130, 180)
)
RING_COLOURS: Mapping[str, tuple[int, int, int]] = dict(
    orange=(240, 140, 30), green=(50, 170, 60), cyan=(60, 200, 210), violet=(140, 60, 200)
)
THINGS = ("disc", "square", "cross")
EVENTS = ("slides", "jumps", "blinks", "grows")
PLACES = ("above", "below")
GROUNDS: Mapping[str, tuple[int, int, int]] = dict(
    grey=(128, 128, 128), brown=(140, 95, 55), olive=(115, 120, 50), teal=(45, 115, 110),
    navy=(55, 65, 135), plum=(115, 60, 110), maroon=(130, 40, 50), forest=(40, 105, 50),
)  # fmt: skip
PATTERNS = ("stripes", "bars", "slopes", "checks", "dots")
LIGHTS: Mapping[str, tuple[int, int, int]] = dict(
    white=(255, 255, 255), golden=(255, 200, 40), crimson=(200, 0, 40), azure=(0, 130, 255)
)
SKINS = ("plain", "striped", "spotted")  # captions do not say which
TEMPLATES = (
    "a {colour} {thing} {event} {place} a {ring} ring on {ground} {pattern} while the light turns "
    "from {before} to {after}",
    "on {ground} {pattern} a {colour} {thing} {event} {place} a {ring} ring while the light turns "
    "from {before} to {after}",
)
CHECKSUMS = 16  # of scenes; those of one are held out
HELD_OUT = 200  # of them that are shown
TWINS = 8  # one pair of held-out scenes in so many are twins
PERIODS = (4, 8)  # pixels, of a pattern in a picture of 64
RADIUS = 0.17  # of a thing; this and all lengths below are relative to the picture's side
LAMP = 0.125  # radius of the light
START = (0.3, 0.4)  # x of the thing that moves
SLIDE, JUMP, GROWTH = 0.35, 0.2, 0.6


class Scene(NamedTuple):
    """What a caption says. The values are words."""

    colour: str
    thing: str
    event: str
    place: str
    ring: str
    ground: str
    pattern: str
    before: str
    after: str


VALUES: Mapping[str, tuple[str, ...]] = dict(
    colour=tuple(COLOURS), thing=THINGS, event=EVENTS, place=PLACES, ring=tuple(RING_COLOURS),
    ground=tuple(GROUNDS), pattern=PATTERNS, before=tuple(LIGHTS), after=tuple(LIGHTS),
)  # fmt: skip


def checksum(scene: Scene) -> int:
    """A number below CHECKSUMS; twins have the same one."""
    return sum(VALUES[name].index(x) for name, x in scene._asdict().items()) % CHECKSUMS


def draw_scene(rng: np.random.Generator, held_out: bool) -> Scene:
    """A scene of training, or a held-out one."""
    while True:
        scene = Scene(**{name: pick(rng, words) for name, words in VALUES.items()})
        if scene.before != scene.after and (checksum(scene) == 0) == held_out:
            return scene


@functools.lru_cache(maxsize=4)
def held_out(seed: int) -> tuple[tuple[Scene, str], ...]:
    """The held-out scenes, all different, and their templates; twins follow each other."""
    rng, chosen = np.random.default_rng([seed, 0]), dict[Scene, str]()
    while len(chosen) < HELD_OUT:
        pair = len(chosen) // 2
        one, two = draw_scene(rng, True), draw_scene(rng, True)
        template, other = pick(rng, TEMPLATES), pick(rng, TEMPLATES)
        if pair % TWINS == 0:
            two, other = one._replace(before=one.after, after=one.before), template
        if one not in chosen and two not in chosen and one != two:
            chosen |= {one: template, two: other}
    return tuple(chosen.items())


def describe(seed: int, split: str, index: int) -> tuple[Scene, str]:
    """The scene of a clip and its caption."""
    if split == "val":
        scene, template = held_out(seed)[index]
    else:
        rng = generator(seed, split, index, 0)
        scene, template = draw_scene(rng, False), pick(rng, TEMPLATES)
    return scene, template.format(**scene._asdict())


def read(plan: Plan, split: str, index: int) -> UInt8[np.ndarray, "t h w c"]:
    """The frames of a clip as drawn, before any compression."""
    scene, _ = describe(plan.seed, split, index)
    return render(scene, generator(plan.seed, split, index, 1), plan.side, plan.frames)


SCENES = Corpus("scenes 1", HELD_OUT, Scene._fields, describe, read)


def render(
    scene: Scene, rng: np.random.Generator, side: int, frames: int
) -> UInt8[np.ndarray, "t h w c"]:
    """Draws a clip; what its caption does not say is drawn from `rng`."""
    y, x = (np.mgrid[:side, :side].astype(np.float32) + 0.5) / side
    ground = draw_ground(scene, rng, x, y)
    lamp = np.clip((LAMP - np.hypot(x - LAMP, y - LAMP)) * side + 0.5, 0, 1)
    high, low = 0.33 + rng.uniform(-0.03, 0.03), 0.7 + rng.uniform(-0.03, 0.03)
    own, other = (high, low) if scene.place == "above" else (low, high)
    colour, at = RING_COLOURS[scene.ring], (rng.uniform(0.3, 0.8), other)
    ring = draw_thing("ring", "plain", colour, at, RADIUS, x, y)
    start, skin, clip = rng.uniform(*START), pick(rng, SKINS), []
    before, after = (
        over(over(ground, lamp, to_unit(LIGHTS[light])), *ring)
        for light in (scene.before, scene.after)
    )
    for t in (np.arange(frames) + 0.5) / frames:
        dx, dy, scale, seen = move(scene.event, t)
        cover, paint = draw_thing(
            scene.thing, skin, COLOURS[scene.colour], (start + dx, own + dy), RADIUS * scale, x, y
        )
        clip.append(over(before if t < 0.5 else after, seen * cover, paint))
    return np.clip(255 * np.stack(clip) + 0.5, 0, 255).astype(np.uint8)


def move(event: str, t: float) -> tuple[float, float, float, float]:
    """(dx, dy, scale, seen) of the thing that moves, at time t in [0, 1]."""
    dx, dy, scale, seen = 0.0, 0.0, 1.0, 1.0
    bump = np.sin(np.pi * t) ** 2
    if event == "slides":
        dx = SLIDE * t
    elif event == "jumps":
        dy = -JUMP * bump
    elif event == "blinks":
        seen = float(np.sin(4 * np.pi * t) > -0.1)
    else:
        scale = 1 + GROWTH * bump
    return dx, dy, scale, seen


def draw_ground(
    scene: Scene, rng: np.random.Generator, x: Map, y: Map
) -> Float[np.ndarray, "h w c"]:
    """The pattern in two tones of its colour, softly shaded."""
    cycles, contrast = 64 / pick(rng, PERIODS), rng.uniform(0.65, 0.85)
    p, q = rng.uniform(0, 2 * np.pi, 2)
    along = {"slopes": x + y, "bars": y}.get(scene.pattern, x)
    wave = np.sin(2 * np.pi * cycles * along + p)
    if scene.pattern == "checks":
        wave = wave * np.sin(2 * np.pi * cycles * y + q)
    elif scene.pattern == "dots":
        wave = wave + np.sin(2 * np.pi * cycles * y + q) - 0.5
    tone = 1 + contrast * np.tanh(2 * wave) + 0.2 * draw_noise(rng, len(x), 2.2)
    return np.clip(to_unit(GROUNDS[scene.ground]) * tone[..., None], 0, 1)


def draw_noise(rng: np.random.Generator, side: int, power: float) -> Map:
    """Noise of deviation 0.5 whose amplitude falls with frequency as 1 / f ** power."""
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) * side
    amplitude = np.where(f > 0, np.maximum(f, 1.0) ** -power, 0)
    noise = np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(f.shape)), (side, side))
    return (noise / (2 * noise.std())).astype(np.float32)


def draw_thing(
    thing: str,
    skin: str,
    colour: tuple[int, int, int],
    centre: tuple[float, float],
    radius: float,
    x: Map,
    y: Map,
) -> tuple[Map, Float[np.ndarray, "h w c"]]:
    """Its coverage of each pixel, and its paint: shaded, lighter at the upper left."""
    u, v = (x - centre[0]) / radius, (y - centre[1]) / radius
    a, b = np.abs(u), np.abs(v)
    outside = {  # distance to the outline, in radii
        "disc": lambda: np.hypot(u, v) - 1,
        "ring": lambda: np.abs(np.hypot(u, v) - 0.8) - 0.3,
        "square": lambda: np.maximum(a, b) - 0.88,
        "cross": lambda: np.maximum(np.maximum(a, b) - 1.1, np.minimum(a, b) - 0.4),
    }[thing]()
    cover = np.clip(0.5 - outside * radius * len(x), 0, 1)
    light = 0.85 - 0.18 * (u + v)
    if skin == "striped":
        light = light * np.where(np.sin(2.5 * np.pi * (u + v)) > 0, 1.0, 0.4)
    elif skin == "spotted":
        light = light * np.where(np.cos(2.2 * np.pi * u) * np.cos(2.2 * np.pi * v) > 0, 1.0, 0.4)
    return cover, np.clip(light, 0, 1.15)[..., None] * to_unit(colour)


def over(
    below: Float[np.ndarray, "h w c"], cover: Map, paint: Float[np.ndarray, "*h c"]
) -> Float[np.ndarray, "h w c"]:
    """Paint over a picture where it is covered."""
    return below + cover[..., None] * (paint - below)


def to_unit(colour: tuple[int, int, int]) -> Float[np.ndarray, "c"]:
    return np.asarray(colour, np.float32) / 255
