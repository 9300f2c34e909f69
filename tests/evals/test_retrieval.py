"""Retrieval: hand-checked tables, the law of ties, chunking and padding change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtp_jax.evals import retrieval
from vtp_jax.run import sharding
from vtp_jax.types import State, Stream, UserError


def brute_force(texts, videos, owner):
    """The rule in plain loops over sorted lists, in fp64 on values that fp32 holds exactly."""
    scores = texts.astype(np.float64) @ videos.astype(np.float64).T
    t2v = [sorted(-row).index(-row[o]) for row, o in zip(scores, owner, strict=True)]
    v2t = []
    for j in sorted(set(owner.tolist())):
        column = np.sort(-scores[:, j])
        places = [np.where(column == -scores[i, j])[0].mean() for i in np.where(owner == j)[0]]
        v2t.append(min(places))
    return np.array(t2v, float), np.array(v2t)


def on_sphere(rng, rows):
    """Unit rows with entries 0, ±1/2: their products are exact in any order, and often tie."""
    signs = rng.choice([-0.5, 0.5], size=(rows, 4))
    return signs[:, rng.permutation(4)].astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 30),
    block=st.sampled_from([1, 3, 8, 64]),
    seed=st.integers(0, 10**6),
)
def test_rank_in_blocks_is_brute_force_with_ties(m, n, block, seed):
    rng = np.random.default_rng(seed)
    texts, videos = on_sphere(rng, m), on_sphere(rng, n)
    owner = rng.integers(0, n, m)
    ranks = retrieval.rank(texts, videos, owner, block)
    t2v, v2t = brute_force(texts, videos, owner)
    np.testing.assert_array_equal(ranks.t2v, t2v)
    np.testing.assert_array_equal(ranks.v2t, v2t)


@settings(deadline=None, max_examples=20)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 30),
    k=st.integers(1, 6),
    block=st.sampled_from([1, 3, 8, 64]),
    seed=st.integers(0, 10**6),
)
def test_top_in_blocks_is_a_stable_sort(m, n, k, block, seed):
    rng = np.random.default_rng(seed)
    texts, videos = on_sphere(rng, m), on_sphere(rng, n)
    scores, where = retrieval.top(texts, videos, k, block)
    expected = np.argsort(-(texts @ videos.T), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(where, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(texts @ videos.T, expected, 1))


def test_rank_of_random_embeddings_is_the_sorted_position():
    rng = np.random.default_rng(0)
    texts, videos = rng.normal(size=(70, 16)), rng.normal(size=(50, 16))
    texts, videos = texts.astype(np.float32), videos.astype(np.float32)
    owner = rng.integers(0, 50, 70)
    ranks = retrieval.rank(texts, videos, owner, block=32)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (texts, videos)]
    t2v, v2t = brute_force(*unit, owner)
    np.testing.assert_array_equal(ranks.t2v, t2v)
    np.testing.assert_array_equal(ranks.v2t, v2t)


def test_ranks_are_those_checked_by_hand():
    # Three videos on the axes; caption 0 is right, 1 prefers video 0 to its own, 2 is level
    # between 1 and 2, and 3 is a second caption of video 0 that fits it worse than the first.
    videos = np.eye(3, dtype=np.float32)
    texts = np.array([[1, 0, 0], [4, 3, 0], [0, 1, 1], [3, 0, 4]], np.float32)
    ranks = retrieval.rank(texts, videos, np.array([0, 1, 2, 0]))
    assert ranks.t2v.tolist() == [0, 1, 0, 1]
    # Video 0: caption 0 first. Video 1: caption 2 (.71) before its own (.6). Video 2: caption 3
    # (.8) before its own (.71).
    assert ranks.v2t.tolist() == [0, 1, 1]


def test_a_collapsed_encoder_ranks_first_in_t2v_and_in_the_middle_in_v2t():
    """A collapsed encoder: t2v stays optimistic as in the reference, v2t shows it."""
    same = np.repeat(np.random.default_rng(1).normal(size=(1, 24)), 11, 0).astype(np.float32)
    ranks = retrieval.rank(same, same, np.arange(11), block=4)
    assert ranks.t2v.tolist() == [0] * 11
    assert ranks.v2t.tolist() == [5] * 11  # the middle of positions 0..10


def test_the_best_of_several_captions_counts_and_ties_are_averaged():
    videos = np.eye(2, dtype=np.float32)
    texts = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], np.float32)
    ranks = retrieval.rank(texts, videos, np.array([0, 0, 1, 1]))
    assert ranks.t2v.tolist() == [0, 0, 1, 0]
    assert ranks.v2t.tolist() == [1, 0]  # three captions level for video 0: (0 + 1 + 2) / 3


def test_a_video_without_caption_is_in_the_gallery_only():
    videos = np.array([[1, 0], [0, 1]], np.float32)
    ranks = retrieval.rank(np.array([[1, 2]], np.float32), videos, np.array([0]))
    assert ranks.t2v.tolist() == [1] and ranks.v2t.tolist() == [0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_never_helps(bad):
    good = np.eye(4, dtype=np.float32)
    broken = good.copy()
    broken[1] = bad
    # Its own rank is infinite; to the others it counts as one better answer.
    ranks = retrieval.rank(broken, good, np.arange(4))
    assert ranks.t2v.tolist() == [0, np.inf, 0, 0] and ranks.v2t.tolist() == [1, np.inf, 1, 1]
    found = retrieval.summarise("t2v", ranks.t2v, (1, 10), 4)  # more than there are videos
    assert (found["t2v_r1"], found["t2v_r10"], found["t2v_mnr"]) == (0.75, 0.75, 1.75)
    all_bad = np.full((4, 4), bad, np.float32)
    ranks = retrieval.rank(all_bad, all_bad, np.arange(4))
    assert ranks.t2v.tolist() == [np.inf] * 4 and ranks.v2t.tolist() == [np.inf] * 4
    found = retrieval.summarise("v2t", ranks.v2t, (1, 50), 4)
    assert (found["v2t_r50"], found["v2t_gmean"], found["v2t_mdr"]) == (0, 0, 4)


def test_the_summary_is_as_computed_by_hand():
    got = retrieval.summarise("t2v", np.array([0, 0.5, 4, 9, 200.0]), ks=(1, 5))
    assert got == pytest.approx(
        {
            "t2v_r1": 0.4,
            "t2v_r5": 0.6,
            "t2v_gmean": (0.4 * 0.6 * 0.8) ** (1 / 3),
            "t2v_mdr": 5.0,
            "t2v_mnr": 213.5 / 5 + 1,
        }
    )


# Whole evaluators on a net that is a table: the video's first pixel and the caption's first token
# choose a row.


def encode_video(params, extra, batch, rng=None):
    return {"embedding": params["video"][batch["video"][:, 0, 0, 0, 0].astype(jnp.int32)]}


def encode_text(params, extra, batch, rng=None):
    return {"embedding": params["text"][batch["text"][:, 0]]}


ENCODE = {"video": encode_video, "text": encode_text}


def state_of(params):
    return State(jnp.int32(0), params, None, {})


def tables(rows=48, d=8, seed=0):
    rng = np.random.default_rng(seed)
    video = rng.normal(size=(rows, d)).astype(np.float32)
    return {"video": video, "text": video + rng.normal(size=(rows, d)).astype(np.float32)}


def stream_of(ids, rows, *, valid=None, pixels=None, tokens=None, poison=0):
    """A stream in batches of `rows`, padded; what invalid rows hold is `poison`."""
    ids = np.asarray(ids, np.int32)
    valid = np.ones(len(ids), bool) if valid is None else np.asarray(valid)
    short = -len(ids) % rows
    fill = dict(constant_values=poison)

    def batches():
        for start in range(0, len(ids) + short, rows):
            at = slice(start, start + rows)
            ok = np.pad(valid, (0, short))[at]
            batch = {"id": np.pad(ids, (0, short), **fill)[at], "valid": ok}
            if pixels is not None:
                pixel = np.pad(np.asarray(pixels, np.uint8), (0, short), **fill)[at]
                pixel = np.where(ok, pixel, poison).astype(np.uint8)
                batch["video"] = np.broadcast_to(
                    pixel[:, None, None, None, None], (rows, 2, 4, 4, 3)
                )
            if tokens is not None:
                token = np.pad(np.asarray(tokens, np.int32), (0, short), **fill)[at]
                batch["text"] = np.repeat(token[:, None], 3, 1)
            yield batch

    return Stream(batches, len(ids), {})


def mesh_of(devices):
    return sharding.make_mesh(devices=jax.devices()[:devices])


def numbers(streams, params, devices=1, **cfg):
    made = retrieval.make(encode=ENCODE, streams=streams, mesh=mesh_of(devices), block=16, **cfg)
    return dict(made.run(state_of(params)))


def test_the_evaluator_equals_the_pure_functions():
    params = tables()
    got = numbers({"val": stream_of(range(48), 16, pixels=range(48), tokens=range(48))}, params)
    t2v, v2t = brute_force(
        *[x / np.linalg.norm(x, axis=1, keepdims=True) for x in (params["text"], params["video"])],
        np.arange(48),
    )
    expected = {**retrieval.summarise("t2v", t2v), **retrieval.summarise("v2t", v2t)}
    assert {k: v for k, v in got.items() if not k.startswith("n_")} == expected
    assert (got["n_videos"], got["n_captions"], got["n_views"]) == (48, 48, 1)
    assert 0 < got["t2v_r1"] < 1


def test_padding_order_and_batch_size_change_nothing():
    params = tables()
    shuffled = np.random.default_rng(3).permutation(48)
    plain = {"val": stream_of(range(48), 16, pixels=range(48), tokens=range(48))}
    other = {
        "val": stream_of(shuffled, 10, pixels=shuffled, poison=7),
        "val/captions": stream_of(range(48), 7, tokens=range(48), poison=3),
    }
    assert numbers(other, params) == numbers(plain, params)


def test_unreadable_videos_are_left_out_with_their_captions_and_counted():
    params = tables()
    keep = np.arange(48) % 5 != 2
    ids = np.arange(48)[keep]
    without = {
        "val": stream_of(ids, 8, pixels=ids),
        "val/captions": stream_of(ids, 8, tokens=ids),
    }
    failed = {
        "val": stream_of(range(48), 8, pixels=range(48), valid=keep, poison=9),
        "val/captions": stream_of(range(48), 8, tokens=range(48)),
    }
    got, expected = numbers(failed, params), numbers(without, params)
    assert got.pop("n_videos_left_out") == 10 and expected.pop("n_videos_left_out") == 0
    assert got.pop("n_captions_left_out") == 10 and expected.pop("n_captions_left_out") == 0
    assert got == expected


def test_views_are_averaged_before_normalising():
    params = {"video": np.array([[9, 0], [0, 1], [0, 1]], np.float32), "text": np.eye(2)}
    params["text"] = params["text"].astype(np.float32)
    # Video 0 has views 0 and 1: (9, 1) / 2, nearer to caption 0; averaged after normalising it
    # would be level between both captions. Video 1 has view 2 twice.
    video = np.zeros((2, 2, 2, 4, 4, 3), np.uint8)
    video[0, 1], video[1] = 1, 2
    batch = {
        "id": np.arange(2, dtype=np.int32),
        "valid": np.ones(2, bool),
        "video": video,
        "text": np.array([[0], [1]], np.int32),
    }
    streams = {"val": Stream(lambda: iter([batch]), 2, {})}
    embed = retrieval.embedder(encode=ENCODE, streams=streams, mesh=mesh_of(1), stream="val")
    videos, texts = embed(state_of(params))
    np.testing.assert_array_equal(videos.vector, [[4.5, 0.5], [0, 1]])
    assert videos.views == 2
    got = numbers(streams, params)
    assert got["v2t_r1"] == got["t2v_r1"] == 1 and got["n_views"] == 2


def test_the_protocol_states_the_rules():
    streams = {"val": stream_of(range(4), 4, pixels=range(4), tokens=range(4))}
    text = retrieval.make(encode=ENCODE, streams=streams, mesh=mesh_of(1)).protocol
    for word in ("optimistic", "averaged over the tied", "4 videos of 'val'", "fraction"):
        assert word in text


def test_mistakes_are_reported_in_one_line():
    streams = {"val": stream_of(range(4), 4, pixels=range(4), tokens=range(4))}
    with pytest.raises(UserError, match="no stream 'test'; the data has val"):
        numbers(streams, tables(), stream="test")
    with pytest.raises(UserError, match="no encode 'ema/text'; it has text, video"):
        numbers(streams, tables(), text="ema/text")
    none = {"val": stream_of(range(4), 4, pixels=range(4), tokens=range(4), valid=[False] * 4)}
    with pytest.raises(UserError, match="no row that could be read"):
        numbers(none, tables())


def test_one_device_and_eight_agree():
    streams = {
        "val": stream_of(range(48), 16, pixels=range(48)),
        "val/captions": stream_of(range(48), 8, tokens=range(48)),
    }
    one, eight = (numbers(streams, tables(), devices) for devices in (1, 8))
    assert one == eight and 0 < one["t2v_r1"] < 1
