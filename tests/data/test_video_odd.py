"""Odd files come out as the ffmpeg program shows them, or are Unreadable: nothing else."""

import subprocess
import sys

import av
import numpy as np
import pytest
from av.stream import Disposition

from tests import odd
from vtp_jax.data import inputs, records, shards, sources, upright, video

QUARTERS = np.repeat(np.repeat(np.uint8([[40, 100], [160, 220]]), 24, 0), 32, 1)
QUARTERS = np.repeat(QUARTERS[..., None], 3, -1)  # 48 x 64
MATRICES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)]
MATRICES += [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


def moved(picture, a, b, c, d):
    """Each pixel (x, y) at (ax + cy, bx + dy)."""
    y, x = np.indices(picture.shape[:2])
    to_x, to_y = np.sign(a) * x + np.sign(c) * y, np.sign(b) * x + np.sign(d) * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    out = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    out[to_y, to_x] = picture
    return out


def read(path, numbers=None, **limits):
    choose = np.arange if numbers is None else lambda n: np.asarray(numbers)
    return video.read_frames(path, choose, video.Limits(**limits))


def cause_of(path, **limits):
    """The cause for which a file is unreadable: of a scan as of a read."""
    with pytest.raises(video.Unreadable) as scanned:
        video.scan(path, limits=video.Limits(**limits))
    with pytest.raises(video.Unreadable) as caught:
        read(path, **limits)
    assert scanned.value.cause == caught.value.cause and caught.value.cause in video.CAUSES
    return caught.value.cause


@pytest.mark.parametrize("size", [1, 1.5])
def test_eight_orientations(tmp_path, size):
    """From files and from shards, and as `Info` describes them. Scaling does not matter."""
    names = [f"{n}.mp4" for n in range(8)]
    for name, matrix in zip(names, MATRICES, strict=True):
        odd.film(tmp_path / name, [QUARTERS] * 3)
        odd.with_matrix(tmp_path / name, *(size * one for one in matrix))
    clips = tuple(sources.Clip(name, ("a caption",)) for name in names)
    (task,) = inputs.plan_files(sources.Source(str(tmp_path), clips), 8)
    form = shards.Form(every=1, quality=95, ratio=0.0)
    (tmp_path / "out").mkdir()
    for one in shards.begin(tmp_path / "out", [task], form):
        shards.make_shard(one, tmp_path / "out", form)
    shards.finish(tmp_path / "out")
    stored = records.Shards(tmp_path / "out")
    for n, (name, matrix) in enumerate(zip(names, MATRICES, strict=True)):
        want = moved(QUARTERS, *matrix)
        np.testing.assert_allclose(read(tmp_path / name, [1])[0], want, atol=6)
        kept = stored.open(n).read(lambda n: np.asarray([1]))[0]
        np.testing.assert_allclose(kept[4::8, 4::8], want[4::8, 4::8], atol=6)
        info = video.probe(tmp_path / name)
        assert info == video.scan(tmp_path / name)
        assert (info.height, info.width) == want.shape[:2]
        way = upright.Upright(info.mirrored, info.turn)
        np.testing.assert_array_equal(way(QUARTERS), want)


@pytest.mark.parametrize("angle", [30, -45, 89.6])
def test_other_angles_are_turned_as_by_ffmpegs_filter(tmp_path, angle):
    turn = np.deg2rad(angle)
    a, b = np.cos(turn), np.sin(turn)
    path = odd.with_matrix(odd.film(tmp_path / "a.mp4", [QUARTERS]), a, b, -b, a)
    (got,) = read(path)
    if angle == 89.6:  # less than a degree from a quarter turn
        np.testing.assert_allclose(got, np.rot90(QUARTERS, -1), atol=6)
        return
    graph = av.filter.Graph()
    first = graph.add_buffer(width=64, height=48, format="rgb24", time_base=1)
    turned = graph.add("rotate", f"{angle}*PI/180")
    last = graph.add("buffersink")
    first.link_to(turned), turned.link_to(last)
    graph.configure()
    graph.push(av.VideoFrame.from_ndarray(QUARTERS, format="rgb24"))
    want = graph.pull().to_ndarray(format="rgb24")
    # The two place the centre half a pixel apart.
    assert got.shape == want.shape and np.abs(got.astype(int) - want).mean() < 8


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (1, 0, 1, 0), (0, 1, 0, 1)])
def test_a_matrix_without_an_inverse_changes_nothing(matrix):
    assert upright.of_matrix([*matrix[:2], 0, *matrix[2:], 0, 0, 0, 1]) in (
        upright.Upright(), upright.Upright(False, 0), upright.Upright(True, 0),
        upright.Upright(False, 270), upright.Upright(True, 270),
    )  # fmt: skip


@pytest.mark.parametrize("covers", [1, 2])
def test_a_cover_is_no_video(tmp_path, covers):
    path = odd.write(tmp_path / "a.mp4", *[odd.COVER] * covers, sound=True)
    assert cause_of(path) == "no_video_stream"


@pytest.mark.parametrize("first", [True, False])
def test_a_film_with_a_cover_is_the_film(tmp_path, first):
    tracks = [odd.COVER, odd.Track(odd.plain(90, 16, 16))]
    path = odd.write(tmp_path / "a.mp4", *tracks[:: 1 if first else -1], sound=True)
    assert read(path).shape == (12, 16, 16, 3)
    assert video.probe(path) == video.scan(path)


@pytest.mark.parametrize(
    "name, sizes, default, chosen",
    [
        ("a.mp4", ((16, 16), (32, 32)), None, 0),  # which makes the first the default
        ("a.mkv", ((16, 16), (32, 32)), None, 1),
        ("a.ts", ((16, 16), (32, 32)), None, 1),
        ("a.mp4", ((32, 32), (16, 16)), None, 0),
        ("a.mp4", ((32, 32), (32, 32)), None, 0),
        ("a.mkv", ((32, 32), (16, 16)), 1, 1),  # the default stream, whatever its size
        ("a.mkv", ((32, 32), (16, 16)), 0, 0),
    ],
)
def test_of_several_films_ffmpegs_choice_is_read(tmp_path, name, sizes, default, chosen):
    marks = [None if default is None else Disposition(int(n == default)) for n in range(2)]
    tracks = [
        odd.Track(odd.plain(50 + 100 * n, *size), disposition=mark)
        for n, (size, mark) in enumerate(zip(sizes, marks, strict=True))
    ]
    frames = read(odd.write(tmp_path / name, *tracks))
    assert frames.shape[1:3] == sizes[chosen]
    assert abs(int(frames.mean()) - 50 - 100 * chosen) < 4


SMALL, LARGE = (48, 64), (96, 128)
SPLICES = {
    "a.h264": "libx264", "b.ts": "libx264", "c.mp4": "libx264", "d.mkv": "libx264",
    "e.webm": "libvpx", "f.mpg": "mpeg2video", "g.avi": "mjpeg", "h.mov": "png",
}  # fmt: skip


@pytest.mark.parametrize("counts", [(3, 40), (40, 12)])
@pytest.mark.parametrize("sizes", [(SMALL, LARGE), (LARGE, SMALL), (SMALL, SMALL[::-1])])
@pytest.mark.parametrize("name", SPLICES)
def test_a_size_that_changes_midway(tmp_path, name, sizes, counts):
    """All frames have the size of the first, whichever are asked for."""
    codec = SPLICES[name]
    fmt = dict(mjpeg="yuvj420p", png="rgb24").get(codec, "yuv420p")
    options = dict(bf="0", g="10") if codec == "libx264" else {}
    parts = [
        odd.plain(level, *size, count)
        for level, size, count in zip((60, 180), sizes, counts, strict=True)
    ]
    path = odd.spliced(tmp_path / name, parts, codec, fmt, options)
    levels = [60] * counts[0] + [180] * counts[1]
    seen = []
    info = video.scan(path, use=lambda frame: seen.append(frame.copy()))
    everything = np.stack(seen)
    n = len(everything)
    assert n >= sum(counts) - 2 and everything.shape == (n, *sizes[0], 3)
    assert (info.height, info.width) == sizes[0]
    got = everything.mean((1, 2, 3))
    np.testing.assert_allclose(got, levels[-n:] if n < len(levels) else levels, atol=4)
    for numbers in ([n - 1], [0, n - 1], [n - 3, n - 2], [1, 2], [counts[0], 0]):
        np.testing.assert_array_equal(read(path, numbers), everything[numbers])


def test_a_rotation_that_changes_midway(tmp_path):
    """Of H.264, where any frame may have one: each is upright, in the shape of the first."""
    path, turned = (odd.film(tmp_path / f"{n}.h264", [QUARTERS] * 12) for n in "ab")
    bsf = "h264_metadata=display_orientation=insert:rotate=90"
    turned.write_bytes(b"".join(data for data, *_ in odd.packets_of(turned, bsf)))
    lying, (h, w) = read(turned), QUARTERS.shape[:2]
    assert lying.shape == (12, w, h, 3)
    for parts, shape in (((path, turned), (h, w)), ((turned, path), (w, h))):
        whole = tmp_path / "c.h264"
        whole.write_bytes(b"".join(one.read_bytes() for one in parts))
        frames = read(whole)
        assert frames.shape == (24, *shape, 3)
        straight, other = frames[:12], frames[12:]
        if parts[0] == turned:
            straight, other = other, straight
        corners = (slice(None), [4, 4, -4, -4], [4, -4, 4, -4], 0)
        np.testing.assert_allclose(straight[corners], [[40, 100, 160, 220]] * 12, atol=4)
        np.testing.assert_allclose(other[corners], lying[corners], atol=4)


@pytest.mark.parametrize("fmts", [("yuvj420p", "yuvj444p"), ("yuvj444p", "yuvj422p")])
def test_a_pixel_format_that_changes_midway(tmp_path, fmts):
    films = [odd.film(tmp_path / f"{fmt}.avi", odd.plain(99), "mjpeg", fmt) for fmt in fmts]
    found = [(data, key) for one in films for data, _, key in odd.packets_of(one)]
    frames = read(odd.remux(tmp_path / "a.mov", films[0], found))
    assert frames.shape == (24, 48, 64, 3) and np.abs(frames.astype(int) - 99).max() < 4


@pytest.mark.parametrize(
    "name, fourcc", [("a.mp4", b"avc1"), ("b.mov", b"avc1"), ("c.avi", b"H264")]
)
def test_a_codec_that_nobody_knows(tmp_path, name, fourcc):
    path = odd.without_decoder(odd.film(tmp_path / name, odd.plain(9)), fourcc)
    assert cause_of(path) == "no_decoder"
    with pytest.raises(video.Unreadable, match="no_decoder"):
        video.probe(path)


def test_a_codec_that_matroska_does_not_know(tmp_path):
    path = odd.film(tmp_path / "a.mkv", odd.plain(9))
    path = odd.without_decoder(path, b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ")
    assert cause_of(path) == "no_decoder"


def test_the_preview_of_an_unknown_codec_is_not_the_film(tmp_path):
    tracks = odd.Track(odd.plain(9, 96, 128)), odd.Track(odd.plain(9, 16, 16), "mpeg4")
    path = odd.without_decoder(odd.write(tmp_path / "a.mp4", *tracks), b"avc1")
    assert cause_of(path) == "no_decoder"


def test_what_the_caller_raises_is_not_the_files_fault(tmp_path):
    path = odd.film(tmp_path / "a.mp4", odd.plain(9))

    def fail(_):
        raise KeyError("a mistake")

    for call in (lambda: video.read_frames(path, fail), lambda: video.scan(path, use=fail)):
        with pytest.raises(KeyError, match="a mistake"):
            call()


@pytest.mark.parametrize("error", [ValueError, AttributeError, OverflowError, IndexError])
def test_whatever_pyav_raises_is_the_files_fault(tmp_path, monkeypatch, error):
    """And it is named."""
    path = odd.film(tmp_path / "a.mp4", odd.plain(9))

    def fail(*_):
        raise error("odd")

    monkeypatch.setattr(upright.Shown, "__call__", fail)
    assert cause_of(path) == "failed"
    with pytest.raises(video.Unreadable, match=f"failed: {error.__name__}: odd"):
        read(path)


MEASURE = """
import resource, sys
import numpy as np
from vtp_jax.data import video
video.probe(sys.argv[2])  # what FFmpeg needs at least, once
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
clip = video.read_frames(sys.argv[1], lambda n: np.arange(int(sys.argv[3])))
print(clip.nbytes, peak() - before)
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """One packet with 60 frames of AV1."""
    folder = tmp_path_factory.mktemp("packed")
    pictures = [np.full((1024, 1024, 3), n * 4, np.uint8) for n in range(60)]
    options = {"preset": "12", "svtav1-params": "lp=1:pred-struct=1", "g": "999"}
    film = odd.film(folder / "a.mkv", pictures, "libsvtav1", "yuv420p", options)
    data = b"".join(data for data, *_ in odd.packets_of(film))
    return odd.ivf(folder / "a.ivf", b"AV01", 1024, [(data, 0)])


def test_a_packet_may_hold_any_number_of_frames(packed):
    """They are decoded one by one: memory has the clip, the decoder's pictures and little else."""
    frames = read(packed, [0, 30, 59])
    np.testing.assert_allclose(frames.mean((1, 2, 3)), [0, 120, 236], atol=4)
    call = [sys.executable, "-c", MEASURE, str(packed), str(packed), "8"]
    size, used = map(int, subprocess.run(call, capture_output=True, check=True).stdout.split())
    assert size == 8 * 1024 * 1024 * 3 and used < 2 * size + 2**25


def test_frames_are_limited_by_number_as_they_are_decoded(packed):
    with pytest.raises(video.Unreadable, match="too_large"):
        video.scan(packed, limits=video.Limits(frames=40))
    read(packed, [30], frames=40)
    with pytest.raises(video.Unreadable, match="too_large"):
        read(packed, [50], frames=40)


def test_memory_has_a_clip_once(tmp_path):
    """Whatever the codec, in a process of its own."""
    pictures = [np.full((512, 512, 3), n, np.uint8) for n in range(100)]
    path = odd.film(tmp_path / "a.mp4", pictures, "libx264", "yuv420p", dict(preset="ultrafast"))
    call = [sys.executable, "-c", MEASURE, str(path), str(path), "100"]
    size, used = map(int, subprocess.run(call, capture_output=True, check=True).stdout.split())
    assert size == 100 * 512 * 512 * 3 and used < 1.5 * size


def test_a_header_that_understates_the_size(tmp_path):
    """The pictures count: for the shape, and for the limits."""
    small = odd.film(tmp_path / "s.webm", odd.plain(60, 16, 16), "libvpx")
    large = odd.film(tmp_path / "l.webm", odd.plain(60, 480, 640), "libvpx")
    found = [(data, key) for data, _, key in odd.packets_of(large)]
    path = odd.remux(tmp_path / "a.webm", small, found)
    assert read(path, [0, 5]).shape == (2, 480, 640, 3)
    size = 3 * 480 * 640
    read(path, [0, 5], bytes=2 * size)
    with pytest.raises(video.Unreadable, match="too_large"):
        read(path, [0, 5], bytes=2 * size - 1)
    assert cause_of(path, pixels=480 * 640 - 1) == "too_large"
