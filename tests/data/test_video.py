"""The frames that are read are those asked for: in rendered videos that show their numbers."""

import resource
import socket
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import worn
from vtp_jax.data import video

N, SIDE = 120, 64

# name -> (codec, its options, container options): with and without B-frames, open GOPs, frame
# counts in the header (mp4, avi) or not (the others), alternate reference frames.
FORMATS = {
    "b_frames.mp4": ("libx264", dict(bf="3", g="30"), {}),
    "open_gop.mp4": ("libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=30:scenecut=0"}, {}),
    "fragments.mp4": ("libx264", dict(g="30"), dict(movflags="frag_keyframe+empty_moov")),
    "front.mp4": ("libx264", dict(bf="3", g="30"), dict(movflags="faststart")),
    "matroska.mkv": ("libx264", dict(bf="3", g="30"), {}),
    "stream.ts": ("libx264", dict(bf="3", g="30"), {}),
    "mpeg4.avi": ("mpeg4", dict(g="30", bf="2"), {}),
    "vp8.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "30"}, {}),
}


def numbered(count):
    """Frames of eight vertical bars: the number in binary, lowest bit at the left."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1
    rows = np.repeat(bits * 255, SIDE // 8, axis=1).astype(np.uint8)
    return np.broadcast_to(rows[:, None, :, None], (count, SIDE, SIDE, 3)).copy()


def numbers_in(frames):
    bits = frames[:, SIDE // 2, SIDE // 16 :: SIDE // 8].mean(-1) > 127
    return (bits << np.arange(8)).sum(1)


def write(path, codec, options, container_options, count=N, turn=0):
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=Fraction(25), options=options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        for frame in numbered(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module", params=FORMATS)
def file(request, tmp_path_factory):
    codec, options, container_options = FORMATS[request.param]
    return write(tmp_path_factory.mktemp("v") / request.param, codec, options, container_options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("odd")


def test_every_frame_is_read_in_order_in_every_format(file):
    frames = video.read_frames(file, np.arange)
    assert frames.shape == (N, SIDE, SIDE, 3) and frames.dtype == np.uint8
    np.testing.assert_array_equal(numbers_in(frames), np.arange(N))
    assert video.scan(file) == video.probe(file) and video.probe(file).frames == N


@given(wanted=st.lists(st.integers(0, N - 1), min_size=1, max_size=5))
def test_requested_frames_are_returned_in_every_format(file, wanted):
    """Any numbers, in any order, repeated or not: most of these seek."""
    frames = video.read_frames(file, lambda n: np.asarray(wanted))
    np.testing.assert_array_equal(numbers_in(frames), wanted)


@pytest.fixture
def decoded(monkeypatch):
    """The packets that went through a decoder since, as (time stamp, whether in full)."""
    found, real = [], video.Unpack.unpack

    def unpack(self, packet):
        found.append((packet.pts, self.stream.codec_context.skip_frame == "DEFAULT"))
        return real(self, packet)

    monkeypatch.setattr(video.Unpack, "unpack", unpack)
    return found


def test_seeking_is_used_and_decodes_less(tmp_path, decoded):
    path = write(tmp_path / "a.mp4", *FORMATS["b_frames.mp4"])
    (frame,) = video.read_frames(path, lambda n: np.asarray([N - 1]))
    assert numbers_in(frame[None]) == N - 1 and len(decoded) <= 31


def test_what_no_other_frame_needs_is_not_decoded(tmp_path, decoded):
    """Of B-frames, which no other frame needs here, only those that are asked for."""
    options = {"x264-params": "bframes=3:b-pyramid=none:b-adapt=0:keyint=120:scenecut=0"}
    path = write(tmp_path / "a.mp4", "libx264", options, {})
    wanted = np.arange(40, 104, 4)
    got = video.read_frames(path, lambda n: wanted)
    np.testing.assert_array_equal(numbers_in(got), wanted)
    full = sum(whole for _, whole in decoded)
    assert len(wanted) <= full <= len(wanted) + 1 < len(decoded) - 80
    with av.open(str(path)) as container:
        counted = video.count(path, wanted, video.LIMITS, video.start_clock(60.0))
        assert container.streams.video[0].frames == N
    np.testing.assert_array_equal(got, counted)


@pytest.fixture
def demuxed(monkeypatch):
    """The packets that were read since, decoded or not."""
    found, real = [], video.demux

    def demux(*args):
        for packet in real(*args):
            found.append(packet.pts)
            yield packet

    monkeypatch.setattr(video, "demux", demux)
    return found


@pytest.mark.parametrize("name", ["b_frames.mp4", "open_gop.mp4", "front.mp4"])
def test_the_cost_of_a_clip_does_not_depend_on_its_place(tmp_path, demuxed, name):
    """Packets long before are not read, where the header has their places."""
    path = write(tmp_path / "a.mp4", *FORMATS[name], count=240)
    for wanted in (np.arange(90, 98, 2), np.arange(230, 238, 2)):
        demuxed.clear()
        got = video.read_frames(path, lambda n, wanted=wanted: wanted)
        np.testing.assert_array_equal(numbers_in(got), wanted)
        assert len(demuxed) < 180


@pytest.mark.parametrize("wrong", [KeyError, video.Lost])
def test_an_index_that_lies_does_not_mislead(tmp_path, monkeypatch, wrong):
    """Packets that are not those of the index are counted from the start."""
    path, index = write(tmp_path / "a.mp4", *FORMATS["b_frames.mp4"]), video.survey

    def survey(*args):
        table = index(*args)
        by = 1 if wrong is KeyError else table.keys[1][1] - table.keys[0][1]
        return table._replace(keys=[(n, at + by) for n, at in table.keys])

    monkeypatch.setattr(video, "survey", survey)
    wanted = np.asarray([100, 103, 119])
    np.testing.assert_array_equal(numbers_in(video.read_frames(path, lambda n: wanted)), wanted)


@pytest.mark.parametrize("start", [30, 40])
def test_frames_outside_an_edit_list_are_not_counted(tmp_path, start):
    """As of videos that were trimmed without being encoded again: frames before are hidden."""
    whole, path = write(tmp_path / "w.mp4", *FORMATS["b_frames.mp4"]), tmp_path / "a.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w") as container:
        old = source.streams.video[0]
        new = container.add_stream_from_template(old)
        for packet in source.demux(old):
            if packet.size:
                by = round(start / 25 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - by, packet.dts - by, new
                container.mux(packet)
    assert video.probe(path).frames == video.scan(path).frames == N - start
    for wanted in (np.asarray([0, 1, N - start - 1]), np.arange(60, 70)):
        got = video.read_frames(path, lambda n, wanted=wanted: wanted)
        np.testing.assert_array_equal(numbers_in(got), wanted + start)


def test_wrong_time_stamps_do_not_mislead(tmp_path, monkeypatch):
    """If frames do not come in the order of their time stamps, they are counted from the start."""
    path = write(tmp_path / "a.mp4", *FORMATS["b_frames.mp4"])
    real = video.tabulate

    def swapped(*args):
        table = real(*args)
        return table._replace(numbers={time: n ^ 1 for time, n in table.numbers.items()})

    monkeypatch.setattr(video, "tabulate", swapped)
    wanted = np.asarray([2, 90, 110])
    np.testing.assert_array_equal(numbers_in(video.read_frames(path, lambda n: wanted)), wanted)


@pytest.mark.parametrize("turn", [0, 90, 180, -90])
def test_rotated_videos_are_read_upright(tmp_path, turn):
    """The container has the turn to the left; frame 1 is white at its left before it."""
    path = write(tmp_path / "a.mp4", "libx264", {}, {}, count=3, turn=turn)
    (frame,) = video.read_frames(path, lambda n: np.asarray([1]))
    np.testing.assert_allclose(frame, np.rot90(numbered(2)[1], turn // 90), atol=12)
    assert video.probe(path).turn % 360 == turn % 360


def cause_of(path, wanted=(0,), **limits):
    with pytest.raises(video.Unreadable) as caught:
        video.read_frames(path, lambda n: np.asarray(wanted), video.Limits(**limits))
    assert caught.value.cause in video.CAUSES
    return caught.value.cause


def test_unreadable_files_are_reported_by_cause(folder):
    assert cause_of(folder / "absent.mp4") == "missing"
    assert cause_of(folder) == "missing"
    assert cause_of("http://127.0.0.1/a.mp4") == "missing"
    (folder / "empty.mp4").write_bytes(b"")
    assert cause_of(folder / "empty.mp4") == "not_a_video"
    (folder / "text.mp4").write_text("not a video " * 100)
    assert cause_of(folder / "text.mp4") == "not_a_video"


def test_audio_alone_has_no_video_stream(folder):
    path = folder / "sound.mp4"
    worn.write_sound(path)
    assert cause_of(path) == "no_video_stream"


def test_playlists_open_no_other_file(folder):
    inner = write(folder / "inner.ts", *FORMATS["stream.ts"], count=5)
    (folder / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{inner}\n#EXT-X-ENDLIST\n")
    (folder / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {inner}\n")
    assert cause_of(folder / "list.mp4") == "not_a_video"
    assert cause_of(folder / "concat.mp4") == "not_a_video"


LURES = {
    "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}/a.ts\n#EXT-X-ENDLIST\n",
    "hls.avi": "#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\nconcat:{url}/a|file:///etc/passwd\n",
    "concat.mp4": "ffconcat version 1.0\nfile {url}/a.mp4\n",
    "stream.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "dash.mp4": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
    "<BaseURL>{url}/</BaseURL><Period><AdaptationSet><Representation><BaseURL>a.mp4</BaseURL>"
    "</Representation></AdaptationSet></Period></MPD>",
    "smil.mkv": '<smil><body><video src="{url}/a"/></body></smil>',
    "rtsp.mov": "RTSPtext\nrtsp://127.0.0.1:{port}/a\n",
}


@pytest.mark.parametrize("as_bytes", [False, True], ids=["file", "bytes"])
def test_no_file_reaches_the_network(folder, as_bytes):
    """Playlists and the like that name a listening host: it is not contacted, each is rejected."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        for name, text in LURES.items():
            content = text.format(url=f"http://127.0.0.1:{port}", port=port).encode()
            (folder / name).write_bytes(content)
            assert cause_of(content if as_bytes else folder / name) == "not_a_video", name
        with pytest.raises(BlockingIOError):
            server.accept()
    for url in (f"http://127.0.0.1:{port}/a", "concat:a|b", "subfile,,start,0,end,9,,:a", "pipe:0"):
        assert cause_of(url) == "missing"


def enlarge(codec, data, side):
    """A picture whose header claims `side` x `side` pixels."""
    if codec == "mjpeg":
        at = data.index(b"\xff\xc0") + 5
        return data[:at] + side.to_bytes(2, "big") * 2 + data[at + 4 :]
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


@pytest.mark.parametrize("codec, fmt", [("mjpeg", "yuvj420p"), ("png", "rgb24")])
def test_a_picture_that_claims_to_be_huge_is_not_allocated(folder, codec, fmt):
    """30,000 x 30,000 pixels, in a file of a few kB whose container has 64 x 64."""
    path = folder / f"{codec}.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, fmt
        for n, frame in enumerate(numbered(4)):
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                new = av.Packet(enlarge(codec, bytes(packet), 30000) if n else bytes(packet))
                new.stream, new.time_base = stream, packet.time_base
                new.pts, new.dts, new.is_keyframe = packet.pts, packet.dts, True
                container.mux(new)
    assert path.stat().st_size < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cause_of(path, (3,)) in ("damaged", "too_large")
    with pytest.raises(video.Unreadable):
        video.scan(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_decoding_has_an_end(folder):
    """Time, and the memory of what is asked for at once, are limited."""
    path = write(folder / "long.mp4", *FORMATS["front.mp4"])
    assert cause_of(path, (0, N - 1), seconds=0.0) == "too_slow"
    size = 3 * SIDE * SIDE * 3
    for wanted in ((0, 5, 9), (0, 5, 5)):
        assert cause_of(path, wanted, bytes=size - 1) == "too_large"
        video.read_frames(path, lambda n, w=wanted: np.asarray(w), video.Limits(bytes=size))
    with pytest.raises(video.Unreadable, match="too_slow"):
        video.scan(path, limits=video.Limits(seconds=0.0))


def promise_in_a_fragment(data, count):
    """An mp4 in fragments, of which the first promises `count` frames and has none of them."""
    at = data.index(b"trun") + 4
    return data[:at] + struct.pack(">II", 1, count) + data[at + 8 :]


@pytest.mark.parametrize("count", [3_000_000, 30_000_000, 150_000_000])
def test_frames_that_are_only_promised_cost_nothing(folder, count):
    """Files of a few kB whose tables promise millions of frames: FFmpeg allocates all of them
    when it opens a file, 35 bytes each."""
    path = write(folder / "plain.mp4", "libx264", {}, {}, count=8)
    pieces = write(folder / "pieces.mp4", *FORMATS["fragments.mp4"], count=8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bomb = worn.promise(path.read_bytes(), count)
    for data in (bomb, promise_in_a_fragment(pieces.read_bytes(), max(count, 8_000_000))):
        assert len(data) < 10_000 and cause_of(data) == "too_large"
        with pytest.raises(video.Unreadable, match="too_large"):
            video.scan(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def empty_packets(count):
    """An endless file without frames, of unknown length."""
    header = struct.pack("<4sHH4sHHIIII", b"DKIF", 0, 32, b"VP80", SIDE, SIDE, 25, 1, 0, 0)
    return header + b"".join(struct.pack("<IQ", 0, n) for n in range(count))


def test_packets_without_frames_have_an_end(monkeypatch):
    """They are limited by time, and packets by number, where no header promises any."""
    data = empty_packets(20_000)
    assert cause_of(data) == "no_frames"
    with pytest.raises(video.Unreadable, match="too_slow"):
        video.scan(data, limits=video.Limits(seconds=0.0))
    monkeypatch.setattr(video, "start_clock", lambda seconds, real=video.start_clock: real(0.0))
    assert cause_of(data) == "too_slow"


def test_more_frames_than_allowed_are_rejected(file):
    """By the header's number, or by counting."""
    video.probe(file, video.Limits(frames=N))
    assert cause_of(file, frames=N - 1) == "too_large"


def test_a_read_that_does_not_end_is_given_up(file, monkeypatch):
    """By the clock: no core is busy while a disk is waited for."""
    monkeypatch.setattr(video, "PATIENCE", 1e-10)
    assert cause_of(file) == "too_slow"
    monkeypatch.undo()
    ticks = iter([0.0, *[10 * video.LIMITS.seconds + 1] * 1000])
    monkeypatch.setattr(video.time, "monotonic", lambda: next(ticks))
    assert cause_of(file) == "too_slow"


def test_clips_wait_for_room_in_memory(file, monkeypatch):
    """Eight at once, of which two have room: all are read, and never more are held."""
    size, held, most = 3 * SIDE * SIDE * 2, [], []
    room, real = video.Room(2 * size + 1), video.Sheet.put
    monkeypatch.setattr(video, "ROOM", room)

    def put(sheet, *args):
        held.append(sheet)
        most.append(len(set(map(id, held))))
        real(sheet, *args)
        if len(sheet.done) == len(sheet.wanted):
            held[:] = [one for one in held if one is not sheet]

    monkeypatch.setattr(video.Sheet, "put", put)
    with ThreadPoolExecutor(8) as pool:
        wanted = [np.asarray([3, 90])] * 8
        found = list(pool.map(lambda one: video.read_frames(file, lambda n: one), wanted))
    assert max(most) <= 2 and room.left == 2 * size + 1
    assert all((numbers_in(frames) == [3, 90]).all() for frames in found)


def test_bytes_in_memory_read_like_a_file(file):
    wanted = np.asarray([3, N - 1, 40])
    got = video.read_frames(file.read_bytes(), lambda n: wanted)
    np.testing.assert_array_equal(got, video.read_frames(file, lambda n: wanted))


def test_frames_above_the_limit_are_too_large(folder):
    path = write(folder / "big.mp4", "libx264", {}, {}, count=2)
    assert cause_of(path, pixels=SIDE * SIDE - 1) == "too_large"
    video.probe(path, video.Limits(pixels=SIDE * SIDE))


def cut(path, share):
    data = path.read_bytes()
    short = path.with_name(f"cut_{path.name}")
    short.write_bytes(data[: int(len(data) * share)])
    return short


def test_a_truncated_file_gives_its_complete_frames_only(folder):
    """An mp4 with its header in front, cut at 60 %: early frames are there, late ones not."""
    path = cut(write(folder / "front.mp4", *FORMATS["front.mp4"]), 0.6)
    wanted = np.asarray([0, 5, 20])
    np.testing.assert_array_equal(numbers_in(video.read_frames(path, lambda n: wanted)), wanted)
    assert cause_of(path, (0, N - 1)) == "damaged"
    with pytest.raises(video.Unreadable, match="damaged"):
        video.scan(path)


def test_a_cut_without_a_decoding_error_is_truncated(folder):
    """An avi, cut: its header promises all frames, and the data just ends."""
    path = cut(write(folder / "a.avi", *FORMATS["mpeg4.avi"]), 0.6)
    assert cause_of(path, (N - 1,)) == "truncated"
    assert cause_of(cut(write(folder / "back.mp4", *FORMATS["b_frames.mp4"]), 0.6)) == "not_a_video"


def test_a_header_that_promises_slightly_too_many_frames_is_corrected(tmp_path, monkeypatch):
    """The choice is made again, with the true length."""
    path = write(tmp_path / "a.mp4", *FORMATS["b_frames.mp4"])
    real = video.survey
    monkeypatch.setattr(video, "survey", lambda *a: real(*a)._replace(frames=N + 5))
    lengths = []
    frames = video.read_frames(path, lambda n: lengths.append(n) or np.asarray([0, n - 1]))
    assert lengths == [N + 5, N]
    np.testing.assert_array_equal(numbers_in(frames), [0, N - 1])
