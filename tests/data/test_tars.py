"""Tars of samples: what is read, and what a hostile one cannot cause."""

import io
import resource
import tarfile

import pytest

from vtp_jax.data import tars


def add(tar, name, content=b"x", **how):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in how.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content) if info.isreg() else None)


def write(path, *members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, *rest in members:
            add(tar, name, *rest[:1], **(rest[1] if len(rest) > 1 else {}))
    return str(path)


def test_samples_are_read_in_order(tmp_path):
    path = write(
        tmp_path / "a.tar",
        *(("0.mp4", b"v0"), ("0.json", b"{}"), ("dir/1.b.MP4", b"v1"), ("dir/1.txt", b"t")),
    )
    assert list(tars.read(path)) == [
        tars.Sample("0", {".mp4": b"v0", ".json": b"{}"}),
        tars.Sample("dir/1", {".b.mp4": b"v1", ".txt": b"t"}),
    ]
    assert tars.keys(path) == ["0", "dir/1"]


EVIL = {
    "../out.mp4": ("unsafe_name", {}),
    "a/../../out.mp4": ("unsafe_name", {}),
    "/etc/out.mp4": ("unsafe_name", {}),
    "link.mp4": ("not_a_file", dict(type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "hard.mp4": ("not_a_file", dict(type=tarfile.LNKTYPE, linkname="../secret")),
    "device.mp4": ("not_a_file", dict(type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
    "block.mp4": ("not_a_file", dict(type=tarfile.BLKTYPE)),
    "pipe.mp4": ("not_a_file", dict(type=tarfile.FIFOTYPE)),
}


def test_no_member_is_read_or_written_outside_the_tar(tmp_path):
    """No name is used as a path, no link is followed; each is counted by its cause."""
    (tmp_path / "secret").write_text("secret")
    inside = tmp_path / "in"
    inside.mkdir()
    members = [(name, b"x", how) for name, (_, how) in EVIL.items()]
    path = write(inside / "a.tar", ("ok.mp4", b"v"), *members, ("z.mp4", b"w"))
    before = sorted(tmp_path.rglob("*"))
    found = list(tars.read(path))
    good = [one for one in found if isinstance(one, tars.Sample)]
    assert [(one.key, dict(one.members)) for one in good] == [
        ("ok", {".mp4": b"v"}),
        ("z", {".mp4": b"w"}),
    ]
    refused = {one.key: one.cause for one in found if isinstance(one, tars.Refused)}
    assert refused == {name: cause for name, (cause, _) in EVIL.items()}
    assert sorted(tmp_path.rglob("*")) == before and set(refused.values()) <= set(tars.CAUSES)


def test_members_that_claim_to_be_huge_are_not_read(tmp_path, monkeypatch):
    """A member of 8 TiB that the header promises, and one with holes of 1 TiB, cost nothing."""
    info = tarfile.TarInfo("big.mp4")
    info.size = 2**43
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    causes = [one.cause for one in tars.read(str(tmp_path / "a.tar"))]
    assert causes[0] == "member_too_large"
    holes = tarfile.TarInfo("holes.mp4")
    holes.type, holes.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(holes.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
    header[483:495] = b"%011o\0" % 2**32
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    (tmp_path / "b.tar").write_bytes(bytes(header) + bytes(512 + 1024))
    assert [one.cause for one in tars.read(str(tmp_path / "b.tar"))] == ["not_a_file"]
    path = write(tmp_path / "c.tar", ("a.json", b"x" * 20), ("b.mp4", b"x" * 20))
    monkeypatch.setattr(tars, "MAX_TEXT", 19)
    assert [type(one).__name__ for one in tars.read(path)] == ["Refused", "Sample"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_not_opened(tmp_path, mode):
    path = write(tmp_path / "a.tar", ("a.mp4", bytes(10**6)), mode=mode)
    (refused,) = tars.read(path)
    assert refused.cause == "damaged_tar"


def test_duplicate_samples_and_truncated_tars_are_reported(tmp_path):
    path = write(tmp_path / "a.tar", ("a.mp4",), ("b.mp4",), ("a.mp4",), ("c.mp4", bytes(5000)))
    assert [(one.key, getattr(one, "cause", "")) for one in tars.read(path)] == [
        *(("a", ""), ("b", ""), ("a", "duplicate"), ("c", "")),
    ]
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:5000])
    found = list(tars.read(path))
    assert [one.key for one in found if isinstance(one, tars.Sample)] == ["a", "b"]
    assert found[-1].cause == "damaged_tar"
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    assert [one.cause for one in tars.read(path)] == ["damaged_tar"]


SIX = [(f"{n}.{end}", bytes(700)) for n in range(3) for end in ("mp4", "txt")]  # 1536 bytes each


@pytest.mark.parametrize(
    "damage, kept",
    [
        (lambda data: flip(data, 3 * 1536 + 20), ["0"]),  # in the header of 1.txt
        (lambda data: flip(data, 4 * 1536 + 20), ["0"]),  # of 2.mp4: whether 1 had more is lost
        (lambda data: data[: 4 * 1536], ["0"]),  # at the end of a member
        (lambda data: data[: 5 * 1536 + 100], ["0", "1"]),  # inside a header
        (lambda data: data[: 5 * 1536 + 600], ["0", "1"]),  # inside a member
        (lambda data: data[: 4 * 1536] + bytes(512) + data[4 * 1536 + 512 :], ["0"]),  # zeros
        (lambda data: data + data, ["0", "1"]),  # one tar after the other
    ],
)
def test_a_tar_that_does_not_end_as_tars_do_is_damaged(tmp_path, damage, kept):
    """Python takes a damaged header for the end; all that followed was lost silently."""
    path = write(tmp_path / "a.tar", *SIX)
    data = (tmp_path / "a.tar").read_bytes()
    assert [one.key for one in tars.read(path)] == ["0", "1", "2"]
    (tmp_path / "a.tar").write_bytes(damage(data))
    *found, last = tars.read(path)
    assert [one.key for one in found if isinstance(one, tars.Sample)] == kept
    assert last.cause == "damaged_tar" and last.key == str(len(kept))
    assert tars.keys(path) == [*kept, last.key]


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_names_that_are_not_utf_8(tmp_path):
    with tarfile.open(
        tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as tar:
        add(tar, "caf\xe9.mp4")
        add(tar, "z.mp4")
    refused, good = tars.read(str(tmp_path / "a.tar"))
    assert (refused.key, refused.cause) == ("caf\ufffd.mp4", "unsafe_name") and good.key == "z"


def test_extended_headers_that_are_not_numbers(tmp_path):
    """GNU.sparse.map: a ValueError inside Python's tarfile."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a.mp4")
        add(tar, "b.mp4", pax_headers={"GNU.sparse.map": "x"})
    assert [one.cause for one in list(tars.read(str(tmp_path / "a.tar")))[-1:]] == ["damaged_tar"]


def header(name="x", kind=b"0", size=b"0" * 11 + b"\0", **fields):
    """A header with a right checksum, whatever else it says."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157] = size, kind
    for at, content in fields.values():
        block[at : at + len(content)] = content
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(size):
    return b"%011o\0" % size


def binary(size, negative=False):
    return bytes([255 if negative else 128]) + size.to_bytes(11, "big", signed=negative)


def pax(content, kind=b"x"):
    return header("p", kind, octal(len(content))) + content + bytes(-len(content) % 512)


BOMBS = {
    "pax of 40 GB": header("p", b"x", binary(40 * 2**30)),
    "pax of 8 GB": header("p", b"x", octal(2**33 - 1)),
    "global pax of 40 GB": header("p", b"g", binary(40 * 2**30)),
    "pax of less than nothing": header("p", b"x", binary(-5, negative=True)),
    "long name of 40 GB": header("p", b"L", binary(40 * 2**30)),
    "long link of 40 GB": header("p", b"K", binary(40 * 2**30)),
    "member of 2**94": header("2.mp4", b"0", binary(2**86)),
    "negative member": header("2.mp4", b"0", binary(-(2**60), negative=True)),
    "endless chain of pax": pax(b"11 a=bcdefg\n"[:12]) * 600,
    "endless chain of names": (header("n", b"L", octal(2)) + b"x\0" + bytes(510)) * 600,
    "endless chain of links": (header("n", b"K", octal(2)) + b"x\0" + bytes(510)) * 600,
    "200 kB of digits": pax(b"1" * 200_000),
    "a length of many digits": pax(b"9" * 5000 + b" path=x\n"),
    "many headers of digits": b"".join(pax(b"1" * 60_000) + header(f"{n}.a") for n in range(99)),
    "size in words": pax(b"14 size=alot\n") + header("2.mp4"),
    "size beyond any file": pax(b"40 size=" + b"9" * 31 + b"\n") + header("2.mp4"),
    "sparse without an end": pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n")
    + header("2.mp4", size=octal(512)) + b"99999999999\n" + bytes(500),
    "sparse map in words": pax(b"21 GNU.sparse.map=a,b\n"[:21] + b"\n") + header("2.mp4"),
    "old sparse, extended": header("2.mp4", b"S", more=(482, b"\1")),
    "charset": pax(b"30 hdrcharset=\xff\xfe\xff\xfe\xff\xfe\xff\xfe\xff\xfe\n"[:30]),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("ends", [True, False])
def test_a_hostile_header_costs_little_and_keeps_what_came_before(tmp_path, name, ends):
    path = write(tmp_path / "a.tar", ("0.mp4", b"v"), ("1.mp4", b"w"))
    data = (tmp_path / "a.tar").read_bytes()[:2048]
    (tmp_path / "a.tar").write_bytes(data + BOMBS[name] + bytes(1024 if ends else 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, names = list(tars.read(path)), tars.keys(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert tars.Sample("0", {".mp4": b"v"}) in found and names[0] == "0"
    causes = [one.cause for one in found if isinstance(one, tars.Refused)]
    assert set(causes) <= set(tars.CAUSES)
    if any(word in name for word in ("GB", "endless", "digits", "less than nothing")):
        assert causes[-1] == "damaged_tar"


def test_long_names_are_read(tmp_path):
    """As GNU's tar and pax write them."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
            add(tar, "d/" * 800 + "x.mp4", pax_headers={"comment": "c" * 20_000})
        (sample,) = tars.read(str(tmp_path / "a.tar"))
        assert sample.key == "d/" * 800 + "x"
