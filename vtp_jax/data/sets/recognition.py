"""Sets with a class for each clip: Kinetics, Something-Something V2, UCF101, HMDB51; and AVA, with
boxes. Classes are numbered from 0."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from vtp_jax.data.sets.parse import (
    Record,
    read_csv,
    read_lines,
    read_list,
    read_object,
    read_text,
)
from vtp_jax.data.sets.rows import Box, Row, Set, Split
from vtp_jax.types import UserError


def read_kinetics(train: Path, file: Path) -> Iterator[Row]:
    """Classes are those of `train`, numbered in alphabetical order. Files are named
    <id>_<start>_<end>, with six digits each for start and end; a test list may have no classes."""
    classes = {name: n for n, name in enumerate(sorted({r.text("label") for r in read_csv(train)}))}
    for row in read_csv(file):
        video, start, end = row.text("youtube_id"), row.count("time_start"), row.count("time_end")
        name = f"{video}_{start:06d}_{end:06d}"
        label = row.values.get("label")
        yield Row(
            name,
            media=(f"{label}/{name}" if label else name,),
            whole=(video,),
            span=(start, end),
            captions=(label,) if label else (),
            label=find_class(row, classes, label, train) if label else None,
            name=label or "",
        )


def find_class(row: Record, classes: Mapping[str, int], name: str, file: Path) -> int:
    if name not in classes:
        row.fail(f"the class {name!r} is not in {file}; take both files from one place")
    return classes[name]


def read_ssv2(labels: Path, file: Path) -> Iterator[Row]:
    """The class is the template without brackets; the caption has the names of objects. A test list
    has neither."""
    known = read_object(labels)
    classes = {name: known.count(name) for name in known.values}
    for row in read_list(file):
        name = row.text("id")
        if "template" not in row.values:
            yield Row(name, media=(name,))
            continue
        template = re.sub(r"[\[\]]", "", row.text("template"))
        yield Row(
            name,
            media=(name,),
            captions=(row.text("label"),),
            label=find_class(row, classes, template, labels),
            name=template,
        )


def read_ucf(classes: Path, file: Path) -> Iterator[Row]:
    """Lines `Class/name.avi number` or `Class/name.avi`; numbers count from 1."""
    known: dict[str, int] = {}
    for where, line in read_lines(classes):
        n, _, name = line.partition(" ")
        if not (n.isdecimal() and int(n) and name):
            raise UserError(f"{where}: {line!r:.60}; it must be a number from 1 on and a class")
        known[name.strip()] = int(n) - 1
    for where, line in read_lines(file):
        path, _, n = line.partition(" ")
        name = path.partition("/")[0]
        if name not in known or (n and n.strip() != str(known[name] + 1)):
            raise UserError(f"{where}: {line!r:.80} does not fit the classes of {classes}")
        captions = (split_words(name),)
        yield Row(path, media=(path,), captions=captions, label=known[name], name=name)


def split_words(name: str) -> str:
    """ApplyEyeMakeup -> apply eye makeup."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)).lower() or name


def read_hmdb(code: str, files: Sequence[Path]) -> Iterator[Row]:
    """One file per class, <class>_test_split<n>.txt, with lines `name.avi code`: 1 is training, 2
    is test, 0 is neither. Classes are numbered in alphabetical order."""
    classes = [file.name.rpartition("_test_split")[0] for file in files]
    known = {name: n for n, name in enumerate(sorted(classes))}
    for file, name in zip(files, classes, strict=True):
        for where, line in read_lines(file):
            clip, _, mark = line.rpartition(" ")
            if not clip or mark not in ("0", "1", "2"):
                raise UserError(f"{where}: {line!r:.80}; it must be a file and 0, 1 or 2")
            if mark == code:
                path = f"{name}/{clip.strip()}"
                caption = (name.replace("_", " "),)
                yield Row(path, media=(path,), captions=caption, label=known[name], name=name)


AVA_COLUMNS = ("video", "time", "left", "top", "right", "bottom", "action", "person")


def read_ava(file: Path, excluded: Path | None, actions: Path | None) -> Iterator[Row]:
    """A row for each second that has boxes: the video's part from 1.5 s before to 1.5 s after it.

    The table has no header, and one line for each action of a person. If there is a list of
    actions, only those are kept; excluded times are left out.
    """
    dropped = set()
    if excluded:
        dropped = {
            (row.text("video"), row.number("time")) for row in read_csv(excluded, "video", "time")
        }
    kept = None if actions is None else read_actions(actions)
    found: dict[tuple[str, float], dict[Box, list[int]]] = {}
    for row in read_csv(file, *AVA_COLUMNS):
        key = row.text("video"), row.number("time")
        if key in dropped:
            continue
        people = found.setdefault(key, {})
        if not row.values.get("action"):  # a second without people
            continue
        action = row.count("action")
        left, top, right, bottom = (row.number(side) for side in AVA_COLUMNS[2:6])
        if not (0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
            row.fail("a box reaches out of the picture; sides are fractions of it")
        person = row.count("person") if row.values.get("person") else None
        if kept is None or action in kept:
            people.setdefault(Box(left, top, right, bottom, (), person), []).append(action)
    for (video, time), people in found.items():
        boxes = tuple(box._replace(actions=tuple(acts)) for box, acts in people.items())
        yield Row(
            f"{video}_{time:04.0f}",
            media=(f"{video}_{time:04.0f}",),
            whole=(video,),
            span=(time - 1.5, time + 1.5),
            boxes=boxes,
        )


def read_actions(file: Path) -> dict[int, str]:
    """{number: name} of a list of actions (.pbtxt), whose numbers are called id or label_id."""
    text = read_text(file)
    names = re.findall(r'\bname:\s*"([^"]*)"', text)
    numbers = re.findall(r"\b(?:label_)?id:\s*(\d+)", text)
    if not names or len(names) != len(numbers):
        raise UserError(f"{file}: {len(names)} names and {len(numbers)} numbers; get it again")
    return dict(zip(map(int, numbers), names, strict=True))


def make_kinetics(classes: int, copy: str, media: str) -> Set:
    folder = f"kinetics{classes}"
    names = {"train": ("train",), "val": ("val", "validate"), "test": ("test",)}

    def file(split: str) -> str:
        return " | ".join(f"{at}{n}.csv" for at in (f"{folder}/", "") for n in names[split])

    return Set(
        f"Kinetics-{classes}",
        "recognition",
        {
            split: Split(read_kinetics, (file("train"), file(split)), labelled=split != "test")
            for split in names
        },
        media,
        "CC-BY annotations",
        f"the usual copies hold {copy} training and validation clips; every laboratory's differ",
    )


SSV2 = "something-something-v2-{0}.json | {0}.json"
CVDF = "CVDF's tars, or OpenDataLab"

SETS = {
    "kinetics400": make_kinetics(400, "240,436 and 19,796", CVDF),
    "kinetics600": make_kinetics(600, "383,393 and 27,910", CVDF),
    "kinetics700": make_kinetics(700, "542,357 and 34,824", CVDF),
    "ssv2": Set(
        "Something-Something V2",
        "recognition",
        {
            split: Split(
                read_ssv2,
                (SSV2.format("labels"), SSV2.format(file)),
                rows,
                labelled=split != "test",
            )
            for split, file, rows in (
                ("train", "train", 168_913),
                ("val", "validation", 24_777),
                ("test", "test", None),
            )
        },
        "its project page (Qualcomm), after registration: one archive in parts, .webm files",
        "its own, for research",
        "never flip: left and right are classes",
    ),
    "ucf101": Set(
        "UCF101",
        "recognition",
        {
            f"{split}_{n}": Split(
                read_ucf,
                ("classInd.txt", f"{split}list{n:02d}.txt"),
                rows,
                sure=False,
                labelled=True,
            )
            for split, counts in (("train", (9_537, 9_586, 9_624)), ("test", (3_783, 3_734, 3_696)))
            for n, rows in enumerate(counts, 1)
        },
        "its project page (UCF CRCV): UCF101.rar and the lists, .avi files",
        "not known",
    ),
    "hmdb51": Set(
        "HMDB51",
        "recognition",
        {
            f"{split}_{n}": Split(
                partial(read_hmdb, code),
                (f"*_test_split{n}.txt",),
                rows,
                sure=False,
                labelled=True,
            )
            for split, code, rows in (("train", "1", 3_570), ("test", "2", 1_530))
            for n in (1, 2, 3)
        },
        "its project page (Serre lab, Brown): hmdb51_org.rar and the splits, .avi files",
        "not known",
    ),
    "ava": Set(
        "AVA 2.2",
        "detection",
        {
            split: Split(
                read_ava,
                (
                    f"ava_{split}_v2.2.csv",
                    f"?ava_{split}_excluded_timestamps_v2.2.csv",
                    "?ava_action_list_v2.2_for_activitynet_2019.pbtxt",
                ),
            )
            for split in ("train", "val")
        },
        "CVDF's copies of the films, 15 minutes from 900 s on",
        "CC-BY annotations (unverified)",
        "times are those of the whole film; a file cut at 900 s starts at 900",
    ),
}
