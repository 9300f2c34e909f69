"""Generated lines against captions, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.evals import caption
from vtp_jax.run import sharding
from vtp_jax.types import State, Stream, UserError

PAD, CLS, SEP = 0, 1, 2
# Two captions of video 0, one of each other.
CAPTIONS = {0: [(5, 6, 7), (8,)], 1: [(5, 5, 9)], 2: [(6,)], 3: [(7, 8)]}
SAID = {0: (8,), 1: (9, 5, 4, 4), 2: (), 3: (8, 7)}
LENGTH = 6


def row(line):
    ids = np.full(LENGTH, PAD, np.int32)
    ids[: len(line) + 2] = [CLS, *line, SEP]
    return ids


def streams(rows, valid=(True, True, True, True)):
    def batches(ids, lines):
        for start in range(0, len(ids), rows):
            part = slice(start, start + rows)
            pad = (0, rows - len(ids[part]))
            text = np.pad(np.stack([row(x) for x in lines[part]]), (pad, (0, 0)))
            yield dict(
                id=np.pad(np.int32(ids[part]), pad, constant_values=-1),
                valid=np.pad(np.asarray([valid[i] for i in ids[part]]), pad),
                text=text,
                maskable=text > SEP,
                video=np.zeros((rows, 1, 1, 1, 3), np.uint8),
            )

    pairs = [(i, line) for i, known in CAPTIONS.items() for line in known]
    ids, lines = zip(*pairs, strict=True)
    return {
        "val": Stream(lambda: batches(list(CAPTIONS), [k[0] for k in CAPTIONS.values()]), 4, {}),
        "val/captions": Stream(lambda: batches(list(ids), list(lines)), len(ids), {}),
    }


TABLE = jnp.asarray(np.stack([row(SAID[i]) for i in range(4)]))


def generate(params, extra, batch):
    return dict(ids=TABLE[batch["id"]])


def run(rows, **more):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    made = caption.make(
        encode=dict(generate=generate), streams=streams(rows, **more), mesh=mesh, stream="val"
    )
    return dict(made.run(State(jnp.zeros((), jnp.int32), {}, None, {})))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_scores_are_those_counted_by_hand(rows):
    found = run(rows)
    assert found["exact"] == 1 / 4
    assert found["f1"] == pytest.approx(np.mean([1, 2 * 2 / (4 + 3), 0, 1]))
    assert found["tokens"] == (1 + 4 + 0 + 2) / 4 and found["n_videos"] == 4


def test_videos_that_could_not_be_read_are_left_out():
    assert run(3, valid=(True, False, False, True)) == dict(
        exact=0.5, f1=1.0, tokens=1.5, n_videos=2, n_left_out=2
    )
    with pytest.raises(UserError, match="no video of 'val' could be read"):
        run(3, valid=(False,) * 4)


def test_saying_nothing_is_never_right(monkeypatch):
    """Not even of a caption whose words are all unknown."""
    monkeypatch.setitem(CAPTIONS, 2, [()])
    assert run(3)["n_videos"] == 3
    monkeypatch.setitem(CAPTIONS, 2, [(), (6,)])
    found = run(3)
    assert (found["n_videos"], found["exact"], found["f1"]) == (4, 1 / 4, run(3)["f1"])


def test_mistakes_are_reported_in_one_line():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match="no stream 'test'; the data has val, val/captions"):
        caption.make(encode={}, streams=streams(3), mesh=mesh, stream="test")
    with pytest.raises(UserError, match="has no encode 'generate'; it has text"):
        caption.make(encode=dict(text=generate), streams=streams(3), mesh=mesh)
