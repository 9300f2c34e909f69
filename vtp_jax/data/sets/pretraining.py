"""Sets to pretrain on: OpenVid-1M, FineVideo, Vript, InternVid, Panda-70M, WebVid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vtp_jax.data.sets.parse import Record, read_blobs, read_csv, read_json, read_list, read_parquet
from vtp_jax.data.sets.rows import Row, Set, Split


def read_openvid(file: Path) -> Iterator[Row]:
    """OpenVid-1M's table; only `video` and `caption` are used."""
    for row in read_csv(file):
        name = row.text("video")
        yield Row(name, media=(name,), captions=row.texts("caption"))


def read_finevideo(files: Sequence[Path]) -> Iterator[Row]:
    """A row for each video, with its description."""
    for name, row in finevideo(files):
        yield Row(name, media=(name,), captions=row.part("content_metadata").texts("description"))


def read_finevideo_scenes(files: Sequence[Path]) -> Iterator[Row]:
    """A row for each scene: its title, then the descriptions of its activities, in order."""
    for name, row in finevideo(files):
        for n, scene in enumerate(row.part("content_metadata").parts("scenes"), 1):
            time = scene.part("timestamps", "timestamp")
            texts = [a.get("description") for a in scene.parts("activities")]
            story = " ".join(str(text).strip() for text in texts if text)
            yield Row(
                f"{name}_{n:03d}",
                media=(f"{name}_{n:03d}",),
                whole=(name,),
                span=(time.seconds("start_timestamp"), time.seconds("end_timestamp")),
                captions=(*scene.texts("title"), *([story] if story else [])),
            )


def read_finevideo_questions(files: Sequence[Path]) -> Iterator[Row]:
    """A row for each question; answers are sentences."""
    for name, row in finevideo(files):
        for n, asked in enumerate(row.part("content_metadata").parts("qAndA"), 1):
            yield Row(
                f"{name}_{n:03d}",
                media=(name,),
                question=asked.text("question"),
                answers=asked.texts("answer"),
            )


def finevideo(files: Sequence[Path]) -> Iterator[tuple[str, Record]]:
    for file in files:
        for row in read_parquet(file, "json"):
            yield Path(row.text("original_video_filename")).stem, row


def extract_finevideo(file: Path, out: Path) -> int:
    """Writes the videos of a parquet file as <out>/<name>.mp4, and returns their number; existing
    files are whole, and kept."""
    out.mkdir(parents=True, exist_ok=True)
    names = (Path(row.text("original_video_filename")).stem for row in read_parquet(file, "json"))
    written = 0
    for name, video in zip(names, read_blobs(file, "mp4"), strict=True):
        target = out / f"{name}.mp4"
        if not target.exists():
            part = target.with_suffix(".part")
            part.write_bytes(video)
            part.rename(target)
            written += 1
    return written


def read_vript(files: Sequence[Path]) -> Iterator[Row]:
    """A row for each captioned scene. The files are .jsonl, with a video on each line, or one .json
    per video. Descriptions of the shot and the camera are not used."""
    for file in files:
        if file.suffix == ".jsonl":
            videos = read_list(file)
        else:
            videos = iter([Record(read_json(file), str(file))])
        for video in videos:
            data = video.part("data")
            for name in data.values:
                clip = data.part(name)
                caption = clip.part("caption").texts("content")
                yield Row(clip.text("clip_id"), media=(clip.text("clip_id"),), captions=caption)


def read_internvid(file: Path) -> Iterator[Row]:
    for row in read_list(file):
        video, start, end = (
            row.text(name) for name in ("YoutubeID", "Start_timestamp", "End_timestamp")
        )
        name = f"{video}_{start}_{end}"
        yield Row(
            name,
            media=(name,),
            whole=(video,),
            span=(row.seconds("Start_timestamp"), row.seconds("End_timestamp")),
            captions=row.texts("Caption"),
        )


def read_panda(file: Path) -> Iterator[Row]:
    """A row for each clip. A line of the table has lists of all clips of a video."""
    for row in read_csv(file):
        video, spans = row.text("videoID"), row.spans("timestamp")
        captions = row.listed("caption")
        if len(captions) != len(spans):
            row.fail(f"{len(captions)} captions for {len(spans)} timestamps; get the file again")
        for n, (span, caption) in enumerate(zip(spans, captions, strict=True)):
            name = f"{video}_{n:05d}"
            yield Row(name, media=(name,), whole=(video,), span=span, captions=(str(caption),))


def read_webvid(file: Path) -> Iterator[Row]:
    for row in read_csv(file):
        name = row.text("videoid")
        folder = str(row.values.get("page_dir") or "")
        yield Row(name, media=(f"{folder}/{name}",), captions=row.texts("name"))


FINEVIDEO = ("data/train-*.parquet | train-*.parquet",)
VRIPT = (
    "vript_{0}_videos_captions.jsonl | vript_{0}_videos_captions/*_caption.json | *_caption.json"
)

SETS = {
    "openvid": Set(
        "OpenVid-1M",
        "pretraining",
        {
            "train": Split(read_openvid, ("OpenVid-1M.csv",), 1_019_957, sure=False),
            "train_hd": Split(read_openvid, ("OpenVidHD.csv",), 433_523, sure=False),
        },
        "zips on Hugging Face (nkp37/OpenVid-1M), or the tars of Dev-Jahn/OpenVid-1M-wds",
        "cc-by-4.0 tag on the repacks; its parts have terms of their own",
    ),
    "finevideo": Set(
        "FineVideo",
        "pretraining",
        {
            "train": Split(read_finevideo, FINEVIDEO, 43_751, sure=False),
            "scenes": Split(read_finevideo_scenes, FINEVIDEO),
            "questions": Split(read_finevideo_questions, FINEVIDEO),
        },
        "Hugging Face (HuggingFaceFV/finevideo), behind a form; media are in the parquet files: "
        "`extract` writes them out",
        "Creative Commons, per video, with attribution; removals must be followed",
        "reading parquet needs pyarrow",
    ),
    "vript": Set(
        "Vript",
        "pretraining",
        {
            "long": Split(read_vript, (VRIPT.format("long"),)),
            "short": Split(read_vript, (VRIPT.format("short"),)),
        },
        "Hugging Face (Mutonix/Vript) or ModelScope: clips as zips",
        "academic terms (its LICENSE section)",
        "about 420,000 clips in all (unverified)",
    ),
    "internvid": Set(
        "InternVid-10M-FLT",
        "pretraining",
        {"train": Split(read_internvid, ("InternVid-10M-flt.jsonl",), 10_000_000, sure=False)},
        "YouTube ids; a third-party resized copy on OpenDataLab is named by its authors",
        "CC-BY-NC-SA (unverified)",
        "cut clips are looked for as `id_start_end`, else the whole video as `id`",
    ),
    "panda70m": Set(
        "Panda-70M",
        "pretraining",
        {
            "train_full": Split(read_panda, ("panda70m_training_full.csv",)),
            "train_10m": Split(read_panda, ("panda70m_training_10m.csv",)),
            "train_2m": Split(read_panda, ("panda70m_training_2m.csv",)),
            "val": Split(read_panda, ("panda70m_validation.csv",)),
            "test": Split(read_panda, ("panda70m_testing.csv",)),
        },
        "YouTube ids",
        "non-commercial research (Snap)",
        "cut clips are looked for as `id_00000`, numbered in the video (this project's rule), else "
        "the whole video as `id`",
    ),
    "webvid": Set(
        "WebVid",
        "pretraining",
        {
            "train_2m": Split(read_webvid, ("results_2M_train.csv",)),
            "train_10m": Split(read_webvid, ("results_10M_train.csv",)),
            "val": Split(read_webvid, ("results_2M_val.csv | results_10M_val.csv",)),
        },
        "withdrawn in February 2024, addresses too; for holders of old copies",
        "non-commercial",
        "media as `page_dir/videoid.mp4`",
    ),
}
