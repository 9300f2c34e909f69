"""What numbers are of: whether they are zero-shot follows from what the net was trained on."""

import json

import pytest

from vtp_jax.setup import config, subjects
from vtp_jax.setup.subjects import Part
from vtp_jax.types import Evaluator

CHECK = Evaluator(lambda state: iter(()), "the rule")


def files(root, list, **more):
    return dict(root=root, list=list, **more)


def make(train, test, type="retrieval", task=None, warm_start=(), overrides=(), **more):
    """The subject of an evaluator of `test` in a run on `train`."""
    data = dict(kind="files", train=train, evals=dict(test=test), video=dict(frames=8), **more)
    cfg = config.Config(
        seed=0, steps=1, batch=8, data=data, method={}, optim={}, mesh={}, sharding=(),
        evals=dict(a=dict(type=type, stream="test", every=3)), checkpoint={}, log={},
        task=task, warm_start=warm_start,
    )  # fmt: skip
    return subjects.subject(cfg, "a", CHECK, overrides)


A_TRAIN, A_TEST = files("data/a", "data/a/train.csv"), files("data/a", "data/a/test.csv")
B_TEST = files("data/b", "lists/b.csv")


def test_a_subject_names_its_set_split_and_rule():
    of = make(A_TRAIN, B_TEST)
    assert (of.evaluator, of.type, of.stream, of.set, of.split) == (
        *("a", "retrieval", "test", "data/b"),
        "lists/b.csv",
    )
    assert of.protocol.startswith("'test' is data/b, lists/b.csv. The net was trained on data/a")
    assert of.protocol.endswith("not on this set: zero-shot. The rule.")


@pytest.mark.parametrize("task", [None, dict(name="retrieve")])
def test_a_set_whose_training_half_was_seen_is_never_zero_shot(task):
    of = make(A_TRAIN, A_TEST, task=task)
    assert "on train.csv of this set: not zero-shot." in of.protocol
    assert ("fine-tuned (task retrieve)" in of.protocol) == bool(task)
    assert ": zero-shot" not in of.protocol
    # It is a matter of training data, wherever they are among the sources of a run.
    mixed = dict(mix=dict(one=B_TEST, two=dict(A_TRAIN, weight=2.0)))
    also = dict(also=dict(more=dict(train=A_TRAIN)))
    for of in (make(mixed, A_TEST, task=task), make(B_TEST, A_TEST, task=task, **also)):
        assert "not zero-shot" in of.protocol and "train.csv" in of.protocol


def test_only_retrieval_is_called_zero_shot():
    for kind in ("mean", "classify", "probe", "caption"):
        for train in (A_TRAIN, B_TEST):
            assert "zero-shot" not in make(train, A_TEST, kind).protocol


def test_rows_that_were_trained_on_are_called_so():
    assert "these very rows, which are not held out" in make(A_TRAIN, A_TRAIN).protocol


def test_weights_from_elsewhere_may_have_seen_the_set(tmp_path):
    def run(name, train, **more):
        path = tmp_path / name
        path.mkdir()
        text = json.dumps(dict(data=dict(kind="files", train=train), **more))
        (path / "config.json").write_text(text)
        return [(str(path), "(.*)", r"\1")]

    unknown = make(B_TEST, A_TEST, warm_start=[("weights/x.npz", "a", "b")])
    assert "not known here" in unknown.protocol and "weights/x.npz" in unknown.protocol
    assert "zero-shot" not in unknown.protocol
    first = run("first", A_TRAIN)
    assert "not zero-shot" in make(B_TEST, A_TEST, warm_start=first).protocol
    second = run("second", B_TEST, warm_start=first)
    assert "not zero-shot" in make(B_TEST, A_TEST, warm_start=second).protocol
    third = run("third", files("data/c", "c.csv"))
    assert "not on this set: zero-shot." in make(B_TEST, A_TEST, warm_start=third).protocol
    itself = run("itself", B_TEST, warm_start=[(str(tmp_path / "itself"), "a", "b")])
    assert "not known here" in make(B_TEST, A_TEST, warm_start=itself).protocol


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("data/a", "data/a/", True),
        ("data/k400/train", "data/k400/val", True),
        ("shards/a_train", "shards/a-val", True),
        ("shards/msrvtt_train_9k", "data/msrvtt", True),
        ("msrvtt", "msrvtt_qa", True),
        ("data/a", "data/ab", False),
        ("data/webvid", "data/msrvtt", False),
    ],
)
def test_sets_are_known_by_folder_or_name(a, b, same):
    assert subjects.same_set(a, b) == subjects.same_set(b, a) == same


@pytest.mark.parametrize(
    "kind, section, part",
    [
        ("files", A_TEST, ("data/a", "test.csv")),
        ("files", files("data/a", "elsewhere/x.csv"), ("data/a", "elsewhere/x.csv")),
        ("files", dict(root="data/a", captions="data/a/old.csv"), ("data/a", "old.csv")),
        ("shards", dict(root="shards/a"), ("shards/a", "")),
        ("sets", dict(set="msvd", split="test", root="x"), ("msvd", "test")),
        ("shapes", dict(clips=3, seed=2), ("moving shapes", "held-out clips of seed 2")),
        ("sets", dict(A_TEST, kind="files"), ("data/a", "test.csv")),
        (
            "files",
            dict(mix=dict(a=A_TEST, b=dict(root="b", list=""))),
            ("data/a, test.csv + b", ""),
        ),
    ],
)
def test_parts_of_sets_are_named(kind, section, part):
    assert subjects.part_of(kind, section) == Part(*part)


def test_settings_are_what_decides_the_numbers():
    """Those of training and of evaluate are equal, wherever the workdir and its tokenizer are."""
    of = make(A_TRAIN, A_TEST, text=dict(length=8, path="a"))
    assert of.settings == make(A_TRAIN, A_TEST, text=dict(length=8, path="b")).settings
    assert "every" not in of.settings["evaluator"]
    others = [
        make(A_TRAIN, B_TEST, text=dict(length=8)),
        make(A_TRAIN, A_TEST, text=dict(length=9)),
        make(A_TRAIN, A_TEST, text=dict(length=8), overrides=["--config.method.x=1"]),
        make(A_TRAIN, A_TEST, "rerank", text=dict(length=8)),
    ]
    assert all(other.settings != of.settings for other in others)
    same = ["--config.data.evals.test.list=data/a/test.csv"]  # which the section itself shows
    assert make(A_TRAIN, A_TEST, text=dict(length=8), overrides=same).settings == of.settings
