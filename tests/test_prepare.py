"""The commands that make and check data, as a user types them."""

import csv

import pytest

from vtp_jax import prepare
from vtp_jax.data import text
from vtp_jax.types import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "shapes"
    prepare.main(f"shapes --out {out} --train 6 --val 2 --side 32 --frames 8".split())
    return out


def test_shapes_are_written_once(corpus, capsys):
    assert len(list(corpus.glob("train/*.mp4"))) == 6
    with (corpus / "val.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
    prepare.main(f"shapes --out {corpus} --train 6 --val 2 --side 32 --frames 8".split())
    assert "6 + 2 clips, as they were" in capsys.readouterr().out


def test_a_tokenizer_is_trained_on_captions(corpus, tmp_path, capsys):
    out = tmp_path / "new" / "spm.model"
    prepare.main(f"tokenizer --captions {corpus}/train.csv --vocab-size 80 --out {out}".split())
    size = text.make(kind="sentencepiece", path=out).facts["vocab_size"]
    assert size <= 80 and f"{size} pieces" in capsys.readouterr().out


def test_videos_are_counted_by_cause(corpus, tmp_path, capsys):
    """Counts by cause, of what a caption file names or of a whole folder."""
    captions = tmp_path / "c.csv"
    captions.write_text("file,text\ntrain/00000.mp4,x\nabsent.mp4,x\nbad.mp4,x\n")
    (corpus / "bad.mp4").write_bytes(b"no video")
    columns = "--path-column file --caption-column text"
    prepare.main(f"check --root {corpus} --list {captions} {columns}".split())
    out = capsys.readouterr().out
    assert f"{corpus}/bad.mp4: not_a_video" in out and f"{corpus}/absent.mp4: missing" in out
    assert all(f"1 {cause}" in out for cause in ("readable", "missing", "not_a_video"))
    prepare.main(f"check --root {corpus}".split())
    out = capsys.readouterr().out
    assert "8 readable" in out and "1 not_a_video" in out and "missing" not in out


@pytest.mark.parametrize(
    "argv, message",
    [
        ("tokenizer --captions no.csv --out x", "no file 'no.csv'; give a list"),
        ("check --root absent", "no file or folder 'absent'"),
        ("check --root . --config.a=3", "takes no config"),
        ("shapes --out x --val 201", "only 200"),
        ("shapes --out x --traim 3", "unknown argument '--traim'"),
    ],
)
def test_mistakes_are_reported_in_one_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        prepare.main(argv.split())
    assert "\n" not in str(caught.value)
