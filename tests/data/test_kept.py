"""A list of clips that changes between two starts of a run."""

import csv

import pytest

from tests.films import make
from vtp_jax.data import kept


def start(folder, root, rows, **more):
    """What a start in `folder` warns of, with a list of these rows."""
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "caption"), *rows])
    train = dict(root=str(root), list=str(folder / "list.csv"), **more)
    text = dict(kind="sentencepiece", length=48, path=str(folder / "tokenizer.model"))
    if not (folder / kept.FILE).exists():
        text.pop("path")
        kept.save(folder, make(root, train=train, text=text).keep, resumed=False)
        return
    kept.save(folder, make(root, train=train, text=text).keep, resumed=True)


@pytest.mark.parametrize("more", [{}, dict(held_out=0.3)], ids=str)
def test_a_change_of_the_list_is_told_once_in_one_line(more, corpus, tmp_path, caplog):
    rows = [(f"train/{i:05d}.mp4", f"a thing number {i} moves") for i in range(10)]
    changed = [(path, text.replace("moves", "thing")) for path, text in rows]

    def told(rows):
        caplog.clear()
        start(tmp_path, corpus, rows, **more)
        lines = [r.getMessage() for r in caplog.records if "has changed" in r.getMessage()]
        assert all(line.startswith("data.train ") and "goes on" in line for line in lines)
        return [line.partition(": ")[2].partition(":")[0] for line in lines]

    assert told(rows) == told(rows) == []
    assert told(changed) == ["other paths, captions or labels"] and told(changed) == []
    (line,) = told(changed[:-4])
    had, now = (int(word) for word in line.replace(",", "").split() if word.isdigit())
    assert now < had <= 10 and told(changed[:-4]) == []


def test_what_is_not_known_of_a_list_is_no_change():
    assert not [*kept.changes({}, {"data.train": (3, "a")})]  # a run of an older version
    assert not [*kept.changes({"data.train": (3, "")}, {"data.train": (3, "a")})]
