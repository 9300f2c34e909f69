"""Sets for locating the moment that a sentence describes: Charades-STA, TACoS, QVHighlights. The
moments of DiDeMo and ActivityNet Captions are with their sets (`retrieval`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vtp_jax.data.sets.parse import Record, read_lines, read_list, read_object, span
from vtp_jax.data.sets.rows import Row, Set, Split
from vtp_jax.types import UserError

WINDOW = 2  # seconds of a clip that QVHighlights scores


def read_charades(file: Path) -> Iterator[Row]:
    """Lines `video start end##sentence`."""
    for n, (where, line) in enumerate(read_lines(file)):
        head, mark, sentence = line.partition("##")
        fields = head.split()
        if not mark or len(fields) != 3 or not sentence.strip():
            raise UserError(f"{where}: {line!r:.60}; it must be `video start end##sentence`")
        moment = span(fields[1:], where)
        caption = (sentence.strip(),)
        yield Row(f"{fields[0]}_{n}", media=(fields[0],), captions=caption, moments=(moment,))


def read_tacos(file: Path) -> Iterator[Row]:
    """2D-TAN's files: {video: {timestamps, sentences, fps, num_frames}}; times are frames."""
    videos = read_object(file)
    for name in videos.values:
        video = videos.part(name)
        rate, sentences = video.number("fps"), video.listed("sentences")
        times = video.spans("timestamps")
        if rate <= 0 or len(sentences) != len(times):
            video.fail(f"fps={rate:g}, {len(sentences)} sentences for {len(times)} timestamps")
        for n, (sentence, (start, end)) in enumerate(zip(sentences, times, strict=True)):
            yield Row(
                f"{name}_{n}",
                media=(name,),
                captions=(str(sentence).strip(),),
                moments=((start / rate, end / rate),),
            )


def read_qvhighlights(file: Path) -> Iterator[Row]:
    """Videos are named <id>_<start>_<end>; a test list has no moments."""
    for row in read_list(file):
        name = row.text("vid")
        parts = name.rsplit("_", 2)
        if len(parts) != 3:
            row.fail(f"vid is {name!r}; it must be <id>_<start>_<end>")
        known = "relevant_windows" in row.values
        yield Row(
            row.text("qid"),
            media=(name,),
            whole=(parts[0],),
            span=span(parts[1:], f"{row.where}: vid"),
            captions=(row.text("query"),),
            moments=row.spans("relevant_windows") if known else (),
            saliency=mean_scores(row) if "saliency_scores" in row.values else (),
        )


def mean_scores(row: Record) -> tuple[float, ...]:
    """The mean of the annotators' scores for each 2 seconds of the video; 0 without scores."""
    clips, scores = row.listed("relevant_clip_ids"), row.listed("saliency_scores")
    means = [0.0] * round(row.number("duration") / WINDOW)
    if len(clips) != len(scores):
        row.fail(f"{len(scores)} scores for {len(clips)} clips")
    for clip, given in zip(clips, scores, strict=True):
        if not (isinstance(clip, int) and 0 <= clip < len(means) and given):
            row.fail(f"clip {clip!r} is not one of the video's {len(means)}, or has no scores")
        means[clip] = sum(given) / len(given)
    return tuple(means)


SETS = {
    "charades_sta": Set(
        "Charades-STA",
        "moments",
        {
            split: Split(
                read_charades,
                (f"charades_sta_{split}.txt | Charades_sta_{split}.txt",),
                rows,
                sure=False,
            )
            for split, rows in (("train", 12_408), ("test", 3_720))
        },
        "videos: Charades_v1_480.zip (AllenAI); sentences: jiyanggao/TALL",
        "non-commercial (unverified)",
    ),
    "tacos": Set(
        "TACoS",
        "moments",
        {
            split: Split(
                read_tacos,
                (f"tacos/{split}.json | tacos_{split}.json | TACoS/{split}.json | {split}.json",),
                rows,
                sure=False,
            )
            for split, rows in (("train", 10_146), ("val", 4_589), ("test", 4_083))
        },
        "videos: MPII Cooking Composite; annotations: 2D-TAN's",
        "not known",
    ),
    "qvhighlights": Set(
        "QVHighlights",
        "moments",
        {
            split: Split(read_qvhighlights, (f"highlight_{split}_release.jsonl",), rows, sure=False)
            for split, rows in (("train", 7_218), ("val", 1_550), ("test", 1_542))
        },
        "videos and annotations: jayleicn/moment_detr",
        "CC-BY-NC-SA 4.0 annotations (unverified)",
    ),
}
