"""Laws of the random augmentation on the device for recognition: views, erased boxes, mixup and
CutMix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax import augment
from vtp_jax.objectives.classification import smooth
from vtp_jax.types import UserError

B, T, H, W, K = 6, 2, 24, 32, 5
KEYS = jax.random.split(jax.random.key(0), 200)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def clips():
    """Row i is i / 10 everywhere, of class i mod 5."""
    level = np.arange(B, dtype=np.float32) / 10
    video = np.tile(level[:, None, None, None, None], (1, T, H, W, 3))
    return video, np.eye(K, dtype=np.float32)[np.arange(B) % K], np.ones(B, bool)


def mixes(keys, **how):
    """(clips, targets) for each of the keys."""
    rows = tuple(map(jnp.asarray, clips()))
    mixed = jax.jit(jax.vmap(lambda key: augment.mix(key, *rows, **how)))(keys)
    return zip(*map(np.asarray, mixed), strict=True)


def test_views_become_rows_with_the_other_keys_repeated():
    video = jnp.arange(2 * 3 * T).reshape(2, 3, T, 1, 1, 1)
    batch = dict(video=video, label=jnp.array([7, 8]), valid=jnp.array([True, False]))
    rows = augment.views_as_rows(batch)
    assert (rows["video"] == video.reshape(6, T, 1, 1, 1)).all()
    assert rows["label"].tolist() == [7, 7, 7, 8, 8, 8]
    assert rows["valid"].tolist() == [True] * 3 + [False] * 3
    assert augment.views_as_rows(rows) is rows


def test_whole_clips_are_flipped():
    video = np.random.default_rng(0).uniform(size=(40, T, H, W, 3)).astype(np.float32)
    flip = jax.jit(augment.flip, static_argnums=2)
    turned = np.asarray(flip(KEYS[1], video, 0.5))
    for before, after in zip(video, turned, strict=True):
        assert (after == before).all() or (after == before[:, :, ::-1]).all()
    share = float((turned == video).all(axis=(1, 2, 3, 4)).mean())
    assert 0.2 < share < 0.8
    assert (np.asarray(flip(KEYS[1], video, 1.0)) == video[:, :, :, ::-1]).all()


def test_one_box_of_a_clip_is_erased_with_noise():
    """One box in all frames, of 2 % to a third of the area, has normalised noise; all other pixels
    are unchanged."""
    side = 64
    video = np.full((200, T, side, side, 3), 0.3, np.float32)
    erase = jax.jit(augment.erase, static_argnums=(2, 3, 4))
    erased = np.asarray(erase(KEYS[0], video, 0.5, MEAN, STD))
    changed = (erased != video).any(axis=-1)
    assert (changed == changed[:, :1]).all()
    hit = changed[:, 0].any(axis=(1, 2))
    assert 0.35 < hit.mean() < 0.65
    for mask in changed[hit, 0]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert (
            mask[rows[0] : rows[0] + h, columns[0] : columns[0] + w].all() and mask.sum() == h * w
        )
        assert 0.01 < h * w / side**2 < 0.35 and 0.2 < h / w < 4.5
    noise = (erased[changed] - MEAN) / STD
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert (np.asarray(erase(KEYS[0], video, 0.0, MEAN, STD)) == video).all()


def test_mixup_blends_rows_of_the_reversed_batch_and_their_targets_alike():
    video, target, _ = clips()
    shares = []
    for mixed, said in mixes(KEYS[:60], mixup=0.2, cutmix=5.0, switch=0.0):
        share = float(said[1, 1])  # rows 1 and 4 are of classes 1 and 4
        np.testing.assert_allclose(mixed, share * video + (1 - share) * video[::-1], atol=1e-6)
        np.testing.assert_allclose(said, share * target + (1 - share) * target[::-1], atol=1e-6)
        shares.append(share)
    # Beta(.2, .2) is nearly all at the ends; with CutMix's alpha of 5 nothing would be.
    spread = np.asarray(shares)
    assert abs(spread.mean() - 0.5) < 0.15 and (np.abs(spread - 0.5) > 0.35).mean() > 0.5


def test_cutmix_pastes_a_box_and_weights_targets_by_the_area_left():
    video, target, _ = clips()
    shares = []
    for mixed, said in mixes(KEYS[:60], mixup=0.2, cutmix=5.0, switch=1.0):
        pasted = np.asarray(mixed[1] != video[1]).all(axis=-1)
        assert (pasted == pasted[:1]).all()
        share = 1 - pasted[0].mean()
        shares.append(share)
        np.testing.assert_allclose(said, share * target + (1 - share) * target[::-1], atol=1e-6)
        want = np.where(pasted[..., None], video[4], video[1])
        np.testing.assert_allclose(mixed[1], want, atol=1e-6)
        if pasted.any():
            rows, columns = (np.flatnonzero(pasted[0].any(axis=a)) for a in (1, 0))
            assert pasted[0].sum() == len(rows) * len(columns)
    # Beta(5, 5) is about a half; with mixup's alpha of .2 most boxes would be all or nothing. A box
    # that is cut off at the borders leaves more.
    assert np.mean([0.3 < share < 0.95 for share in shares]) > 0.8


def test_switch_and_probability_are_proportions_of_batches():
    video, target, _ = clips()
    levels = [np.unique(x[0]).size for x, _ in mixes(KEYS, mixup=0.8, cutmix=1.0)]
    assert 70 < sum(n == 1 for n in levels) < 140  # blended, or a box too small to hold a pixel
    mixed = [not (x == video).all() for x, _ in mixes(KEYS, mixup=0.8, prob=0.3)]
    assert 35 < sum(mixed) < 85
    ((same, wanted),) = mixes(KEYS[:1])
    assert (same == video).all() and (wanted == target).all()


@pytest.mark.parametrize("how", [dict(mixup=0.8), dict(cutmix=1.0)])
def test_a_row_without_a_valid_partner_is_unchanged_and_mixed_into_no_other(how):
    video, target, valid = clips()
    lost, some = video.copy(), valid.copy()
    lost[1], some[1] = np.nan, False
    mix = jax.jit(lambda *args: augment.mix(KEYS[3], *args, **how))
    rows, said = map(np.asarray, mix(lost, target, some))
    assert (rows[4] == video[4]).all() and (said[4] == target[4]).all()
    whole, wanted = map(np.asarray, mix(video, target, valid))
    for i in (0, 2, 3, 5):
        assert (rows[i] == whole[i]).all() and (said[i] == wanted[i]).all()


def test_each_group_mixes_its_own_rows_with_its_own_draws():
    video, target, _ = clips()
    for mixed, said in mixes(KEYS[:10], mixup=0.8, groups=3):
        level, was = mixed[:, 0, 0, 0, 0], video[:, 0, 0, 0, 0]
        shares = (level - was[[1, 0, 3, 2, 5, 4]]) / np.array([-1, 1, -1, 1, -1, 1]) * 10
        np.testing.assert_allclose(shares[::2], shares[1::2], atol=1e-5)
        assert len({round(float(s), 4) for s in shares}) == 3
        np.testing.assert_allclose(said.sum(axis=1), 1, atol=1e-6)
    with pytest.raises(UserError, match="a batch of 6 rows does not divide into groups=4"):
        mixes(KEYS[:1], mixup=0.8, groups=4)


def test_smoothing_spreads_a_share_of_the_target_over_all_classes():
    assert (smooth(jnp.array([2, 0]), 3) == jnp.array([[0, 0, 1.0], [1, 0, 0]])).all()
    np.testing.assert_allclose(smooth(jnp.array([1]), 4, 0.1), [[0.025, 0.925, 0.025, 0.025]])
