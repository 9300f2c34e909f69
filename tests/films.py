"""Data of a small corpus of films, for the tests of the pipeline."""

import itertools

import numpy as np

from vtp_jax.data import pipeline

ROWS = 12
VIDEO = dict(frames=4, stride=2, size=24)
TEXT = dict(kind="sentencepiece", length=48)
BAD = {3: ("missing", None), 7: ("not_a_video", b"no"), 8: ("not_a_video", b"no")}


def make(root=None, **changes):
    """Data of the files under `root`, or of shapes drawn in memory."""
    given = dict(batch=4, seed=0, video=VIDEO, text=TEXT, workers=2)
    if root is None:
        given |= dict(kind="shapes", train=dict(clips=ROWS, side=32, frames=10))
        given |= dict(evals=dict(val=dict(clips=5, side=32, frames=10)))
    else:
        given |= dict(kind="files", train=dict(root=str(root), list=str(root / "train.json")))
        given |= dict(evals=dict(val=dict(root=str(root), list=str(root / "val.csv"))))
    return pipeline.make(**(given | changes))


def take(data, count, first=0):
    return list(itertools.islice(data.batches(first), count))


def rows_of(counts):
    """Counts of rows, without those of captions (tests/data/test_held_out.py)."""
    return {name: n for name, n in counts.items() if name not in ("captions", "cut")}


def check_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], key)


def from_shards(root, **more):
    return make(root, **{**dict(kind="shards", train=dict(root=str(root)), evals={}), **more})


def mixed(root, **more):
    """The files, three times as often as shapes drawn in memory."""
    files = dict(root=str(root), list=str(root / "train.json"), weight=3.0)
    drawn = dict(kind="shapes", clips=7, side=32, frames=10)
    return make(root, train=dict(mix=dict(files=files, drawn=drawn)), **more)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))
