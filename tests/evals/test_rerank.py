"""Re-ranking against the ranks from the whole matrix of scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.evals import rerank, retrieval
from vtp_jax.run import sharding
from vtp_jax.types import State, Stream, UserError

N, D = 23, 5
DRAW = np.random.default_rng(0)
VIDEOS, TEXTS = (DRAW.standard_normal((N + k, D)).astype(np.float32) for k in (0, 6))
OWNER = np.concatenate([np.arange(N), DRAW.integers(0, N, 6)])
W = DRAW.standard_normal((D, D)).astype(np.float32)


def stream(ids, vectors, batch=8):
    """Batches whose `weight` points to a row of `vectors`; the last one is padded."""

    def batches():
        for i in range(0, len(ids), batch):
            rows = np.arange(i, i + batch)
            yield dict(
                valid=rows < len(ids),
                id=np.asarray(np.append(ids, [-1] * batch)[rows], np.int32),
                weight=np.minimum(rows, len(ids) - 1).astype(np.float32),
            )

    return Stream(batches, len(ids), {})


def encode(vectors):
    def f(params, extra, batch, rng=None):
        x = jnp.asarray(vectors)[batch["weight"].astype(jnp.int32)]
        return dict(embedding=x, memory=dict(x=x), mask=jnp.ones((len(x), 1), bool))

    return f


def pair(params, extra, video, text, rng=None):
    score = ((video["memory"]["x"] @ params["w"]) * text["memory"]["x"]).sum(axis=1)
    return dict(score=score)


ENCODE = dict(video=encode(VIDEOS), text=encode(TEXTS), pair=pair)


def run(devices=1, **changes):
    mesh = sharding.make_mesh(data=devices, devices=jax.devices()[:devices])
    streams = {"val": stream(np.arange(N), VIDEOS), "val/captions": stream(OWNER, TEXTS)}
    given = dict(encode=ENCODE, streams=streams, mesh=mesh, k=4, block=16) | changes
    state = State(jnp.zeros((), jnp.int32), dict(w=jnp.asarray(W)), {}, {})
    return dict(rerank.make(**given).run(state))


def expected(k):
    """Ranks by the rule, from whole matrices."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (TEXTS, VIDEOS)]
    cosine, score = unit[0] @ unit[1].T, TEXTS @ (VIDEOS @ W).T

    def ranks(cosine, score, own):
        found = []
        for c, s, mine in zip(cosine, score, own, strict=True):
            order = np.argsort(-c, kind="stable")
            order[:k] = sorted(order[:k], key=lambda j: -s[j])
            found.append(min(np.flatnonzero(mine[order])))
        return np.asarray(found, float)

    own = OWNER[:, None] == np.arange(N)
    return ranks(cosine, score, own), ranks(cosine.T, score.T, own.T)


@pytest.mark.parametrize("k", [1, 4, 40])
def test_ranks_are_those_of_the_whole_matrix(k):
    found = run(k=k)
    for name, ranks in zip(("t2v", "v2t"), expected(k), strict=True):
        for key, value in retrieval.summarise(name, ranks, (1, 5, 10)).items():
            assert found[key] == pytest.approx(value), key
    assert found["n_videos"] == N and found["n_captions"] == N + 6


def test_blocks_and_devices_change_nothing():
    assert run(block=8) == run(devices=8, block=32) == run()


def test_with_one_candidate_the_order_is_that_of_cosines():
    plain = retrieval.rank(TEXTS, VIDEOS, OWNER)
    assert run(k=1)["t2v_mnr"] == pytest.approx(float(np.mean(plain.t2v)) + 1)


def test_a_nan_score_is_never_right():
    nan = np.nan
    scores = np.array([[nan, 1.0, 2.0], [nan, nan, nan], [nan, nan, 0.0], [nan, 2.0, nan]])
    own = np.array([[True, False, False], [False, True, False], [False, True, True], [True] * 3])
    assert rerank.place(scores, own).tolist() == [np.inf, np.inf, 0, 0]


def test_a_verb_that_the_method_lacks_is_reported():
    with pytest.raises(UserError, match="no encode 'pair'; it has text, video"):
        run(encode={k: v for k, v in ENCODE.items() if k != "pair"})
