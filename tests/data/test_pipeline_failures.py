"""Videos that cannot be read, and configs that do not fit together."""

import collections
import contextlib
import itertools
import re
import shlex
import time

import numpy as np
import pytest

from tests import worn
from tests.films import BAD, ROWS, TEXT, VIDEO, make, rows_of, take
from vtp_jax import prepare
from vtp_jax.data import collect, shapes, sources
from vtp_jax.run import sharding
from vtp_jax.types import UserError


@pytest.fixture(scope="module", params=["files", "shards"])
def worn_corpus(request, tmp_path_factory):
    """Its kind, its section of a config, and {unreadable clip: cause}."""
    root = tmp_path_factory.mktemp("worn")
    if request.param == "shards":
        return "shards", dict(root=str(worn.write_shards(root, side=32, frames=8))), worn.SHARDS
    worn.write(root, side=32, frames=8)
    given = dict(root=str(root), list=str(root / "train.csv"), max_absent=0.05)
    return "files", given, worn.DAMAGE


def test_counts_of_a_worn_corpus_are_exact(worn_corpus):
    """Files with the default limit, which is the same share: chance alone does not stop a run."""
    kind, train, bad = worn_corpus
    limit = {} if kind == "files" else dict(max_failed=0.2)
    words = dict(TEXT, vocab_size=200)

    def run():
        data = make(kind=kind, train=train, evals=dict(val=train), batch=16, text=words, **limit)
        wrong = [[int(i) for batch in batches for i in batch["id"][~batch["valid"]]]
                 for batches in (take(data, 20), data.streams["val"].batches())]  # fmt: skip
        told = [i for b in data.streams["val/captions"].batches() for i in b["id"][b["valid"]]]
        return data.counts(20), *map(sorted, wrong), told

    counts, trained, shown, told = run()  # two epochs
    assert trained == sorted([*bad] * 2) and shown == sorted(bad)
    causes = {f"failed/{k}": 2 * n for k, n in collections.Counter(bad.values()).items()}
    assert rows_of(counts) == dict(rows=2 * worn.CLIPS, failed=2 * len(bad), **causes)
    # A header is still read where only frames are damaged.
    untold = set() if kind == "files" else set(bad) - {44}
    assert told == [i for i in range(worn.CLIPS) if i not in untold]
    assert run() == (counts, trained, shown, told)


def test_damaged_shards_are_reported_in_the_log(worn_corpus, caplog):
    """And the run stops with a one-line error where they are too many."""
    kind, train, bad = worn_corpus
    with caplog.at_level("WARNING", logger="absl"), pytest.raises(UserError, match="max_failed"):
        take(make(kind=kind, train=train, evals={}, batch=16, max_failed=0.01), 30)
    named = [r.getMessage() for r in caplog.records if "unreadable" in r.getMessage()]
    assert named and len(named) <= len(bad) and all("\n" not in line for line in named)
    if kind == "shards":
        assert any(re.search(r"clip \d+ \(.*\.shard.*\): (missing|damaged)", x) for x in named)


def test_a_mixture_continues_over_damaged_shards(worn_corpus):
    kind, train, bad = worn_corpus
    drawn = dict(kind="shapes", clips=40, side=32, frames=8)
    data = make(kind=kind, train=dict(mix=dict(drawn=drawn, worn=dict(train, weight=4))),
                evals={}, batch=16, max_failed=0.2)  # fmt: skip
    wrong = {int(i) - 40 for batch in take(data, 13) for i in batch["id"][~batch["valid"]]}
    assert wrong == set(bad)


def test_unreadable_rows_keep_their_places(corpus, broken):
    good = take(make(corpus), 9)
    data = make(broken, train=broken_train(broken), max_failed=1.0)
    for a, b in zip(good, take(data, 9), strict=True):
        np.testing.assert_array_equal(b["valid"], ~np.isin(b["id"], list(BAD)))
        assert not b["video"][~b["valid"]].any()
        np.testing.assert_array_equal(a["video"][b["valid"]], b["video"][b["valid"]])
        for key in ("id", "text", "text_mask", "maskable"):
            np.testing.assert_array_equal(a[key], b[key])


def broken_train(root, **more):
    return dict(root=str(root), list=str(root / "train.json"), max_absent=0.1, **more)


def test_counts_are_exact_for_the_batches_that_were_used(broken):
    """However far ahead batches are made; and each name is in the log once."""
    data = make(broken, train=broken_train(broken), max_failed=1.0)
    batches, seen, failed = sharding.Prefetch(data.batches(2), lambda batch: batch), 0, {}
    for step in range(2, 10):
        batch = next(batches)
        seen += 4
        for index in batch["id"][~batch["valid"]]:
            cause = BAD[int(index)][0]
            failed[f"failed/{cause}"] = failed.get(f"failed/{cause}", 0) + 1
        time.sleep(0.01)  # others are made meanwhile
        wanted = dict(rows=seen, failed=sum(failed.values()), **failed)
        assert rows_of(data.counts(step + 1)) == wanted
    batches.close()
    assert failed.keys() == {"failed/missing", "failed/not_a_video"}
    assert data.counts(10) == make_counts(broken, 8)


def make_counts(root, count):
    data = make(root, train=broken_train(root), max_failed=1.0)
    take(data, count, 2)
    return data.counts(2 + count)


def test_failures_are_reported_once(broken, caplog):
    data = make(broken, train=broken_train(broken), max_failed=1.0)
    with caplog.at_level("WARNING", logger="absl"):
        take(data, 9)
    named = [r.getMessage() for r in caplog.records if "unreadable" in r.getMessage()]
    assert len(named) == len(BAD)
    for index, (cause, _) in BAD.items():
        assert sum(f"train/{index:05d}.mp4: {cause}" in line for line in named) == 1


def test_too_many_failures_stop_the_run(broken):
    """3 of 12 fail: allowed at 30 %, not at 24 %, as soon as the third is met."""
    take(make(broken, train=broken_train(broken), max_failed=0.3), 9)
    batches = make(broken, train=broken_train(broken), max_failed=0.24).batches(0)
    told = r"3 of \d+ rows cannot be read \(2 not_a_video, 1 missing\).*max_failed=0.24"
    with pytest.raises(UserError, match=told) as caught:
        list(itertools.islice(batches, 3))  # an epoch
    line = str(caught.value)
    assert "\n" not in line
    for index, (cause, _) in BAD.items():
        assert f"train/{index:05d}.mp4: {cause} (" in line


def test_the_error_has_the_command_that_checks_the_files(broken, capsys):
    batches = make(broken, train=broken_train(broken), max_failed=0.1).batches(0)
    with pytest.raises(UserError) as caught:
        list(itertools.islice(batches, 3))
    _, *words = shlex.split(str(caught.value).partition("This checks all files: ")[2])
    with pytest.raises(SystemExit):
        prepare.main(words[1:])
    found = capsys.readouterr().out
    assert all(f"train/{index:05d}.mp4" in found for index in BAD)


@pytest.mark.parametrize("count", [1, 2, 5, 19, 20, 40])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_one_unreadable_clip_of_several_is_allowed_and_all_are_not(count, share):
    """In as many epochs as one likes; and what fails is named at once."""

    def stops(bad):
        clips = tuple(sources.Clip(f"{k}.mp4", ()) for k in range(count))
        ledger = collect.Ledger(sources.Source("", clips), share)
        codes = np.where(np.arange(count) < bad, 0, collect.GOOD)
        try:
            for epoch in range(30):
                ledger.enter(epoch, np.arange(count), codes, clips, [""] * count)
        except UserError as error:
            return "0.mp4: " in str(error)
        return False

    allowed = max(int(share * count), 1 if share and count > 1 else 0)
    assert [stops(bad) for bad in range(count + 1)] == [bad > allowed for bad in range(count + 1)]


def test_too_many_of_a_large_corpus_stop_a_run_soon():
    """Long before as many clips have failed as may; and chance does not."""
    clips = tuple(sources.Clip(f"{k}", ()) for k in range(100_000))
    causes = np.where(np.arange(100_000) % 50 == 0, 0, collect.GOOD)
    for share, stops in ((0.02, False), (0.01, True)):
        ledger = collect.Ledger(sources.Source("", clips), share)
        told = contextlib.nullcontext() if not stops else pytest.raises(UserError, match="rows")
        with told:
            for start in range(0, 100_000, 500):
                some = slice(start, start + 500)
                ledger.enter(start, np.arange(100_000)[some], causes[some], clips[some], [""] * 500)
        assert ledger.rows == (100_000 if not stops else ledger.rows) and ledger.rows > 100
        assert not stops or ledger.rows < 5000


def test_unreadable_rows_of_a_stream_are_invalid(broken):
    evals = dict(val=broken_train(broken))
    (stream, captions) = make(broken, train=broken_train(broken), evals=evals).streams.values()
    ids = [i for b in stream.batches() for i in b["id"][b["valid"]]]
    assert ids == [i for i in range(ROWS) if i not in BAD] and stream.rows == ROWS
    assert sum(int(b["valid"].sum()) for b in captions.batches()) == ROWS + 2


@pytest.mark.parametrize("error", [KeyError, ValueError, RuntimeError, RecursionError])
def test_whatever_a_clip_raises_is_counted_and_named(monkeypatch, caplog, error):
    """One of many clips does not end a run; if all fail, the error that ends it has the type."""
    real = shapes.read

    def fail(plan, split, index):
        if index == 3 or everything:
            raise error("a mistake")
        return real(plan, split, index)

    monkeypatch.setattr(shapes, "read", fail)
    everything, data = False, make(max_failed=0.2)
    with caplog.at_level("WARNING", logger="absl"):
        batches = take(data, 6)
    assert {int(i) for b in batches for i in b["id"][~b["valid"]]} == {3}
    assert data.counts(6)["failed"] == data.counts(6)["failed/failed"] > 0
    (line,) = [r.getMessage() for r in caplog.records if "unreadable" in r.getMessage()]
    assert error.__name__ in line and "a mistake" in line and "\n" not in line
    everything = True
    with pytest.raises(UserError, match=f"failed.*{error.__name__}"):
        take(make(), 9)


def test_memory_that_is_short_is_counted(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(shapes, "read", fail)
    data = make(max_failed=1.0)
    take(data, 1)
    assert data.counts(1)["failed/too_large"] == 4


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(kind="webdataset"), "data.train: kind='webdataset'.*files, shards"),
        (dict(batch=6, process=(0, 4)), "data.batch=6 does not divide over 4 processes"),
        (dict(eval_batch=6, process=(0, 4)), "data.eval_batch=6 does not divide"),
        (dict(video=dict(frame=4)), "data.video: .*'frame.*it takes frames, stride, size"),
        (
            dict(video=dict(VIDEO, sampling="sparse")),
            "sampling='sparse'; known: windows, segments",
        ),
        (
            dict(video=dict(VIDEO, crop="random")),
            "crop='random'.*known: multiscale",
        ),
        (dict(train=dict(clip=3)), "data.train: .*it takes clips, side"),
        (dict(train=dict(mix=dict(a=dict(clip=3)))), "data.train.mix.a: .*it takes clips, side"),
        (dict(train=dict(mix={}, clips=3)), "data.train.mix takes sets by name"),
        (dict(evals=dict(v=dict(clip=3))), "data.evals.v: .*it takes clips, side"),
        (dict(text=dict(kind="wordpiece", length=8)), "'wordpiece' needs a path"),
        (dict(text=dict(kind="sentencepiece", length=2)), "length=2 leaves no word"),
        (dict(text=dict(TEXT, path="no.model")), "no SentencePiece model 'no.model'"),
    ],
)
def test_mistakes_are_one_line_errors(changes, told):
    with pytest.raises(UserError, match=told) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)
