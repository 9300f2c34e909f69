"""Values that a config leaves to its data: `auto`.

`config.auto` names values, such as "steps" or "data.text.length", that are chosen when a run
begins: from the number of its clips, their rates and lengths, the words of their captions, and the
devices. What the file gives for them holds where no data is read, as in `vtp plan`. A flag that
sets a value wins, and `--config.data.text.length=auto` leaves one of any config to the data. The
choices are shown as a table and written to the run's config.json, from which a run that is resumed
takes them.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Int
from ml_collections import ConfigDict

from vtp_jax.data import kept, traits
from vtp_jax.data import text as tokens
from vtp_jax.data.open import Clips, fit, open_set, open_text
from vtp_jax.run import metrics, paths
from vtp_jax.setup import cli
from vtp_jax.types import UserError

SPAN = 2.5  # seconds that a clip shows: 64 frames at 25 a second, as in VideoMAE and SimVTP
MISSING = object()
BEGUN = "as this run began"
Sections = Any  # of a config: a ConfigDict, whose names type checkers do not know
LONG = 64  # tokens: captions up to here are kept whole, whatever they cost
KEPT = 0.995  # of longer captions
# Small nets, for machines without an accelerator: width, depth, heads, mlp.
ENCODER, DECODER = (128, 3, 2, 512), (64, 1, 1, 256)
RATES = {"S": 8e-4, "B": 5e-4}  # for 256 clips; in proportion to the root of the batch
SMALL_RATE, OTHER_RATE = 3e-3, 5e-4


class Choice(NamedTuple):
    """A value that was chosen, and the reason, in words."""

    name: str
    value: Any
    why: str


class Survey:
    """What choices rest on; each part is read when a choice first needs it."""

    def __init__(self, cfg: Sections):
        self.cfg = cfg

    @functools.cached_property
    def devices(self) -> int:
        return jax.device_count()

    @functools.cached_property
    def cpu(self) -> bool:
        return jax.devices()[0].platform == "cpu"

    @functools.cached_property
    def clips(self) -> Clips:
        train = self.cfg.data.train.to_dict()
        return open_set("data.train", self.cfg.data.kind, train, "train")

    @functools.cached_property
    def count(self) -> int:
        return len(self.clips.source.clips)

    @functools.cached_property
    def typical(self) -> traits.Trait:
        return traits.typical(self.clips)

    @functools.cached_property
    def captions(self) -> list[str]:
        return traits.captions(self.clips.source)

    @functools.cached_property
    def tokens(self) -> Int[np.ndarray, "n"]:
        """The number of tokens of each caption, uncut."""
        given = {**self.cfg.data.text.to_dict(), "length": 3}
        words = fit("data.text", open_text, given, self.clips.source)
        return words.tokenizer.count(self.captions)


def choose_frames(survey: Survey, cfg: Sections) -> tuple[int, str]:
    there = int(survey.typical.frames)
    frames = min(8 if survey.cpu else 16, there)
    return max(frames - frames % 2, 1), f"{machine(survey)}; videos have about {there} frames"


def choose_stride(survey: Survey, cfg: Sections) -> tuple[int, str]:
    frames, every, seen = cfg.data.video.frames, survey.clips.every, survey.typical
    rate = seen.rate or 25.0
    seconds = min(SPAN, seen.frames / rate)
    stride = max(min(round(rate * seconds / frames), int(seen.frames) // frames), 1)
    why = f"{frames} frames show {seconds:.1f} s at {rate:g} a second"
    if every > 1:
        return max(stride // every, 1) * every, f"{why}; the shards hold every {every}th"
    return stride, why


def choose_side(survey: Survey, cfg: Sections) -> tuple[int, str]:
    short = int(min(survey.typical.height, survey.typical.width))
    side = min(112 if survey.cpu else 224, short)
    by = 16 if side >= 112 else 8
    why = f"{machine(survey)}; the short side of videos is {short} pixels"
    return max(side - side % by, by), why


def choose_cube(survey: Survey, cfg: Sections) -> tuple[tuple[int, int, int], str]:
    frames, side = cfg.data.video.frames, cfg.data.video.size
    patch = next(n for n in (16, 14, 8, 7, 4, 2, 1) if side % n == 0 and (7 * n <= side or n == 1))
    cube = (1 if frames % 2 else 2, patch, patch)
    return cube, f"{count_cubes(cfg, cube)} tokens a clip"


def choose_ratio(survey: Survey, cfg: Sections) -> tuple[float, str]:
    count = count_cubes(cfg, cfg.method.cube)
    return (0.9 if count >= 400 else 0.75), f"of {count} tokens"


def choose_net(survey: Survey, cfg: Sections) -> tuple[Any, str]:
    if survey.cpu:
        return ENCODER, machine(survey)
    return ("S" if survey.count < 50_000 else "B"), f"{survey.count} clips"


def choose_decoder(survey: Survey, cfg: Sections) -> tuple[Any, str]:
    if isinstance(cfg.method.size, str):
        return None, f"that of {cfg.method.size}"
    return DECODER, "a small net"


def choose_dtype(survey: Survey, cfg: Sections) -> tuple[str, str]:
    return ("float32" if survey.cpu else "bfloat16"), machine(survey)


def choose_vocabulary(survey: Survey, cfg: Sections) -> tuple[int, str]:
    text = cfg.data.text.to_dict()
    if text.get("path") is not None:
        size = tokens.make(kind=text["kind"], path=text["path"]).facts["vocab_size"]
        return size, f"that of {text['path']}"
    words = collections.Counter(
        word for caption in survey.captions for word in re.findall(r"\w+", caption.lower())
    )
    often = sum(n > 1 for n in words.values())
    letters = len(set("".join(survey.captions))) + len(tokens.SPECIAL) + 1
    size = min(max(tokens.SMALL, often), 8000) + letters
    return size, f"at most; {len(words)} different words, {often} of them more than once"


def choose_length(survey: Survey, cfg: Sections) -> tuple[int, str]:
    found = np.sort(survey.tokens)
    if not len(found):
        raise UserError("data.train has no captions, from which data.text.length could be chosen")
    longest = int(found[-1])
    if longest <= LONG:
        return traits.rounded(longest), f"the longest of {len(found)} captions has {longest} tokens"
    most = int(found[math.ceil(KEPT * len(found)) - 1])
    length = min(traits.rounded(most), 2 * LONG)
    kept = np.mean(found <= length)
    return length, f"keeps {kept:.1%} of {len(found)} captions whole; the longest has {longest}"


def choose_batch(survey: Survey, cfg: Sections) -> tuple[int, str]:
    per = 64 if cfg.method.get("size") == "S" else 32
    wanted = max(32, survey.devices) if survey.cpu else per * survey.devices
    rows = max(min(wanted, survey.count) // survey.devices, 1) * survey.devices
    return rows, machine(survey)


def choose_steps(survey: Survey, cfg: Sections) -> tuple[int, str]:
    epochs, least, most = (100, 20_000, 200_000) if survey.cpu else (400, 400_000, 20_000_000)
    seen = min(max(epochs * survey.count, least), most)
    steps = math.ceil(seen / cfg.batch)
    return steps, f"shows each of {survey.count} clips {steps * cfg.batch / survey.count:.0f} times"


def choose_rate(survey: Survey, cfg: Sections) -> tuple[float, str]:
    size = cfg.method.get("size")
    base = RATES.get(size, OTHER_RATE) if isinstance(size, str) else SMALL_RATE
    rate = float(f"{base * math.sqrt(cfg.batch / 256):.1e}")
    return rate, f"{base:g} for 256 clips, by the root of the batch"


# In the order in which they are chosen: later ones rest on earlier ones.
RULES: Mapping[str, Callable[[Survey, Sections], tuple[Any, str]]] = {
    "data.video.frames": choose_frames,
    "data.video.stride": choose_stride,
    "data.video.size": choose_side,
    "data.text.vocab_size": choose_vocabulary,
    "data.text.length": choose_length,
    "method.size": choose_net,
    "method.decoder": choose_decoder,
    "method.cube": choose_cube,
    "method.video_ratio": choose_ratio,
    "method.dtype": choose_dtype,
    "batch": choose_batch,
    "steps": choose_steps,
    "optim.lr.peak": choose_rate,
}


def machine(survey: Survey) -> str:
    """The devices, in words."""
    kind, many = jax.devices()[0].device_kind, survey.devices > 1
    name = "CPU" if survey.cpu else kind
    return f"{survey.devices} x {name}" if many else f"one {name}"


def count_cubes(cfg: Sections, cube: Sequence[int]) -> int:
    look = cfg.data.video
    return look.frames // cube[0] * (look.size // cube[1]) * (look.size // cube[2])


def choose(cfg: Sections, workdir: str | os.PathLike[str]) -> list[Choice]:
    """Fills in what `config.auto` names, and empties it: from the run in `workdir` if one has begun
    there, otherwise from the data. Values that are computed from these follow.

    Raises UserError on a name that cannot be chosen, and on data that cannot be read.
    """
    wanted = list(cfg.get("auto", ()))
    if wrong := [name for name in wanted if name not in RULES]:
        hint = cli.suggest(wrong[0], RULES)
        raise UserError(f"config.auto: '{wrong[0]}' cannot be chosen from the data{hint}")
    if not wanted:
        return []
    folder, survey, made = paths.path(workdir), Survey(cfg), []
    begun = read_run(folder)
    for name in RULES:
        if name not in wanted:
            continue
        value, why = find(begun, name), BEGUN
        if value is MISSING:
            value, why = RULES[name](survey, cfg)
        put(cfg, name, value)
        made.append(Choice(name, value, why))
    put(cfg, "auto", ())
    known = kept.read(folder) if begun else None
    if known and known.tokenizer and find(cfg, "data.text.path") is None:
        # Its own tokenizer, not that of a list that may have grown.
        put(cfg, "data.text.path", known.tokenizer)
        put(cfg, "data.text.vocab_size", known.words["vocab_size"])
    return made


def read_run(folder: epath.Path) -> Mapping[str, Any]:
    """The config of the run that has begun in a folder; empty if none has."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def find(cfg: Sections, name: str) -> Any:
    """The value of a dotted name, or MISSING."""
    value: Any = cfg
    for key in name.split("."):
        if not isinstance(value, (Mapping, ConfigDict)) or key not in value:
            return MISSING
        value = value[key]
    return value


def put(cfg: Sections, name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for key in sections:
        cfg = cfg[key]
    with cfg.unlocked(), cfg.ignore_type():
        cfg[last] = value


def show(made: Sequence[Choice], out: Any) -> None:
    """The choices, as a table, once for all processes; those that a resumed run takes from its
    beginning, as one line. out: a text stream."""
    if jax.process_index():
        return
    if old := sum(one.why == BEGUN for one in made):
        print(f"{old} values that were chosen from the data are as this run began", file=out)
    rows = [(one.name, json.dumps(one.value), one.why) for one in made if one.why != BEGUN]
    if not rows:
        return
    metrics.print_table("chosen from the data", ("value", "is", "because"), rows, out)
