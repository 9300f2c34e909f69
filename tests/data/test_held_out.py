"""Sets of which a share is held out by the hash of their paths; folders without a list; captions
that are cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtp_jax import prepare
from vtp_jax.data import pipeline, shapes, sources
from vtp_jax.data.open import fraction, open_set
from vtp_jax.types import UserError

PLAN = shapes.Plan(train=24, val=2, side=32, frames=4)
SHARE = 0.4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("held") / "videos"
    shapes.write(out, PLAN)
    return out


def halves(kind, **given):
    return [open_set("data.train", kind, dict(given, held_out=SHARE), s) for s in ("train", "val")]


def listed(corpus, name="train"):
    return dict(root=str(corpus), list=str(corpus / f"{name}.csv"))


def names(clips):
    return [clip.path for clip in clips.source.clips]


def test_two_halves_are_the_whole_and_do_not_depend_on_other_clips(corpus, tmp_path):
    rows = (corpus / "train.csv").read_text().splitlines()
    train, val = map(names, halves("files", **listed(corpus)))
    everything = names(open_set("d", "files", listed(corpus), "train"))
    assert sorted(train + val) == sorted(everything) and not set(train) & set(val)
    assert len(val) == sum(fraction(path) < SHARE for path in everything) and train and val
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("\n".join([rows[0], *reversed(rows[1:15])]))
    for half, some in zip(
        (train, val), halves("files", root=str(corpus), list=str(fewer)), strict=True
    ):
        assert set(names(some)) <= set(half)


def test_a_half_has_its_own_clips_frames_and_captions(corpus):
    plain = sources.load(corpus, corpus / "train.csv")
    known = {clip.path: clip for clip in plain.clips}
    for half in halves("files", **listed(corpus)):
        for index, clip in enumerate(half.source.clips):
            assert half.open(index).clip == clip == known[clip.path]
            assert half.open(index).path == str(corpus / clip.path)


def test_shards_have_the_halves_of_their_files(corpus, tmp_path):
    out = tmp_path / "shards"
    given = f"--root {corpus} --list {corpus}/train.csv --out {out}"
    prepare.main(f"shards {given} --every 1 --workers 1".split())
    files = halves("files", **listed(corpus))
    for one, other in zip(files, halves("shards", root=str(out)), strict=True):
        assert (
            names(one)
            == names(other)
            == [other.open(i).clip.path for i in range(len(names(other)))]
        )


def test_questions_on_one_video_stay_together(corpus, tmp_path):
    """Rows of one path are several clips where labels are answers."""
    paths = [f"train/{n:05d}.mp4" for n in range(12)]
    (tmp_path / "q.csv").write_text(
        "path,caption,answer\n" + "".join(f"{p},who?,a\n./{p},where?,b\n" for p in paths)
    )
    (tmp_path / "a.txt").write_text("a\nb\n")
    given = dict(root=str(corpus), list=str(tmp_path / "q.csv"), label_column="answer")
    given["answers"] = str(tmp_path / "a.txt")
    train, val = ({p.removeprefix("./") for p in names(half)} for half in halves("files", **given))
    assert train and val and not train & val


@settings(max_examples=3)
@given(st.integers(0, 2**20), st.floats(0.05, 0.95))
def test_halves_have_their_share(start, share):
    held = sum(fraction(f"{n}.mp4") < share for n in range(start, start + 4000))
    assert abs(held / 4000 - share) < 0.04


def test_a_half_without_clips_is_one_line(corpus):
    given = dict(listed(corpus, "val"), held_out=1e-6)
    with pytest.raises(UserError, match="held_out=1e-06 of 2 clips leaves none for val"):
        open_set("data.evals.val", "files", given, "val")
    with pytest.raises(UserError, match="data.train.held_out=1.5; it must be a share"):
        open_set("data.train", "files", {**given, "held_out": 1.5}, "train")


def test_captions_may_be_written_beside_the_videos(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.mp4", "sub/a.webm"):
        (tmp_path / name).touch()
    (tmp_path / "b.txt").write_text("\ufeffa dog\r\n\r\na dog, running\r\n")
    with pytest.raises(UserError, match="1 of 2 videos .* no caption, such as 'sub/a.webm'"):
        sources.load(tmp_path)
    (tmp_path / "sub/a.txt").write_text("a cat")
    found = sources.load(tmp_path)
    assert found.clips == (
        sources.Clip("b.mp4", ("a dog", "a dog, running")), sources.Clip("sub/a.webm", ("a cat",))
    )  # fmt: skip
    (tmp_path / "list.csv").write_text("path,caption\nb.mp4,x\n")
    assert sources.load(tmp_path).clips == (sources.Clip("b.mp4", ("x",)),)
    assert sources.load(tmp_path, "list.csv") == sources.load(tmp_path)
    (tmp_path / "more.json").write_text("{}")
    with pytest.raises(UserError, match=r"several lists \(list.csv, more.json\)"):
        sources.load(tmp_path)


@pytest.mark.parametrize("length", [6, 40])
def test_captions_that_are_cut_are_reported_and_counted(corpus, length, caplog):
    train = listed(corpus)
    text = dict(kind="sentencepiece", length=length, vocab_size=200)
    with caplog.at_level("WARNING"):
        data = pipeline.make(
            kind="files", batch=4, seed=0, train=train, workers=1,
            video=dict(frames=1, stride=1, size=16), text=text,
        )  # fmt: skip
    batches = data.batches(0)
    cut = 0
    for _ in range(3):
        batch = next(batches)
        cut += int((batch["text_mask"].all(1)).sum())
    counts = data.counts(3)
    assert counts["captions"] == counts["rows"] == 12 and data.counts(3)["failed"] == 0
    if length == 40:
        assert counts["cut"] == cut == 0 and "are cut" not in caplog.text
    else:
        assert 0 < counts["cut"] <= cut
        assert "24 of 24 captions are longer than 6 tokens and are cut" in caplog.text
        longest = int(caplog.text.split("text.length=")[1].split()[0])
        assert longest % 8 == 0 and 6 < longest <= 40
