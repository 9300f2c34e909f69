"""Sets for finding videos by text: MSR-VTT, MSVD, DiDeMo, LSMDC, ActivityNet Captions, VATEX, and
VindLU's lists of Something-Something."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from vtp_jax.data.sets.parse import (
    Record,
    read_column,
    read_csv,
    read_lines,
    read_list,
    read_object,
    read_table,
    span,
)
from vtp_jax.data.sets.rows import Row, Set, Split
from vtp_jax.types import UserError


def read_msrvtt(captions: Path, listed: Path) -> Iterator[Row]:
    """The listed videos, each with all its captions."""
    texts = msrvtt_captions(captions)
    for name in read_column(listed, "video_id"):
        yield msrvtt_row(name, texts, captions)


def read_msrvtt_first(captions: Path, listed: Path) -> Iterator[Row]:
    """As `read_msrvtt`, with only the first caption: the test of 1k-B, after Miech."""
    for row in read_msrvtt(captions, listed):
        yield row._replace(captions=row.captions[:1])


def read_msrvtt_full(official: str, captions: Path, listed: Path | None) -> Iterator[Row]:
    """The official split, by the list, or else by the captions' file."""
    if listed is not None:
        yield from read_msrvtt(captions, listed)
        return
    texts, file = msrvtt_captions(captions), read_object(captions)
    if "videos" not in file.values:
        file.fail("does not define the splits of its videos; add <split>_list_full.txt")
    for video in file.parts("videos"):
        if video.text("split") == official:
            yield msrvtt_row(video.text("video_id"), texts, captions)


def read_jsfusion(file: Path) -> Iterator[Row]:
    """1k-A's table: a line for each video, with its single test sentence."""
    for row in read_csv(file):
        name = row.text("video_id")
        yield Row(name, media=(name,), captions=(row.text("sentence"),))


def read_jsfusion_index(captions: Path, listed: Path, index: Path) -> Iterator[Row]:
    """1k-A as in Frozen in Time: {video: number of its caption}, a pickle."""
    texts = msrvtt_captions(captions)
    chosen = Record(read_table(index), str(index))
    for name in read_column(listed, "video_id"):
        row, n = msrvtt_row(name, texts, captions), chosen.count(name)
        if n >= len(row.captions):
            chosen.fail(f"{name!r} has no caption {n}; {captions} has {len(row.captions)} of it")
        yield row._replace(captions=(row.captions[n],))


def msrvtt_captions(file: Path) -> dict[str, list[str]]:
    """{video: its captions, in order}, from the official JSON ({videos, sentences}) or from that of
    Frozen in Time ({annotations})."""
    data = read_object(file)
    texts: dict[str, list[str]] = {}
    for sentence in data.parts("sentences", "annotations"):
        texts.setdefault(sentence.text("video_id", "image_id"), []).append(sentence.text("caption"))
    return texts


def msrvtt_row(name: str, texts: dict[str, list[str]], file: Path) -> Row:
    if name not in texts:
        raise UserError(f"{file} has no caption of {name!r}; take both files from one place")
    return Row(name, media=(name,), captions=tuple(texts[name]))


def read_msvd(captions: Path, listed: Path) -> Iterator[Row]:
    """{video: captions} from a pickle, where a caption is a list of words."""
    texts = Record(read_table(captions), str(captions))
    for name in read_column(listed, "video_id"):
        lines = texts.listed(name)
        words = [line if isinstance(line, str) else " ".join(map(str, line)) for line in lines]
        yield Row(name, media=(name,), captions=tuple(words))


def read_didemo(file: Path, listed: Path | None) -> Iterator[Row]:
    """A row for each video, with all its descriptions as one paragraph, in the file's order; if
    there is a list, only for the videos that it names."""
    kept = None if listed is None else {Path(n).stem for n in read_column(listed, "video_id")}
    found: dict[str, list[str]] = {}
    for row in read_list(file):
        found.setdefault(row.text("video"), []).append(row.text("description"))
    for name, texts in found.items():
        if kept is None or Path(name).stem in kept or name in kept:
            yield Row(name, media=(name,), captions=(" ".join(texts),))


def read_didemo_moments(file: Path) -> Iterator[Row]:
    """A row for each description, with the moment chosen by each annotator: `times` are the first
    and the last of its segments of 5 seconds."""
    for row in read_list(file):
        name = row.text("video")
        yield Row(
            row.text("annotation_id"),
            media=(name,),
            captions=(row.text("description"),),
            moments=tuple((5 * start, 5 * (end + 1)) for start, end in row.spans("times")),
        )


def read_lsmdc(file: Path) -> Iterator[Row]:
    """Six tab-separated fields: clip, start and end twice, sentence. Each film has a folder of
    clips."""
    for where, line in read_lines(file):
        fields = line.split("\t")
        if len(fields) != 6:
            raise UserError(f"{where}: {len(fields)} fields; LSMDC has 6, separated by tabs")
        clip = fields[0].strip('"')
        film = clip.partition(".")[0][:-3]
        sentence = fields[5].strip().strip('"')
        if not sentence:
            raise UserError(f"{where}: no sentence; get the file again")
        yield Row(clip, media=(f"{film}/{clip}",), captions=(sentence,))


def read_activitynet(file: Path) -> Iterator[Row]:
    """A row for each video, with all its sentences as one paragraph, in the file's order."""
    for name, video in activitynet(file):
        paragraph = " ".join(video.texts("sentences"))
        yield Row(name, media=activitynet_media(name), captions=(paragraph,))


def read_activitynet_moments(file: Path) -> Iterator[Row]:
    """A row for each sentence and its time."""
    for name, video in activitynet(file):
        sentences, times = video.listed("sentences"), video.spans("timestamps")
        if len(sentences) != len(times):
            video.fail(f"{len(sentences)} sentences for {len(times)} timestamps")
        for n, (sentence, time) in enumerate(zip(sentences, times, strict=True)):
            caption = (str(sentence).strip(),)
            yield Row(
                f"{name}_{n}", media=activitynet_media(name), captions=caption, moments=(time,)
            )


def activitynet(file: Path) -> Iterator[tuple[str, Record]]:
    videos = read_object(file)
    for name in videos.values:
        yield name, videos.part(name)


def activitynet_media(name: str) -> tuple[str, str]:
    """The file names with and without `v_` before YouTube's id."""
    bare = name.removeprefix("v_")
    return f"v_{bare}", bare


def read_vatex(language: str, file: Path) -> Iterator[Row]:
    """videoID is YouTube's id, the start and the end; ids may contain underscores."""
    for row in read_list(file):
        name = row.text("videoID")
        parts = name.rsplit("_", 2)
        if len(parts) != 3:
            row.fail(f"videoID is {name!r}; it must be <id>_<start>_<end>")
        yield Row(
            name,
            media=(name,),
            whole=(parts[0],),
            span=span(parts[1:], f"{row.where}: videoID"),
            captions=row.texts(language),
        )


def read_pairs(file: Path) -> Iterator[Row]:
    """VindLU's list of {"video", "caption"}; ALPRO's and ClipBERT's lines have "clip_name"."""
    for n, row in enumerate(read_list(file)):
        name = row.text("video", "clip_name")
        yield Row(f"{n}", media=(name,), captions=row.texts("caption"))


MSRVTT = "MSRVTT_data.json | MSR_VTT.json"
OFFICIAL = f"{MSRVTT} | train_val_videodatainfo.json"
VATEX = {"train": "training_v1.0", "val": "validation_v1.0", "test": "public_test_english_v1.1"}

SETS = {
    "msrvtt": Set(
        "MSR-VTT",
        "retrieval",
        {
            "train_9k": Split(
                read_msrvtt,
                (MSRVTT, "MSRVTT_train.9k.csv | train_list_jsfusion.txt | train_list_9k.txt"),
                9_000,
            ),
            "train_7k": Split(
                read_msrvtt, (MSRVTT, "MSRVTT_train.7k.csv | train_list_7k.txt"), 7_010, sure=False
            ),
            "test_1k": Split(read_jsfusion, ("MSRVTT_JSFUSION_test.csv",), 1_000),
            "test_1k_index": Split(
                read_jsfusion_index,
                (
                    MSRVTT,
                    "val_list_jsfusion.txt",
                    "jsfusion_val_caption_idx.json | jsfusion_val_caption_idx.pkl",
                ),
                1_000,
            ),
            "train_1kb": Split(read_msrvtt, (MSRVTT, "train_list_miech.txt"), 6_656),
            "test_1kb": Split(read_msrvtt_first, (MSRVTT, "test_list_miech.txt"), 1_000),
            "train_full": Split(
                partial(read_msrvtt_full, "train"), (OFFICIAL, "?train_list_full.txt"), 6_513
            ),
            "val_full": Split(
                partial(read_msrvtt_full, "validate"), (OFFICIAL, "?val_list_full.txt"), 497
            ),
            "test_full": Split(
                partial(read_msrvtt_full, "test"),
                (f"{MSRVTT} | test_videodatainfo.json", "?test_list_full.txt"),
                2_990,
            ),
            "train_9k_vindlu": Split(read_pairs, ("msrvtt_ret_train9k.json",)),
            "train_7k_vindlu": Split(read_pairs, ("msrvtt_ret_train7k.json",)),
            "test_1k_vindlu": Split(read_pairs, ("msrvtt_ret_test1k.json",), 1_000),
        },
        "videos: MSRVTT.zip of Frozen in Time; lists: CLIP4Clip's zip, or the same zip",
        "not known",
        "1k-A is train_9k (or train_7k) with test_1k, one fixed sentence each; 1k-B is tested on "
        "each video's first caption; full on all of them",
    ),
    "msvd": Set(
        "MSVD",
        "retrieval",
        {
            split: Split(
                read_msvd, ("raw-captions.json | raw-captions.pkl", f"{split}_list.txt"), rows
            )
            for split, rows in (("train", 1_200), ("val", 100), ("test", 670))
        },
        "videos: YouTubeClips.tar (UT Austin); lists and captions: CLIP4Clip's zip",
        "not known",
        "about 41 captions a video, all of them used; the pickle is read without executing it",
    ),
    "didemo": Set(
        "DiDeMo",
        "retrieval",
        {
            split: Split(read_didemo, (f"{split}_data.json", f"?{split}_list.txt"), rows)
            for split, rows in (("train", 8_392), ("val", 1_065), ("test", 1_004))
        },
        "videos: YFCC100M's bucket, and 13 that are missing there; annotations: LocalizingMoments",
        "videos: Flickr's Creative Commons, per video",
        "paragraphs; without train_list.txt training has the original 8,395 videos",
    ),
    "didemo_moments": Set(
        "DiDeMo (moments)",
        "moments",
        {s: Split(read_didemo_moments, (f"{s}_data.json",)) for s in ("train", "val", "test")},
        "as didemo",
        "as didemo",
    ),
    "lsmdc": Set(
        "LSMDC",
        "retrieval",
        {
            "train": Split(read_lsmdc, ("LSMDC16_annos_training.csv",), 101_079),
            "val": Split(read_lsmdc, ("LSMDC16_annos_val.csv",), 7_408, sure=False),
            "test": Split(read_lsmdc, ("LSMDC16_challenge_1000_publictect.csv",), 1_000),
        },
        "MPII, with its permission and password",
        "research, by agreement",
        "most code leaves out clip 1012_Unbreakable_00.05.16.065-00.05.21.941; allow it to be "
        "absent",
    ),
    "activitynet": Set(
        "ActivityNet Captions",
        "retrieval",
        {
            split: Split(read_activitynet, (f"{split}.json",), rows)
            for split, rows in (("train", 10_009), ("val_1", 4_917), ("val_2", 4_885))
        },
        "videos: YouTube, or by ActivityNet's form; captions.zip of the project page (Stanford)",
        "not known",
        "paragraphs; val_1 is what papers report",
    ),
    "activitynet_moments": Set(
        "ActivityNet Captions (moments)",
        "moments",
        {
            s: Split(read_activitynet_moments, (f"{s}.json",), rows, sure=False)
            for s, rows in (("train", 37_421), ("val_1", 17_505), ("val_2", 17_031))
        },
        "as activitynet",
        "as activitynet",
        "times as in the file",
    ),
    "vatex": Set(
        "VATEX",
        "retrieval",
        {
            f"{split}_{language}": Split(
                partial(read_vatex, key), (f"vatex_{VATEX[split]}.json",), rows, sure=False
            )
            for language, key in (("en", "enCap"), ("zh", "chCap"))
            for split, rows in (("train", 25_991), ("val", 3_000), ("test", 6_000))
            if (split, language) != ("test", "zh")
        },
        "YouTube ids; annotations: the project page",
        "CC-BY-4.0 annotations (unverified)",
        "the public test has English captions only; the half of val that HGR tests on is not "
        "known here",
    ),
    "ssv2_label": Set(
        "SSv2-Label (VindLU)",
        "retrieval",
        {
            "train": Split(read_pairs, ("ssv2_ret_label_train.json",), 168_913),
            "test": Split(read_pairs, ("ssv2_ret_label_val_small.json",), 2_088, sure=False),
        },
        "videos as ssv2; lists: VindLU's annotations",
        "as ssv2",
    ),
    "ssv2_template": Set(
        "SSv2-Template (VindLU)",
        "retrieval",
        {
            "train": Split(read_pairs, ("ssv2_ret_template_train.json",), 168_913),
            "test": Split(read_pairs, ("ssv2_ret_template_val_small.json",), 2_088, sure=False),
        },
        "videos as ssv2; lists: VindLU's annotations",
        "as ssv2",
    ),
}
