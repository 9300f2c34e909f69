"""Classification by nearest neighbours: against a plain loop, in batches of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.evals import probe
from vtp_jax.run import sharding
from vtp_jax.types import State, Stream, UserError

STATE = State(jnp.int32(0), {"scale": jnp.float32(2)}, None, {})
RNG = np.random.default_rng(0)
LABEL = np.repeat(np.arange(3), 5).astype(np.int32)
VECTOR = (np.eye(3)[LABEL] + 0.6 * RNG.standard_normal((15, 3))).astype(np.float32)


def encode(params, extra, batch, rng=None):
    return {"embedding": params["scale"] * batch["video"][:, 0, 0, 0]}


def stream(rows, label=LABEL, vector=VECTOR, views=()):
    def batches():
        for start in range(0, len(label), rows):
            part = slice(start, start + rows)
            pad = rows - len(label[part])
            video = np.pad(vector[part], ((0, pad), (0, 0)), constant_values=np.nan)
            video = np.broadcast_to(video[:, None, None, None], (rows, 1, 1, 1, 3))
            if views:
                video = np.stack([video + d for d in (-0.1, 0.1)], axis=1)
            yield dict(
                video=video,
                label=np.pad(label[part], (0, pad), constant_values=-1),
                valid=np.pad(label[part] != 2, (0, pad)),
            )

    return Stream(batches, len(label), {})


def run(streams, **cfg):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    made = probe.make(encode={"video": encode}, streams=streams, mesh=mesh, block=8, **cfg)
    return dict(made.run(STATE))


def oracle(query, label, rows, classes, k, itself):
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, rows)]
    cosine = unit[0] @ unit[1].T
    right = 0
    for i, row in enumerate(cosine):
        order = [j for j in np.argsort(-row) if not (itself and i == j)][:k]
        votes = np.zeros(4)
        for j in order:
            votes[classes[j]] += np.exp(row[j] / 0.07)
        right += votes.argmax() == label[i]
    return right / len(query)


@pytest.mark.parametrize("rows", [4, 15, 20])
@pytest.mark.parametrize("views", [(), (2,)])
def test_classes_by_neighbours_among_the_other_rows_are_those_of_a_plain_loop(rows, views):
    found = run({"val": stream(rows, views=views)}, ks=(1, 4, 50))
    kept = LABEL != 2
    query, label = VECTOR[kept], LABEL[kept]
    for k in (1, 4, 9):
        name = "knn50" if k == 9 else f"knn{k}"
        assert found[name] == pytest.approx(oracle(query, label, query, label, k, True))
    assert (found["n_videos"], found["n_gallery"], found["n_left_out"]) == (10, 10, 5)
    assert found["chance"] == 0.5


def test_classes_by_neighbours_in_a_gallery_are_those_of_a_plain_loop():
    gallery = VECTOR + 0.3 * RNG.standard_normal(VECTOR.shape).astype(np.float32)
    streams = {"val": stream(4), "train": stream(6, vector=gallery)}
    found = run(streams, gallery="train", ks=(3,))
    kept = LABEL != 2
    expected = oracle(VECTOR[kept], LABEL[kept], gallery[kept], LABEL[kept], 3, False)
    assert found["knn3"] == pytest.approx(expected)


def test_equal_embeddings_are_at_chance():
    label = np.arange(12, dtype=np.int32) % 2
    found = run({"val": stream(4, label, np.ones((12, 3), np.float32))}, ks=(1, 3))
    assert found["knn1"] <= 0.6 and found["n_videos"] == 12


def test_what_is_not_a_number_is_never_right_and_has_no_vote():
    label = np.zeros(12, np.int32)
    vector = np.eye(12, 3, dtype=np.float32) + 1
    for bad in (np.nan, np.inf):
        broken = np.where(np.arange(12)[:, None] < 3, np.float32(bad), vector)
        found = run({"val": stream(4, label, broken)}, ks=(1, 20))
        assert found["knn1"] == found["knn20"] == 0.75 and found["n_videos"] == 12
        whole = np.full((12, 3), bad, np.float32)
        streams = {"val": stream(4, label, vector), "train": stream(4, label, whole)}
        assert run(streams, gallery="train", ks=(1,))["knn1"] == 0


def test_what_is_missing_is_reported():
    with pytest.raises(UserError, match="no stream 'train'; the data has val"):
        run({"val": stream(4)}, gallery="train")
    with pytest.raises(UserError, match="no encode 'text'; it has video"):
        run({"val": stream(4)}, video="text")
    bare = Stream(lambda: iter([dict(video=VECTOR, valid=LABEL == 0)]), 15, {})
    with pytest.raises(UserError, match="stream 'val' has no 'label'"):
        run({"val": bare})
