"""Nothing is lost in silence from files that people write, and errors name the line."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtp_jax import lines
from vtp_jax.data import sets, sources, text
from vtp_jax.types import UserError

# What `str.splitlines` takes for the end of a line, and files do not.
KIN = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"
words = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), max_size=9)


@given(st.lists(words, max_size=6), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_lines_end_where_files_end_them(tmp_path_factory, listed, end, mark):
    file = tmp_path_factory.getbasetemp() / "lines.txt"
    data = "".join(line + end for line in [f"first{KIN}", *listed])
    file.write_bytes(data.encode("utf-8-sig" if mark else "utf-8"))
    assert list(lines.each(file)) == list(enumerate([f"first{KIN}", *listed], 1))


def test_every_list_is_read_by_the_same_rules(tmp_path):
    """Vocabularies, answers and lists of videos, with a mark, foreign ends and U+2028."""
    names = [f"a{KIN}b.mp4", "c d.mp4"]
    for name in names:
        (tmp_path / name).touch()
    marked = tmp_path / "vocab.txt"
    marked.write_text(
        "\r\n".join([*text.SPECIAL, "\u2028", "dog"]), encoding="utf-8-sig", newline=""
    )
    tokenizer = text.make(kind="wordpiece", path=marked)
    assert tokenizer.encode(["dog"], 4)[0][0].tolist() == [2, 6, 3, 0]

    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{name} 3\r\n" for name in names), encoding="utf-8-sig", newline="")
    source = sources.load(tmp_path, listed, caption_column=None, label_column="label")
    assert [clip.path for clip in source.clips] == names

    answers = tmp_path / "answers.txt"
    answers.write_text("a\u2028b\n\ncafé\n", encoding="utf-8-sig")
    assert sources.read_answers(answers) == {"a\u2028b": 0, "café": 1}
    (tmp_path / "answers.json").write_text('["x", "y"]', encoding="utf-8-sig")
    assert sets.read_answers(tmp_path / "answers.json") == dict(x=0, y=1)


ENCODINGS = {
    "café\n".encode("latin-1"): "not UTF-8 .line 4, byte 0xe9",
    b"\x80\x81\n": "not UTF-8 .line 4, byte 0x80",
    b"a\0b\n": "line 4: a NUL",
}
READERS = {
    "vocabulary": lambda file: text.make(kind="wordpiece", path=file),
    "answers": sources.read_answers,
    "list": lambda file: list(sources.read_rows(file, dict(path="path"))),
    "lines": lambda file: list(lines.items(file)),
}


@pytest.mark.parametrize("name", READERS)
def test_other_encodings_are_one_line_errors_that_name_the_line(tmp_path, name):
    file = tmp_path / "x.txt"
    for wrong, told in ENCODINGS.items():
        file.write_bytes(b"one 1\r\n\r\n" + b"two 1\n" + wrong)
        with pytest.raises(UserError, match=f"x.txt.*{told}"):
            READERS[name](file)
    for wide in ("utf-16", "utf-32", "utf-16-le"):
        file.write_bytes("one 1\ntwo 1\n".encode(wide))
        with pytest.raises(UserError, match=r"(UTF-16|UTF-32).*line 1|line 1: .*UTF-16"):
            READERS[name](file)
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match="is a folder; give a file"):
        READERS[name](file)


CAPTIONS = {
    # a field too many
    ("c.csv", "path,caption\na.mp4,a dog, running, in snow\n"): "line 2: 4 fields, but 2 columns",
    ("c.csv", "path,caption,,\na.mp4,a dog, running,\n"): "line 2: 4 fields, but 2 columns",
    ("c.csv", 'path,caption\n\n"a.mp4","x\ny"\na.mp4,b,c\n'): "line 5: 3 fields",
    ("c.tsv", "path\tcaption\na.mp4\tx\ty\n"): "line 2: 3 fields",
    # quotes
    ("c.csv", 'path,caption\na.mp4,x\na.mp4,"a dog\nb.mp4,y\n'): "line 3: a quote is opened here",
    ("c.csv", 'path,caption\na.mp4,"a "big" dog"\n'): "line 2: text follows a closing quote",
    ("c.tsv", 'path\tcaption\na.mp4\t"a" dog\n'): "line 2: text follows a closing quote",
    # doubled columns and keys
    ("c.csv", "path,caption,caption\na.mp4,x,y\n"): "line 1: two columns are named 'caption'",
    ("c.tsv", "path\tpath\tcaption\na.mp4\tb.mp4\tx\n"): "two columns are named 'path'",
    ("c.json", '{"a.mp4": "x",\n "a.mp4": "y"}'): "the key 'a.mp4' occurs twice",
    ("c.jsonl", '\n{"path": "a.mp4", "caption": "x", "caption": "y"}'): "line 2: the key 'caption'",
    ("c.jsonl", '{"path": "a.mp4", "caption": "x", "more": {"b": 1, "b": 2}}'): "the key 'b'",
    # the line of an error
    ("c.csv", '\ufeffpath,caption\na.mp4,"x\n\ny"\n\na.mp4,\n'): "line 6: 'a.mp4' has no caption",
    ("c.csv", 'path,caption\na.mp4,x\n"","x\ny\nz"\n'): "line 3: the path is ''",
    ("c.jsonl", '{"path": "a.mp4", "caption": "x"}\n' * 4 + '{"path": "a.mp4"\n'): "line 5: is not",
    ("c.jsonl", '\ufeff\n\n{"path": "a.mp4", "capt": "x"}\n'): "line 3 has no column 'caption'",
    ("c.csv", "path,caption,start,end\na.mp4,x,3,1\n"): "line 2: start and end are",
    ("c.csv", "path,caption,start,end\na.mp4,x,nan,1\n"): "line 2: start and end are",
    ("c.csv", "path,caption,start,end\na.mp4,x,0,1\na.mp4,y,,\n"): "2 captions of 'a.mp4', but 1",
}  # fmt: skip


@pytest.mark.parametrize("case", CAPTIONS, ids=range(len(CAPTIONS)))
def test_captions_are_whole_or_an_error_names_the_line(tmp_path, case):
    name, content = case
    (tmp_path / "a.mp4").touch()
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    with pytest.raises(UserError, match=CAPTIONS[case]) as caught:
        sources.load(tmp_path, tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


WHOLE = {
    "spaces.csv": 'path, caption\na.mp4, "a dog, running"\n',
    "excel.csv": "\ufeffpath,caption,,\r\na.mp4,a dog\\, running,,\r\n".replace("\\, r", " r"),
    "pandas.csv": ',path,caption\n0,a.mp4,"a dog, running"\n',
    "tabs.tsv": "path\tcaption\na.mp4\ta dog, running\n",
    "mac.csv": 'path,caption\ra.mp4,"a dog, running"\r',
    "long.csv": f"path,caption\na.mp4,{'x' * 140_000}\n",
    "inches.csv": 'path,caption\na.mp4,a 5" dog\n',
    "more.jsonl": '{"path": "a.mp4", "caption": "a\u2028dog"}\n',
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_spreadsheets_write_is_read_whole(tmp_path, name):
    (tmp_path / "a.mp4").touch()
    (tmp_path / name).write_text(WHOLE[name], encoding="utf-8", newline="")
    (clip,) = sources.load(tmp_path, tmp_path / name).clips
    wanted = {
        "excel.csv": "a dog running",
        "long.csv": "x" * 140_000,
        "inches.csv": 'a 5" dog',
        "more.jsonl": "a\u2028dog",
    }
    assert clip.captions == (wanted.get(name, "a dog, running"),)


cells = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)


@given(st.lists(st.tuples(cells, cells), max_size=4), st.sampled_from(",\t;"))
def test_a_table_gives_back_what_was_written(tmp_path_factory, rows, delimiter):
    """And the line at which each row begins."""
    import csv

    file = tmp_path_factory.getbasetemp() / "table.csv"
    wanted, starts = [], []
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(["a", "b"])
        for row in rows:
            out.flush()
            before = file.read_bytes().decode()
            starts.append(len(before.replace("\r\n", "\n").replace("\r", "\n").split("\n")))
            writer.writerow(row)
            wanted.append(dict(zip("ab", row, strict=True)))
    _, found = lines.table(file, delimiter=delimiter)
    expected = [
        (n, row) for n, row in zip(starts, wanted, strict=True) if (row["a"] + row["b"]).strip()
    ]
    assert list(found) == expected


def test_json_is_read_strictly(tmp_path):
    file = tmp_path / "x.json"
    for content, told in {
        '{"a": 1, "b": {"a": 1, "a": 2}}': "the key 'a' occurs twice",
        '{"a": 1\n,}': "line 2, column 2",
        "[" * 100_000: "too deep",
        "9" * 5000: "is not JSON",
        "[]": "is a list; it must be an object",
        "": "line 1, column 1",
    }.items():
        file.write_text(content)
        with pytest.raises(UserError, match=told) as caught:
            lines.read_object(file)
        assert "\n" not in str(caught.value)
    file.write_text(json.dumps(dict(a=1)), encoding="utf-8-sig")
    assert lines.read_object(file) == dict(a=1)


def test_what_a_gz_expands_to_is_bounded(tmp_path, monkeypatch):
    """Whether it is one line or many, and whatever it is read for."""
    monkeypatch.setattr(lines, "SMALL", 2**16)
    path = tmp_path / "a.txt.gz"
    for content in (b"a" * 2**20, b"a\n" * 2**19, b"\xff" * 2**20):
        with gzip.open(path, "wb") as file:
            for _ in range(4):
                file.write(content)
        with pytest.raises(UserError, match="expands to more than 50 times its size; .*gzip -d"):
            for _ in lines.each(path):
                pass
    with gzip.open(path, "wb") as file:
        file.write(b"\xef\xbb\xbfa\r\nb")
    assert list(lines.each(path)) == [(1, "a"), (2, "b")]


@pytest.mark.parametrize(
    "given",
    ["", ".", "..", "/a.json", "../a.json", "a/b.json", "a.json\0", "a.txt", None, 3, ["a"]],
)
def test_a_name_is_no_path(given):
    assert lines.name("x", "a.json", ".json") == "a.json"
    with pytest.raises(UserError, match="x names .*, which is no name of a .json file in its own"):
        lines.name("x", given, ".json")
