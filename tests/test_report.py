"""The report needs no other file, escapes its texts, and leaves out absent parts."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from vtp_jax import report
from vtp_jax.run import evaluations, goodput
from vtp_jax.run.evaluations import Subject
from vtp_jax.show import numbers as naming
from vtp_jax.show import page as pages
from vtp_jax.show import record
from vtp_jax.types import UserError

EVIL = '<script>alert("x")</script> & <b>'
TERMS = ("loss", "loss_video", "loss_text", "loss_vtc", "loss_vtm")
SECTIONS = [
    "Restored videos",
    "Evaluations",
    "Losses",
    "Evaluations over time",
    "What captions find",
    "Time",
    "Other curves",
    "Settings",
]


PROTOCOL = "'val' is data/a, val.csv. Retrieval: ties are optimistic "
OF = Subject("retrieval", "retrieval", "val", "data/a", "val.csv", PROTOCOL + EVIL, {"data": "a"})
OTHER = OF._replace(
    stream="mine", set="data/b", split="test.csv", protocol="'mine' is data/b.", settings={}
)


def metrics(steps=4):
    lines = []
    for step in range(1, steps + 1):
        line = {f"train/{name}": 1 / step for name in TERMS}
        line |= {"train/lr": 0.1, "train/grad_norm": None, "data/failed": 2}
        line |= {"data/rows": 10 * step, "train/clips_per_s": 123.4}
        lines.append({"step": step, "time": 1.7e9 + step, **line})
    return "".join(json.dumps(line) + "\n" for line in lines)


def found(step):
    """The numbers of a retrieval evaluator."""
    numbers = {
        f"{way}_r{k}": min(1.0, 0.1 * k * step) for way in ("t2v", "v2t") for k in (1, 5, 10)
    }
    return {**numbers, "t2v_mdr": 2.5, "n_videos": 200}


def evaluate(folder, subject, step, numbers, by="training", time=0.0):
    """Adds an evaluation, made `time` seconds after the step by the clock of training."""
    evaluations.write(folder, subject, step, numbers, by)
    path = folder / evaluations.FILE
    *lines, last = path.read_text().splitlines()
    lines.append(json.dumps({**json.loads(last), "time": 1.7e9 + step + time}))
    path.write_text("".join(line + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.webp")
    one = dict(title=EVIL, picture="a.png", animation="a.webp", words_right=3, words_hidden=5)
    files = {
        "metrics.jsonl": metrics(),
        "config.json": json.dumps({"method": {"name": "simvtp", "note": EVIL}, "steps": 4}),
        "summary.json": json.dumps({"seconds": {"training": 75, "report": 5}, "seconds_total": 80}),
        "parameters.txt": "encoder/kernel 3x4\n",
        "pictures/index.json": json.dumps(
            {
                "step": 4,
                "stream": "val",
                "statistics": "visible",
                "note": "from visible cubes",
                "reconstructions": [one],
                "retrieval": [dict(caption=EVIL, rank=7, picture="b.png")],
            }
        ),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for step in (2, 4):
        evaluate(tmp_path, OF, step, found(step))
        evaluate(tmp_path, Subject("losses", "mean", "val"), step, {"loss_video": 0.75})
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
        "chance 0.5 %",
        "Retrieval: ties are optimistic",
        "Step 4, 'val'",  # of the pictures
        "3 of 5 hidden words correct",
        "1 min 15 s",  # of training
        "encoder/kernel 3x4",
        "rows failed",
        "123",
        "4 steps: finished",
    ):
        assert words in page.text
    # 5 losses, 2 ways of retrieval, the learning rate and the speed; then a storyboard, its
    # animation, an answer. A curve without a number (grad_norm) is left out.
    assert page.tags.count("img") == 9 + 3
    assert "Not in this report" not in page.text


def articles(folder):
    """The texts of what was evaluated, each with its numbers and protocol."""
    text, _ = read(folder)
    return [Page(part.split("</article>")[0]).text for part in text.split("<article>")[1:]]


def tiles(folder):
    text, _ = read(folder)
    return [Page(part.split("</div>")[0]).text for part in text.split('<div class="tile">')[1:]]


def test_numbers_stand_beside_their_own_protocol_set_and_step(folder):
    """Of another set, an older step and another command: none is lost, and none is mixed up."""
    evaluate(folder, OTHER, 4, {**found(1), "n_captions": 900}, "vtp evaluate", 10)
    evaluate(folder, OF, 2, found(2), "vtp evaluate", 20)
    own, losses, other = articles(folder)
    assert PROTOCOL in own and "val: data/a, val.csv" in own and "Step 4, kept in" in own
    assert "40.0 %" in own and "All 3 evaluations" in own and "vtp evaluate" in own
    assert "'mine' is data/b." in other and "mine: data/b, test.csv" in other
    assert "10.0 %" in other and PROTOCOL not in other and "evaluated by vtp evaluate" in other
    assert "chance, captions find videos" in other  # several captions of a video
    assert "0.750" in losses and pages.UNKNOWN in losses
    # The tile is that of the table, and of the run's own set.
    assert "40.0 %R@1, captions find videosval, step 4, chance 0.5 %" in tiles(folder)
    assert not any("10.0 %" in tile for tile in tiles(folder))


def test_numbers_of_weights_that_were_replaced_are_left_out(folder):
    """Training went back to step 3, and reached step 4 again after the evaluation of the first."""
    lines = [json.loads(line) for line in metrics(4).splitlines()]
    for line in lines[2:]:
        line["time"] += 100
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own, _ = articles(folder)
    assert "Step 2" in own and "40.0 %" not in own and "20.0 %" in own
    assert "2 evaluations are left out" in read(folder)[1].text
    evaluate(folder, OF, 4, found(3), time=100.5)
    assert "30.0 %" in articles(folder)[0]


def test_workdirs_of_older_versions_are_read(folder):
    """Their protocols belong to the numbers of evaluation.json alone."""
    (folder / evaluations.FILE).unlink()
    old = {f"eval/retrieval/{k}": v for k, v in found(1).items()}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "time": 1.7e9 + 5, **old}) + "\n")
    numbers = {f"retrieval/{k}": v for k, v in found(2).items()}
    made = dict(step=2, numbers=numbers, protocols=dict(retrieval=PROTOCOL))
    (folder / "evaluation.json").write_text(json.dumps(made))
    trained, evaluated = articles(folder)
    assert pages.UNKNOWN in trained and "Step 4" in trained and "10.0 %" in trained
    assert PROTOCOL in evaluated and "Step 2" in evaluated and "20.0 %" in evaluated


def test_lines_of_both_files_are_one_evaluation(folder):
    """Training writes its numbers to metrics.jsonl too."""
    same = {f"eval/retrieval/{k}": v for k, v in found(4).items()}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "time": 1.7e9 + 5, **same}) + "\n")
    assert len(articles(folder)) == 2
    assert "All 2 evaluations" in articles(folder)[0]


def test_a_stopped_run_never_looks_finished(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "steps": 2400}))
    text, page = read(folder)
    assert "4 of 2,400 steps. This run is not finished" in page.text
    assert text.index("4 of 2,400 steps") < text.index('class="tile"')
    assert "4 steps: finished" not in page.text
    assert record.read(folder).steps == (4, 2400, 4)
    (folder / "checkpoints" / "4").rename(folder / "checkpoints" / "broken-4")
    assert record.read(folder).steps == (4, 2400, None)
    assert "but there is none" in read(folder)[1].text
    (folder / "metrics.jsonl").unlink()
    assert record.read(folder).steps.done is None and "2,400 steps" not in read(folder)[1].text


def test_numbers_without_the_other_modality_stand_beside_those_with_it(folder):
    numbers = dict(
        restored_db=24.0, interpolated_db=19.5, restored_db_without_caption=23.25,
        words_right=0.8, words_right_without_video=0.55, n_videos=12,
    )  # fmt: skip
    evaluate(folder, OF._replace(evaluator="restoration", settings={}), 4, numbers)
    text = articles(folder)[2]
    assert "hidden cubes, restored (the other: caption)24.00 dB23.25 dB+0.75 dB" in text
    assert "hidden words right (the other: video)80.0 %55.0 %+25.0 points" in text
    assert "interpolated from the visible ones19.50 dB" in text and "12 videos" in text
    assert any("24.00 dB" in t and "interpolated 19.50 dB" in t for t in tiles(folder))


def test_questions_are_not_called_videos(folder):
    numbers = dict(top1=0.3, n_questions=720, n_outside=81, n_left_out=3)
    evaluate(folder, Subject("answer", "classify", "test"), 4, numbers)
    text = articles(folder)[2]
    assert "720 questions" in text and "81 with an answer or class outside the list" in text
    assert "videos" not in text


def test_the_time_of_training_sums_to_the_whole(folder):
    """Over two processes, of which the second took steps again that the first had not saved."""
    none = dict.fromkeys(goodput.PARTS, 0.0)
    marks = [(0, {**none, "start": 5.0}), (10, {**none, "start": 5.0, "step": 60.0})]
    first = goodput.Life(
        1e9, 0, 15, False, {**none, "start": 5.0, "compile": 20.0, "step": 90.0}, marks
    )
    second = goodput.Life(1e9 + 200, 10, 20, True, {**none, "step": 60.0}, [(10, none)])
    lines = (json.dumps(life._asdict()) + "\n" for life in (first, second))
    (folder / goodput.FILE).write_text("".join(lines))
    text, page = read(folder)
    training = page.text.split("Training")[1].split("Wall time")[0]
    assert "training steps2 min 0 s" in training and "lost" in training
    assert "in all4 min 20 s" in training and "of 2 processes" in page.text
    widths = re.findall(
        r'<i style="width:([\d.]+)%', text.split("Training</h3>")[1].split("</div>")[0]
    )
    assert sum(map(float, widths)) == pytest.approx(100, abs=0.01)


def test_counts_are_of_the_whole_run(folder):
    """Older runs counted from 0 after each restart."""
    lines = [json.loads(line) for line in metrics(4).splitlines()]
    lines[3]["data/rows"] = 5.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert record.read(folder).curves["data/rows"][-1] == (4, 35.0)
    assert "rows read, up to step 435" in read(folder)[1].text


def test_texts_are_escaped(folder):
    text, page = read(folder, label=EVIL)
    assert "<script" not in text and "<b>alert" not in text
    assert page.text.count("alert") >= 4


@pytest.mark.parametrize(
    "absent, missing",
    [
        ("metrics.jsonl", ["Losses", "Other curves"]),
        ("evaluations.jsonl", ["Evaluations", "Evaluations over time"]),
        ("summary.json", ["Time"]),
        ("pictures/index.json", ["Restored videos", "What captions find"]),
        ("config.json", []),
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


def test_names_and_units_of_numbers():
    for name, words, value, text in (
        ("t2v_r5", "R@5, captions find videos", 0.25, "25.0 %"),
        ("v2t_mdr", "median rank, videos find captions", 2.5, "2.50"),
        ("top1", "top-1", 0.5, "50.0 %"),
        ("restored_db", "hidden cubes, restored", 24.0, "24.00 dB"),
        ("loss_vtc", "contrast (VTC)", 0.5, "0.500"),
        ("anything_new", "anything new", 3.0, "3"),
        ("words_right_without_video", "hidden words right, without the video", 1.0, "100.0 %"),
    ):
        assert (naming.title(name), naming.text(name, value)) == (words, text)
    for value, text in (
        (4.2, "4.2 s"),
        (42.0, "42 s"),
        (200.0, "3 min 20 s"),
        (7500.0, "2 h 5 min"),
    ):
        assert naming.seconds(value) == text
    assert naming.seconds(3 * 86400.0 + 4 * 3600) == "3 d 4 h"
