"""Recognition: views are averaged after the softmax, ties and NaN never help."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.evals import classify
from vtp_jax.run import sharding
from vtp_jax.types import State, Stream, UserError

C, ROWS = 6, 11
STATE = State(jnp.int32(0), {"scale": jnp.float32(3)}, None, {})


def encode(params, extra, batch, rng=None):
    """Logits are in the first pixel rows of a video."""
    logits = batch["video"][:, 0, 0, :C, 0].astype(jnp.float32) * params["scale"]
    return dict(classes=logits, score=jax.nn.softmax(logits))


def data(views=None, seed=0, unreadable=(4,), unlabelled=(7,)):
    rng = np.random.default_rng(seed)
    shape = (ROWS, 1, 1, C, 3) if views is None else (ROWS, views, 1, 1, C, 3)
    video, label = rng.integers(0, 3, shape).astype(np.uint8), rng.integers(0, C, ROWS)
    valid = ~np.isin(np.arange(ROWS), unreadable)
    label[list(unlabelled)] = -1
    return dict(video=video, label=label.astype(np.int32), valid=valid)


def run(batch, rows=4, devices=1, state=STATE, **cfg):
    def batches():
        for start in range(0, ROWS, rows):
            part = {k: v[start : start + rows] for k, v in batch.items()}
            short = rows - len(part["valid"])
            yield {k: np.pad(v, [(0, short)] + [(0, 0)] * (v.ndim - 1)) for k, v in part.items()}

    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    streams = {"val": Stream(batches, ROWS, {})}
    made = classify.make(
        encode={"classes": encode, "answer": encode}, streams=streams, mesh=mesh, **cfg
    )
    return dict(made.run(state)), made.protocol


@pytest.mark.parametrize("views", [None, 1, 5])
def test_scores_are_those_of_plain_sorting_in_numpy(views):
    batch = data(views)
    logits = 3.0 * batch["video"][..., 0, 0, :, 0].astype(np.float64)
    score = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    score = score if views is None else score.mean(axis=1)
    known = batch["valid"] & (batch["label"] >= 0)
    order = np.argsort(-score.round(6), axis=1, kind="stable")[known]
    hit = order == batch["label"][known][:, None]
    found, protocol = run(batch)
    assert found["top1"] == pytest.approx(hit[:, 0].mean())
    assert found["top5"] == pytest.approx(hit[:, :5].any(axis=1).mean())
    labels = batch["label"][known]
    each = [hit[labels == c, 0].mean() for c in np.unique(labels)]
    assert found["class_mean"] == pytest.approx(np.mean(each))
    assert (found["n_videos"], found["n_left_out"], found["n_unlabelled"]) == (9, 2, 1)
    assert found["n_views"] == (views or 1) and "'val'" in protocol


def test_numbers_of_devices_and_batch_sizes_change_nothing():
    batch = data(3)
    assert run(batch)[0] == run(batch, rows=8, devices=8)[0] == run(batch, rows=16)[0]


def test_the_rank_counts_the_classes_before_the_right_one():
    nan = np.nan
    score = np.array(
        [[0.1, 0.6, 0.3], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [nan, 0.9, 0.1], [1, nan, 0]]
    )
    assert classify.rank(score, np.array([2, 0, 1, 1, 1])).tolist() == [
        1,
        0,
        1,
        1,
        classify.NEVER,
    ]
    for label in (3, 4, 7, 2**30):  # the head has no such class
        assert classify.rank(score[:1], np.array([label])).tolist() == [classify.NEVER]
    flat = np.zeros((5, 5))  # a collapsed net is right by chance
    assert classify.rank(flat, np.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_what_cannot_be_right_is_not_right_in_any_top_k():
    """Scores that are not numbers, and labels beyond the head, where k exceeds the classes."""
    batch = data(unreadable=(), unlabelled=())
    batch["label"] = np.where(np.arange(ROWS) < 4, C + 1, batch["label"]).astype(np.int32)
    found, _ = run(batch, ks=(1, 100))
    assert found["top100"] == pytest.approx(7 / 11) and found["n_videos"] == 11
    odd = STATE._replace(params={"scale": jnp.float32(np.nan)})
    found, _ = run(batch, state=odd, ks=(1, 5, 100))
    assert found["top1"] == found["top5"] == found["top100"] == found["class_mean"] == 0


def test_answers_outside_the_list_are_wrong_and_counted():
    """A dataset numbers them after the last one; questions are not called videos."""
    batch = data()
    inside, _ = run(batch)
    batch["label"] = np.where(np.isin(np.arange(ROWS), (0, 1, 4)), C, batch["label"])
    found, protocol = run(batch, classes="answer")
    assert (found["n_questions"], found["n_outside"], found["n_left_out"]) == (9, 2, 2)
    assert inside["n_outside"] == 0 and "n_videos" not in found
    rest = dict(batch, valid=batch["valid"] & (batch["label"] != C))
    assert found["top1"] == pytest.approx(run(rest)[0]["top1"] * 7 / 9)
    assert found["class_mean"] == run(rest)[0]["class_mean"]  # of the answers in the list
    assert "questions of 'val'" in protocol and "Answers outside the list are wrong" in protocol
    assert "videos of" not in protocol


def test_mistakes_are_reported_in_one_line():
    with pytest.raises(UserError, match="no stream 'test'; the data has val"):
        run(data(), stream="test")
    with pytest.raises(UserError, match="no encode 'words'; it has answer, classes"):
        run(data(), classes="words")
    bare = data()
    del bare["label"]
    with pytest.raises(UserError, match="stream 'val' has no 'label'"):
        run(bare)
    with pytest.raises(UserError, match="no row of 'val' could be read"):
        run(data(unreadable=range(ROWS)))
