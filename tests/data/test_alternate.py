"""Sources of different structure take turns: whose turn it is depends on (seed, step) alone."""

import collections
import itertools

import numpy as np
import pytest

from tests.films import rows_of
from vtp_jax.data import alternate, pipeline, shapes
from vtp_jax.types import UserError, check_batch

SHAPES = dict(side=32, frames=8)
IMAGE = dict(frames=1, stride=1)


def make(**changes):
    images = dict(clips=6, label="colour", caption="class", seed=1, **SHAPES)
    given = dict(
        kind="shapes", batch=4, seed=0, train=dict(clips=10, label="shape", **SHAPES), turns=2,
        also=dict(images=dict(train=images, video=IMAGE, batch=2)),
        video=dict(frames=4, stride=2, size=24), text=dict(kind="sentencepiece", length=24),
    )  # fmt: skip
    return pipeline.make(**(given | changes))


def take(data, count, first=0):
    return list(itertools.islice(data.batches(first), count))


@pytest.mark.parametrize("turns", [(1, 1), (4, 1), (2, 3, 1)])
def test_every_round_has_each_sources_turns_in_a_new_order(turns):
    n = sum(turns)
    who = [alternate.turn(turns, 0, step) for step in range(20 * n)]
    rounds = [tuple(k for k, _ in who[i : i + n]) for i in range(0, len(who), n)]
    assert all(tuple(one.count(k) for k in range(len(turns))) == turns for one in rounds)
    assert len(set(rounds)) > 1
    had = collections.Counter()
    for k, before in who:
        assert before == [had[i] for i in range(len(turns))]
        had[k] += 1


def test_each_source_keeps_its_own_order():
    data = make()
    batches = take(data, 9)
    for batch in batches:
        check_batch(batch)
    kinds = [b["video"].shape for b in batches]
    clips, image = (4, 4, 24, 24, 3), (2, 1, 24, 24, 3)
    assert collections.Counter(kinds) == {clips: 6, image: 3}
    assert data.spec["video"].shape == clips and data.rows == 16
    by_kind = {
        s: np.concatenate([b["id"] for b in batches if b["video"].shape == s]) for s in kinds
    }
    assert sorted(by_kind[clips][:10]) == list(range(10))
    assert sorted(by_kind[image]) == list(range(10, 16))  # ids continue from one to the next
    alone = take(make(also=None), 6)
    for a, b in zip((b for b in batches if b["video"].shape == clips), alone, strict=True):
        np.testing.assert_array_equal(a["video"], b["video"])


def test_classes_are_numbered_across_sources():
    data, plan = make(), shapes.Plan(train=10, seed=0)
    own = [clip.label for clip in shapes.source(plan, "train", "shape").clips]
    first = max(own) + 1
    for batch in take(data, 6):
        if len(batch["id"]) == 4:
            assert batch["label"].tolist() == [own[i] for i in batch["id"]]
        else:
            assert (batch["label"] >= first).all()
    assert data.facts["labels"] > first


def test_an_evaluation_has_the_classes_of_its_training_source():
    held = dict(clips=6, label="colour", caption="class", **SHAPES)
    data = make(evals=dict(images=dict(of="images", **held), own=held))
    first = min(int(b["label"].min()) for b in take(data, 6) if len(b["id"]) == 2)
    for (moved, there), (own, here) in zip(
        *(
            zip(data.streams[s].batches(), [data.streams[s].table["label"]] * 9, strict=False)
            for s in ("images", "own")
        ),
        strict=True,
    ):
        shift = there[0] - here[0]
        assert 0 < shift <= first and there == [k + shift for k in here]
        want = np.where(own["label"] < 0, own["label"], own["label"] + shift)
        np.testing.assert_array_equal(moved["label"], want)
        assert moved["label"].dtype == np.int32 and (moved["id"] == own["id"]).all()


def test_any_step_can_be_the_first():
    batches = take(make(), 8)
    for first in (1, 4, 5):
        for a, b in zip(batches[first:], take(make(), 3, first), strict=False):
            assert a.keys() == b.keys()
            for key in a:
                np.testing.assert_array_equal(a[key], b[key], key)


def test_rows_are_counted_over_all_sources():
    data = make()
    for first in (0, 4):  # a whole round, and from within one; a batch more was made than is used
        rows = [len(b["id"]) for b in take(data, 4, first)][:3]
        assert rows_of(data.counts(first + 3)) == dict(rows=sum(rows), failed=0)
        assert set(rows) == {4, 2}


def test_one_tokenizer_has_the_words_of_all_sources():
    data = make()
    told = {" ".join(data.decode(b["text"])) for b in take(data, 3) if len(b["id"]) == 2}
    assert any(word in " ".join(told) for word in ("video", "this", "seen"))


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(also=dict(images=dict(trian={}))), "data.also.images: .*'train'"),
        (
            dict(also=dict(images=dict(train=dict(clips=2), video=dict(crop="x")))),
            "images.video.crop",
        ),
        (dict(train=dict(clips=4, caption="class")), "caption='class' needs a label"),
        (dict(evals=dict(val=dict(of="pictures", clips=2))), "evals.val.of: .*also has images"),
        (
            dict(train=dict(clips=4, caption="question", label="size")),
            "caption='question' has its own labels",
        ),
        (dict(train=dict(clips=4, caption="rhyme")), "caption='rhyme'; known: attributes"),
    ],
)
def test_mistakes_are_one_line_errors(changes, told):
    with pytest.raises(UserError, match=told):
        make(**changes)


def test_labels_of_questions_are_their_answers():
    source = shapes.source(shapes.Plan(train=60), "train", caption="question")
    asked = set()
    for index, clip in enumerate(source.clips):
        attributes, _ = shapes.describe(0, "train", index)
        assert clip.label is not None
        name, value = shapes.ANSWERS[clip.label]
        assert clip.captions == (shapes.QUESTIONS[name],) and getattr(attributes, name) == value
        asked.add(name)
    assert asked == set(shapes.ATTRIBUTES)


def test_prompts_have_a_word_of_their_class_and_of_no_other():
    source = shapes.source(shapes.Plan(train=40), "train", "motion", "class")
    words = [tuple(doing for _, doing in forms) for forms in shapes.MOTIONS.values()]
    for clip in source.clips:
        assert [any(w in clip.captions[0] for w in one) for one in words].index(True) == clip.label
