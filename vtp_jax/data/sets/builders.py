"""TFDS builders of the sets, made from the same table.

    builder = builders.make("msrvtt")(data_dir="tfds")
    config = tfds.download.DownloadConfig(manual_dir="data/msrvtt")
    builder.download_and_prepare(download_config=config)
    builder.as_dataset("train_9k")      # or, later: tfds.builder_from_directory(builder.data_dir)

Every set has the same features: the fields of `Row`, and the bytes of the video file, whose format
is `suffix`. Nothing is decoded or cut. Splits without annotation files, and rows without a video,
are left out and reported in the log.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from vtp_jax.data import sets
from vtp_jax.types import UserError

NO_SPAN = (-1.0, -1.0)  # of a file that shows only the row
NONE = -1  # no label, no person
VERSION = "1.0.0"


@functools.cache
def make(name: str) -> Any:
    """The builder of a set: a subclass of tfds.core.GeneratorBasedBuilder, vtp_<set> to TFDS."""
    one, tfds = sets.find_set(name), import_tfds()

    def info(self: Any) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{one.title}. Licence: {one.licence}. {one.note}",
            features=tfds.features.FeaturesDict(features(tfds)),
        )

    def split_generators(self: Any, downloads: Any) -> dict[str, Any]:
        folder = sets.Folder(downloads.manual_dir)
        lacking = {split: sets.find_lacking(s, folder) for split, s in one.splits.items()}
        if all(lacking.values()):
            raise UserError(f"{name}: no split has all its files below {folder.root}; {one.get}")
        for split, files in lacking.items():
            if files:
                logging.warning("%s/%s is left out; it lacks %s", name, split, ", ".join(files))
        return {s: examples(name, s, folder) for s, files in lacking.items() if not files}

    def generate_examples(self: Any, *_: Any) -> Any:
        raise NotImplementedError("each split has its own examples")

    return type(
        f"Vtp{name.title().replace('_', '')}",
        (tfds.core.GeneratorBasedBuilder,),
        dict(
            __module__=__name__,
            name=f"vtp_{name}",
            VERSION=tfds.core.Version(VERSION),
            MANUAL_DOWNLOAD_INSTRUCTIONS=one.get,
            _info=info,
            _split_generators=split_generators,
            _generate_examples=generate_examples,
        ),
    )


def features(tfds: Any) -> dict[str, Any]:
    """The fields of `Row`; spans are "n 2" in seconds."""
    text, integer = tfds.features.Text(), tfds.features.Scalar(np.int64)

    def numbers(*shape: int | None) -> Any:
        return tfds.features.Tensor(shape=shape, dtype=np.float32)

    boxes = dict(box=numbers(4), actions=tfds.features.Sequence(integer), person=integer)
    return dict(
        id=text,
        video=tfds.features.Tensor(shape=(), dtype=np.object_),
        suffix=text,
        span=numbers(2),
        captions=tfds.features.Sequence(text),
        label=integer,
        question=text,
        answers=tfds.features.Sequence(text),
        options=tfds.features.Sequence(text),
        moments=numbers(None, 2),
        saliency=numbers(None),
        boxes=tfds.features.Sequence(boxes),
        licence=text,
        origin=text,
    )


def examples(name: str, split: str, folder: sets.Folder) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, example) of every row that has a video."""
    absent = 0
    for n, (row, path, span) in enumerate(sets.locate(sets.read(name, split, folder), folder)):
        if path is None:
            absent += 1
            continue
        file = folder.root / path
        boxes = [
            dict(
                box=box[:4], actions=box.actions, person=NONE if box.person is None else box.person
            )
            for box in row.boxes
        ]
        yield (
            n,
            dict(
                id=row.id,
                video=file.read_bytes(),
                suffix=file.suffix,
                span=np.asarray(span or NO_SPAN, np.float32),
                captions=row.captions,
                label=NONE if row.label is None else row.label,
                question=row.question,
                answers=row.answers,
                options=row.options,
                moments=np.asarray(row.moments, np.float32).reshape(-1, 2),
                saliency=np.asarray(row.saliency, np.float32),
                boxes=boxes,
                licence=row.licence,
                origin=row.origin,
            ),
        )
    if absent:
        logging.warning("%s/%s: %d rows have no video and are left out", name, split, absent)


def import_tfds() -> Any:
    """TFDS, whose TensorFlow is kept off the accelerators."""
    from vtp_jax.data.workers import import_tensorflow

    import_tensorflow()
    try:
        import tensorflow_datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("TFDS is not installed; pip install 'vtp_jax[tfds]'") from None
    return tensorflow_datasets
