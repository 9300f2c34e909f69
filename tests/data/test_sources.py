"""Caption files of three kinds give one list; mistakes are reported in one line."""

import json

import pytest

from vtp_jax.data import sources
from vtp_jax.types import UserError

CLIPS = (
    sources.Clip("a.mp4", ("one dog", "a dog, running")),
    sources.Clip("sub/b.mkv", ('a "cat"',)),
)
ROWS = [("a.mp4", "one dog"), ("sub/b.mkv", 'a "cat"'), ("a.mp4", "a dog, running")]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "videos" / "sub").mkdir(parents=True)
    for clip in CLIPS:
        (tmp_path / "videos" / clip.path).touch()
    return tmp_path


def write(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


CSV = 'path,length,caption\na.mp4,3,one dog\nsub/b.mkv,4,"a ""cat"""\na.mp4,3,"a dog, running"\n'
FILES = {
    "captions.csv": CSV,
    "excel.csv": "\ufeff" + CSV.replace("\n", "\r\n"),
    "captions.jsonl": "\n\n".join(json.dumps(dict(path=p, caption=c)) for p, c in ROWS),
    "captions.json": json.dumps({"a.mp4": ["one dog", "a dog, running"], "sub/b.mkv": 'a "cat"'}),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_clips(folder, name):
    """In the order of the file, captions of one video together."""
    source = sources.load(folder / "videos", write(folder, name, FILES[name]))
    assert source.clips == CLIPS
    assert source.file(1) == str(folder / "videos" / "sub" / "b.mkv")


def test_columns_may_have_other_names(folder):
    captions = write(folder, "c.csv", "file,text\na.mp4,x\n")
    source = sources.load(folder / "videos", captions, path_column="file", caption_column="text")
    assert source.clips == (sources.Clip("a.mp4", ("x",)),)


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("c.csv", "", "is empty"),
        ("c.csv", "path,caption\n", "lists no videos"),
        ("c.csv", "path,captoin\na.mp4,x\n", "no column 'caption'.*path, captoin.*'captoin'"),
        ("c.csv", "file,caption\n", "no column 'path'; it has file, caption"),
        ("c.csv", "path,caption\na.mp4\n", "line 2: 'a.mp4' has no caption"),
        ("c.csv", "path,caption\na.mp4, \n", "has no caption"),
        ("c.csv", "path,caption\n,x\n", "line 2: the path is ''"),
        ("c.jsonl", '{"path": "a.mp4"}', "no column 'caption'; it has path"),
        ("c.jsonl", '{"path": ', "c.jsonl, line 1: is not JSON .column 10"),
        ("c.jsonl", "[1]", "line 1: not an object"),
        ("c.jsonl", "", "lists no videos"),
        ("c.json", "[]", "must be {path: caption}, not a list"),
        ("c.json", '{"a.mp4": 3}', "'a.mp4' has no caption"),
        ("c.json", '{"a.mp4": []}', "'a.mp4' has no caption"),
        ("c.json", "\n{", "c.json: is not JSON .line 2, column 2"),
        ("c.xml", "x", "unknown format"),
        (
            "c.json",
            '{"a.mp4": "x", "y.mp4": "x", "z.mp4": "x"}',
            "names 2 of 3 files.*such as 'y.mp4'.*max_absent",
        ),
    ],
)
def test_mistakes_are_one_line_errors(folder, name, content, told):
    with pytest.raises(UserError, match=told) as caught:
        sources.load(folder / "videos", write(folder, name, content))
    assert "\n" not in str(caught.value)


def test_more_mistakes_are_one_line_errors(folder):
    captions = write(folder, "c.csv", FILES["captions.csv"])
    with pytest.raises(UserError, match="no file .*; give a list of videos"):
        sources.load(folder / "videos", folder / "absent.csv")
    with pytest.raises(UserError, match="no folder"):
        sources.load(folder / "absent", captions)
    (folder / "bare").mkdir()
    with pytest.raises(UserError, match="holds no videos"):
        sources.load(folder / "bare", captions)
    (folder / "latin.csv").write_bytes("path,caption\na.mp4,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        sources.load(folder / "videos", folder / "latin.csv")


def test_a_share_may_be_absent(folder):
    """The absent keep their places, so that order does not depend on what arrived."""
    captions = write(folder, "c.json", '{"no.mp4": "x", "a.mp4": "y", "sub/b.mkv": "z"}')
    source = sources.load(folder / "videos", captions, max_absent=0.4)
    assert [clip.path for clip in source.clips] == ["no.mp4", "a.mp4", "sub/b.mkv"]
    with pytest.raises(UserError, match="1 of 3"):
        sources.load(folder / "videos", captions, max_absent=0.3)


def test_files_and_captions_become_a_source(folder):
    root = folder / "videos"
    source = sources.from_files([root])
    assert [clip.path for clip in source.clips] == [str(root / c.path) for c in CLIPS]
    assert source.clips[0].captions == ()
    source = sources.from_files([root / "a.mp4"], ["words"])
    assert source.clips[0].captions == ("words",) and source.file(0) == str(root / "a.mp4")
    with pytest.raises(UserError, match="2 captions for 1 videos"):
        sources.from_files([root / "a.mp4"], ["x", "y"])
    with pytest.raises(UserError, match="no file or folder"):
        sources.from_files([root / "absent"])
    (folder / "bare").mkdir()
    with pytest.raises(UserError, match="holds no videos"):
        sources.from_files([folder / "bare"])


LABELLED = {
    "k400.txt": "a.mp4 3\nsub/b.mkv 0\n",
    "two blanks.csv": "a.mp4  3\nsub/b.mkv  0\n",  # VideoMAE's DATASET.md
    "tabs.txt": "a.mp4\t3\nsub/b.mkv\t0\n",
    "without a header.csv": "a.mp4,3\r\nsub/b.mkv, 0\r\n",
    "k400.csv": "path,label\na.mp4,3\nsub/b.mkv,0\na.mp4,3\n",
    "k400.jsonl": '{"path": "a.mp4", "label": 3}\n{"path": "sub/b.mkv", "label": 0}',
}


@pytest.mark.parametrize("name", LABELLED)
def test_classes_need_no_captions(folder, name):
    source = sources.load(
        folder / "videos", write(folder, name, LABELLED[name]),
        caption_column=None, label_column="label",
    )  # fmt: skip
    assert source.clips == (sources.Clip("a.mp4", (), 3), sources.Clip("sub/b.mkv", (), 0))


@pytest.mark.parametrize("name", ["k400.csv", "k400.txt"])
def test_a_list_for_pretraining_has_no_classes(folder, name):
    """VideoMAE's `path 0 -1`; names may hold blanks, commas and numbers."""
    (folder / "videos" / "take 2, 3.mp4").touch()
    file = write(folder, name, "a.mp4 0 -1\ntake 2, 3.mp4  0  -1\n")
    found = sources.load(folder / "videos", file, caption_column=None).clips
    assert found == (sources.Clip("a.mp4", ()), sources.Clip("take 2, 3.mp4", ()))
    with pytest.raises(UserError, match="line 1: the label of 'a.mp4' is None"):
        sources.load(folder / "videos", file, caption_column=None, label_column="label")
    with pytest.raises(UserError, match="hold no captions; set caption_column=None, or write a"):
        sources.load(folder / "videos", file)


def test_a_first_line_that_names_the_path_is_a_header(folder):
    file = write(folder, "c.csv", "path,caption,2024\na.mp4,x,3\n")
    assert sources.load(folder / "videos", file).clips[0].captions == ("x",)
    with pytest.raises(UserError, match="no column 'caption'; it has path, 2024"):
        sources.load(folder / "videos", write(folder, "d.csv", "path,2024\na.mp4,x\n"))


def test_one_table_may_have_captions_and_classes(folder):
    table = write(folder, "c.csv", "path,caption,class\na.mp4,x,2\na.mp4,y,2\n")
    source = sources.load(folder / "videos", table, label_column="class")
    assert source.clips == (sources.Clip("a.mp4", ("x", "y"), 2),)
    assert sources.load(folder / "videos", table).clips[0].label is None


@pytest.mark.parametrize(
    "name, content, told",
    [
        (
            "c.txt",
            "a.mp4 dog\n",
            "line 1: the label of 'a.mp4' is 'dog'; it must be a whole number",
        ),
        ("c.txt", "a.mp4\n", "line 1: the path is ''"),
        ("c.csv", "path,label\na.mp4,-1\n", "is '-1'"),
        ("c.csv", "path,label\na.mp4,1\na.mp4,2\n", "'a.mp4' has labels 1 and 2"),
        ("c.csv", "path,lable\na.mp4,1\n", "no column 'label'.*did you mean 'lable'"),
        ("c.json", '{"a.mp4": "x"}', "holds no labels"),
    ],
)
def test_wrong_labels_are_reported(folder, name, content, told):
    with pytest.raises(UserError, match=told) as caught:
        sources.load(
            folder / "videos", write(folder, name, content),
            caption_column=None, label_column="label",
        )  # fmt: skip
    assert "\n" not in str(caught.value)


def test_a_list_without_captions_is_a_one_line_error(folder):
    with pytest.raises(UserError, match="hold no captions; set caption_column=None"):
        sources.load(folder / "videos", write(folder, "c.txt", "a.mp4 3\n"))


def test_no_path_leads_out_of_the_folder(tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    (tmp_path / "secret.mp4").touch()
    (root / "a..b.mp4").touch()
    for path in (
        "../secret.mp4",
        "x/../../secret.mp4",
        f"{tmp_path}/secret.mp4",
        "../videos2/x.mp4",
    ):
        (tmp_path / "c.csv").write_text(f"path,caption\na..b.mp4,x\n{path},x\n")
        with pytest.raises(UserError, match="c.csv, line 3: '.*' leads out of"):
            sources.load(root, tmp_path / "c.csv")
    inside = ["a..b.mp4", f"{root}/a..b.mp4", "../videos/a..b.mp4"]
    (tmp_path / "c.csv").write_text("path,caption\n" + "".join(f"{path},x\n" for path in inside))
    assert [clip.path for clip in sources.load(root, tmp_path / "c.csv").clips] == inside


def test_lists_may_have_no_labels(tmp_path):
    """VideoMAE's for pretraining: path, start, and -1."""
    (tmp_path / "a b.mp4").touch()
    (tmp_path / "c.txt").write_text("a b.mp4 0 -1\n")
    source = sources.load(tmp_path, tmp_path / "c.txt", caption_column=None)
    assert source.clips == (sources.Clip("a b.mp4", ()),)
    with pytest.raises(UserError, match="line 1: the label of 'a b.mp4' is None"):
        sources.load(tmp_path, tmp_path / "c.txt", caption_column=None, label_column="label")


def test_lone_surrogates_are_replaced(tmp_path):
    """JSON may have them; no tokenizer and no file can."""
    (tmp_path / "a.mp4").touch()
    (tmp_path / "c.jsonl").write_text('{"path": "a.mp4", "caption": "x \\ud83d"}')
    assert sources.load(tmp_path, tmp_path / "c.jsonl").clips[0].captions == ("x \ufffd",)
