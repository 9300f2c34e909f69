"""The report needs no other file, escapes its texts, and leaves out absent parts."""

import json
from html.parser import HTMLParser

import pytest
from PIL import Image

from vtp_jax import report
from vtp_jax.show import page as pages
from vtp_jax.show import record
from vtp_jax.types import UserError

EVIL = '<script>alert("x")</script> & <b>'
SECTIONS = [
    "Retrieval",
    "Losses",
    "Retrieval over time",
    "Restored videos",
    "What captions find",
    "Time",
    "Other curves",
    "Settings",
]


def metrics(steps=4):
    lines = []
    for step in range(1, steps + 1):
        line = {f"train/{name}": 1 / step for name in pages.LOSSES}
        line |= {"train/lr": 0.1, "train/grad_norm": None, "data/failed": 2}
        lines.append({"step": step, "time": 1.7e9 + step, **line})
        if step % 2 == 0:
            found = {
                f"eval/retrieval/{way}_r{k}": min(1.0, 0.1 * k * step)
                for way in ("t2v", "v2t")
                for k in (1, 5, 10)
            }
            found |= {"eval/retrieval/t2v_mdr": 2.5, "eval/retrieval/n_videos": 200}
            lines.append({"step": step, "time": 1.7e9, **found, "eval/val/loss_video": 0.75})
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.webp")
    one = dict(title=EVIL, picture="a.png", animation="a.webp", words_right=3, words_hidden=5)
    files = {
        "metrics.jsonl": metrics(),
        "config.json": json.dumps({"method": {"name": "simvtp", "note": EVIL}}),
        "summary.json": json.dumps(
            {
                "t2v_r1": 0.875,
                "clips_per_s": 123.4,
                "seconds": {"training": 75},
                "seconds_total": 80,
            }
        ),
        "evaluation.json": json.dumps({"protocols": {"retrieval": "Ties: t2v optimistic " + EVIL}}),
        "parameters.txt": "encoder/kernel 3x4\n",
        "pictures/index.json": json.dumps(
            {
                "statistics": "visible",
                "note": "from visible cubes",
                "reconstructions": [one],
                "retrieval": [dict(caption=EVIL, rank=7, picture="b.png")],
            }
        ),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


DRAWN = {}


@pytest.fixture(autouse=True)
def charts_are_drawn_once(monkeypatch):
    """A chart is a function of its arguments, which are the same in most tests here."""
    draw = pages.chart

    def chart(*given, **more):
        if (key := repr((given, more))) not in DRAWN:
            DRAWN[key] = draw(*given, **more)
        return DRAWN[key]

    monkeypatch.setattr(pages, "chart", chart)


class Page(HTMLParser):
    """The tags, addresses and text that a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.ids, self.text, self.open = [], [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "action")]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(folder, **options):
    text = report.write(folder, **options).read_text()
    return text, Page(text)


def test_the_report_refers_to_no_other_file(folder):
    text, page = read(folder)
    assert not page.open, "unbalanced tags"
    assert "script" not in page.tags and "link" not in page.tags
    assert all(a.startswith(("data:image/", "#")) for a in page.addresses)
    assert {a[1:] for a in page.addresses if a.startswith("#")} == set(page.ids)
    assert "@import" not in text and "url(" not in text


def test_the_report_has_every_section_of_a_run(folder):
    _, page = read(folder, label="no_contrast")
    for title in SECTIONS:
        assert pages.slug(title) in page.ids
    for words in (
        "no_contrast",
        "87.5 %",  # R@1 of the summary, which is final
        "chance 0.5 %",
        "Ties: t2v optimistic",
        "3 of 5 hidden words correct",
        "1:15",  # of training
        "encoder/kernel 3x4",
        "rows failed",
        "123",
    ):
        assert words in page.text
    # 5 losses, 2 ways of retrieval, the learning rate; then a storyboard, its animation, an answer.
    # A curve without a number (grad_norm) is left out.
    assert page.tags.count("img") == 8 + 3
    assert "Not in this report" not in page.text


def test_texts_are_escaped(folder):
    text, page = read(folder, label=EVIL)
    assert "<script" not in text and "<b>alert" not in text
    assert page.text.count("alert") >= 4


@pytest.mark.parametrize(
    "absent, missing",
    [
        (
            "metrics.jsonl",
            ["Retrieval", "Losses", "Retrieval over time", "Other curves"],
        ),
        ("summary.json", ["Time"]),
        ("pictures/index.json", ["Restored videos", "What captions find"]),
        ("config.json", []),
        ("evaluation.json", []),
        ("parameters.txt", []),
    ],
)
def test_a_missing_file_leaves_out_its_sections(folder, absent, missing):
    (folder / absent).unlink()
    _, page = read(folder)
    present = [title for title in SECTIONS if title not in missing]
    assert page.ids == [pages.slug(title) for title in present]
    assert ("Not in this report" in page.text) == bool(missing)
    assert all(title in page.text.split("Not in this report")[-1] for title in missing)


def test_an_empty_run_has_a_report(tmp_path):
    _, page = read(tmp_path)
    assert page.ids == ["settings"] and "jax" in page.text


def test_a_truncated_last_line_is_left_out(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/loss": ')
    assert record.read(folder).curves["train/loss"][-1] == (4, 0.25)


def test_mistakes_are_one_line_errors(folder, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        report.write(tmp_path / "nothing")
    (folder / "pictures" / "a.png").unlink()
    with pytest.raises(UserError, match="'a.png', which is absent"):
        report.write(folder)
    (folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match="summary.json is not JSON"):
        report.write(folder)
    with pytest.raises(UserError, match="takes no config"):
        report.main(["--workdir", str(folder), "--config.steps=3"])
