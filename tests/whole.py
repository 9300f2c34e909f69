"""A small run on video files that has lost its training set, for tests of what a run keeps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.configs import ROOT
from vtp_jax.data import shapes, sources, text
from vtp_jax.setup import config
from vtp_jax.train import train

SIDE, LENGTH = 32, 12


class Moved(NamedTuple):
    """A run on files, whose corpus and tokenizer are gone but for three videos, and whose folder
    has moved; two of its captions, their ids, and what the tokenizer decodes them to."""

    workdir: Path
    films: Path
    captions: list[str]
    ids: np.ndarray
    read: list[str]


def make(folder: Path) -> Moved:
    corpus = folder / "corpus"
    shapes.write(corpus, shapes.Plan(train=16, val=8, side=SIDE, frames=8), workers=1)
    clips = sources.load(corpus, corpus / "train.csv").clips
    captions = [caption for clip in clips for caption in clip.captions]
    words = text.train(captions, corpus / "words.model", 120)
    lists = dict(root=str(corpus), list=str(corpus / "train.csv"))
    cfg = config.load(str(ROOT / "configs/demo.py:tiny"))
    data = dict(
        cfg.data,
        kind="files",
        train=lists,
        video=dict(frames=4, stride=2, size=SIDE, crop="centre"),
        evals=dict(val=dict(lists, list=str(corpus / "val.csv"))),
        text=dict(kind="sentencepiece", path=str(corpus / "words.model"), length=LENGTH),
    )
    method = dict(cfg.method, size=(32, 1, 2, 64), decoder=(16, 1, 1, 32), cube=(4, 16, 16))
    train(cfg._replace(steps=1, batch=8, data=data, method=method, evals={}), folder / "run")
    (folder / "films").mkdir()
    for n in range(3):
        (corpus / f"val/{n:05d}.mp4").rename(folder / f"films/{n}.mp4")
    shutil.rmtree(corpus)
    (folder / "run").rename(folder / "elsewhere")
    ids = words.encode(captions[:2], LENGTH)[0]
    return Moved(folder / "elsewhere", folder / "films", captions[:2], ids, words.decode(ids))
