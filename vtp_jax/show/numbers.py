"""Names and units of the numbers that evaluators and losses yield, for people."""

from __future__ import annotations

import re
from typing import NamedTuple

from vtp_jax.run import metrics

LOSSES = {
    "loss": "total",
    "loss_video": "video: hidden cubes",
    "loss_text": "text: hidden words",
    "loss_vtc": "contrast (VTC)",
    "loss_vtm": "matching (VTM)",
    "loss_contrast": "contrast",
    "loss_match": "matching",
    "loss_words": "next words",
    "loss_caption": "captions: next words",
    "loss_class": "classes",
    "loss_answer": "answers",
    "loss_sort": "order of captions",
}
WAYS = {"t2v": "captions find videos", "v2t": "videos find captions"}
KNOWN = {
    "gmean": "geometric mean of R@1, R@5, R@10",
    "class_mean": "mean of the classes' own top-1",
    "chance": "chance",
    "exact": "captions that are one of the video's own",
    "f1": "best F1 of tokens with one of the video's captions",
    "tokens": "tokens in a caption, mean",
    "match_accuracy": "pairs told from wrong ones (VTM)",
    "restored_db": "hidden cubes, restored",
    "interpolated_db": "hidden cubes, interpolated from the visible ones",
    "words_right": "hidden words right",
    "n_videos": "videos",
    "n_questions": "questions",
    "n_captions": "captions",
    "n_views": "views of a video",
    "n_gallery": "videos in the gallery",
    "n_left_out": "left out: unreadable or without a label",
    "n_unlabelled": "of them readable, without a label",
    "n_outside": "with an answer or class outside the list, counted as wrong",
    "n_videos_left_out": "videos left out",
    "n_captions_left_out": "captions left out",
}
WITHOUT = re.compile(r"(.+)_without_(.+)")
SHARES = re.compile(
    r"(?:t2v_|v2t_)?(?:r\d+|gmean)|top\d+|knn\d+|class_mean|chance|exact|f1|words_right|.*_accuracy"
)


class Pair(NamedTuple):
    """A number, and the same without the other modality. other: such as caption."""

    name: str
    without: str
    other: str


def title(name: str) -> str:
    """The name of a number in words: "t2v_r5" -> "R@5, captions find videos"."""
    if found := WITHOUT.fullmatch(name):
        return f"{title(found[1])}, without the {found[2].replace('_', ' ')}"
    way, _, rest = name.partition("_")
    if way in WAYS and rest:
        return f"{title(rest)}, {WAYS[way]}"
    if found := re.fullmatch(r"r(\d+)", name):
        return f"R@{found[1]}"
    if found := re.fullmatch(r"top(\d+)", name):
        return f"top-{found[1]}"
    if found := re.fullmatch(r"knn(\d+)", name):
        return f"right by the {found[1]} nearest" if found[1] != "1" else "right by the nearest"
    words = {"mdr": "median rank", "mnr": "mean rank"} | KNOWN
    return words.get(name) or LOSSES.get(name) or name.removesuffix("_db").replace("_", " ")


def unit(name: str) -> str:
    """% for shares, dB for ratios of signal to noise, else nothing."""
    base = found[1] if (found := WITHOUT.fullmatch(name)) else name
    return "%" if SHARES.fullmatch(base) else "dB" if base.endswith("_db") else ""


def text(name: str, value: float) -> str:
    """A value with its unit: shares in percent."""
    kind = unit(name)
    if kind == "%":
        return f"{100 * value:.1f} %"
    return f"{value:.2f} dB" if kind == "dB" else metrics.number(value)


def difference(name: str, value: float) -> str:
    """A difference of two values of a number, with its sign: of shares, in points."""
    kind = unit(name)
    if kind == "%":
        return f"{100 * value:+.1f} points"
    return f"{value:+.2f} dB" if kind == "dB" else f"{value:+.3g}"


def pairs(names: list[str]) -> list[Pair]:
    """The numbers that were also measured without the other modality."""
    found = (WITHOUT.fullmatch(name) for name in names)
    return [Pair(m[1], m[0], m[2].replace("_", " ")) for m in found if m and m[1] in names]


def seconds(value: float) -> str:
    """A duration in words: 42 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = round(value)
    for size, name, part, of in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part} {of}"
    return f"{value:.1f} s" if 0 < value < 10 else f"{whole} s"
