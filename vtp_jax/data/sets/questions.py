"""Sets of questions on videos: MSRVTT-QA, MSVD-QA, TGIF-QA, ActivityNet-QA, MSRVTT-MC."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vtp_jax.data.sets.parse import read_csv, read_lines, read_list
from vtp_jax.data.sets.retrieval import activitynet_media
from vtp_jax.data.sets.rows import Row, Set, Split
from vtp_jax.types import UserError


def read_msrvtt_qa(file: Path) -> Iterator[Row]:
    """Videos are numbers: 7 is video7, written video7.mp4 in VindLU's lists."""
    for row in read_list(file):
        name = row.text("video_id", "video").removeprefix("video")
        yield Row(
            row.text("id", "question_id"),
            media=(f"video{name}",),
            question=row.text("question"),
            answers=(row.text("answer"),),
        )


def read_msvd_qa(file: Path, mapping: Path) -> Iterator[Row]:
    """Videos are numbers: 7 is vid7, which `mapping` maps to MSVD's name."""
    names: dict[str, str] = {}
    for where, line in read_lines(mapping):
        name, _, number = line.rpartition(" ")
        if not number.startswith("vid"):
            raise UserError(f"{where}: {line!r:.60}; it must be a name and vid<number>")
        names[number] = name.strip()
    for row in read_list(file):
        number = f"vid{row.count('video_id')}"
        if number not in names:
            row.fail(f"{number} is not in {mapping}; take both files from one place")
        yield Row(
            row.text("id", "question_id"),
            media=(names[number], number),
            question=row.text("question"),
            answers=(row.text("answer"),),
        )


def read_tgif(file: Path) -> Iterator[Row]:
    """Tab-separated columns. With a1 to a5, the answer is the number of one of them, from 0;
    otherwise a word or a number. A number is also the label."""
    for n, row in enumerate(read_csv(file, delimiter="\t")):
        name, answer = row.text("gif_name"), row.text("answer")
        options: tuple[str, ...] = ()
        label = int(answer) if answer.isdecimal() else None
        if "a1" in row.values:
            options = tuple(row.text(f"a{i}") for i in range(1, 6))
            if label is None or label > 4:
                row.fail(f"the answer is {answer!r}; it must be a number from 0 to 4")
            answer = options[label]
        yield Row(
            f"{name}_{row.values.get('key') or n}",
            media=(name,),
            question=row.text("question"),
            answers=(answer,),
            options=options,
            label=label,
        )


def read_tgif_words(file: Path) -> Iterator[Row]:
    """FrameQA: answers are words, even where they are numbers."""
    for row in read_tgif(file):
        yield row._replace(label=None)


def read_activitynet_qa(questions: Path, answers: Path) -> Iterator[Row]:
    known = {row.text("question_id"): row.text("answer") for row in read_list(answers)}
    for row in read_list(questions):
        key = row.text("question_id")
        if key not in known:
            row.fail(f"no answer to question {key!r} in {answers}")
        yield Row(
            key,
            media=activitynet_media(row.text("video_name")),
            question=row.text("question"),
            answers=(known[key],),
        )


def read_msrvtt_mc(file: Path) -> Iterator[Row]:
    """A list of {video, caption, answer} (VindLU), or lines of {clip_name, options, answer}
    (ClipBERT): which of five captions is the video's."""
    for n, row in enumerate(read_list(file)):
        options, label = row.texts("options", "caption"), row.count("answer")
        if label >= len(options):
            row.fail(f"the answer is {label}; there are {len(options)} options, numbered from 0")
        name = row.text("clip_name", "video", "vid_key")
        yield Row(
            str(row.values.get("qid", n)),
            media=(name,),
            options=options,
            answers=(options[label],),
            label=label,
        )


TGIF = {  # kind: reader, training and test questions, unverified
    "action": (read_tgif, 20_475, 2_274),
    "transition": (read_tgif, 52_704, 6_232),
    "count": (read_tgif, 26_843, 3_554),
    "frameqa": (read_tgif_words, 39_392, 13_691),
}
SPLITS = ("train", "val", "test")

SETS = {
    "msrvtt_qa": Set(
        "MSRVTT-QA",
        "questions",
        {
            split: Split(
                read_msrvtt_qa,
                (f"{split}_qa.json | msrvtt_qa_{split}.json",),
                rows,
                sure=False,
                vocabulary="train",
                labelled=True,
            )
            for split, rows in zip(SPLITS, (158_581, 12_278, 72_821), strict=True)
        },
        "videos as msrvtt; questions: xudejing/video-question-answering",
        "not known",
        "the commonest 1,000 to 1,500 answers of training are the classes",
    ),
    "msvd_qa": Set(
        "MSVD-QA",
        "questions",
        {
            split: Split(
                read_msvd_qa,
                (f"{split}_qa.json", "youtube_mapping.txt"),
                rows,
                sure=False,
                vocabulary="train",
                labelled=True,
            )
            for split, rows in zip(SPLITS, (30_933, 6_415, 13_157), strict=True)
        },
        "videos as msvd; questions: xudejing/video-question-answering",
        "not known",
        "videos are found by MSVD's names, or as `vid7`",
    ),
    "tgif_qa": Set(
        "TGIF-QA",
        "questions",
        {
            f"{split}_{kind}": Split(
                read,
                (f"{split.title()}_{kind}_question.csv",),
                rows,
                sure=False,
                vocabulary="train_frameqa" if kind == "frameqa" else "",
                labelled=True,
            )
            for kind, (read, *counts) in TGIF.items()
            for split, rows in zip(("train", "test"), counts, strict=True)
        },
        "GIF files by the list of TGIF (raingo); questions: YunseokJANG/tgif-qa",
        "academic purposes only",
        "action and transition: five options; count: the number is the label; frameqa: words",
    ),
    "activitynet_qa": Set(
        "ActivityNet-QA",
        "questions",
        {
            split: Split(
                read_activitynet_qa,
                (f"{split}_q.json", f"{split}_a.json"),
                rows,
                sure=False,
                vocabulary="train",
                labelled=True,
            )
            for split, rows in zip(SPLITS, (32_000, 18_000, 8_000), strict=True)
        },
        "videos as activitynet; questions: MILVLG/activitynet-qa",
        "not known",
    ),
    "msrvtt_mc": Set(
        "MSRVTT-MC",
        "questions",
        {
            "test": Split(
                read_msrvtt_mc,
                ("msrvtt_mc_test.json | msrvtt_mc_test.jsonl",),
                2_990,
                labelled=True,
            )
        },
        "videos as msrvtt; lists: VindLU's or ClipBERT's annotations",
        "not known",
        "five captions, of which one is the video's; nothing to train on",
    ),
}
