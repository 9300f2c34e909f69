"""Laws of hard negatives and of the matching pairs made with them."""

import jax
import jax.numpy as jnp
import numpy as np

from vtp_jax.objectives import matching

KEYS = tuple(jax.random.split(jax.random.key(0)))


def test_negatives_are_allowed_and_the_most_similar_in_their_own_direction():
    video_like_text = jnp.array([[9.0, 90, 0], [9, 9, 90], [9, 9, 9]])  # video i, text j
    text_like_video = jnp.array([[9.0, 0, 90], [90, 9, 0], [9, 9, 9]])  # text i, video j
    allowed = jnp.array([[False, True, True], [True, False, True], [False, False, False]])
    wrong = matching.hard(KEYS, (video_like_text, text_like_video), allowed)
    assert wrong.video[:2].tolist() == [2, 0] and wrong.text[:2].tolist() == [1, 2]
    assert wrong.asked.tolist() == [True, True, False]


def test_a_third_of_the_pairs_are_positive_and_each_negative_has_one_wrong_half():
    wrong = matching.Wrong(jnp.array([1, 2, 0]), jnp.array([2, 0, 1]), jnp.ones(3, bool))
    rows = jnp.arange(3)
    video, text = matching.triples(wrong, dict(seen=rows), (rows, rows + 10))
    assert video["seen"].tolist() == [0, 1, 2, 1, 2, 0, 0, 1, 2]
    assert text[0].tolist() == [0, 1, 2, 0, 1, 2, 2, 0, 1]
    assert (text[1] == text[0] + 10).all()


def test_a_row_without_a_negative_is_not_counted():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((9, 2)), jnp.float32)
    asked = jnp.array([True, False, True])
    loss, right = matching.scored(logits, asked)
    log_p, label = np.asarray(jax.nn.log_softmax(logits)), np.array([1, 1, 1, 0, 0, 0, 0, 0, 0])
    rows = [i for i in range(9) if asked[i % 3]]
    np.testing.assert_allclose(
        loss.value(), np.mean([-log_p[i, label[i]] for i in rows]), rtol=1e-6
    )
    guess = np.asarray(logits).argmax(axis=1)
    assert right.value() == np.float32(np.mean([guess[i] == label[i] for i in rows]))
    assert loss.count == right.count == 6
