"""Odd but plausible files: mirrored, with covers, of sizes that change, without a decoder."""

import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition

ONE = 1 << 16  # of a display matrix


class Track(NamedTuple):
    """A stream of pictures "h w c" of one size."""

    pictures: Sequence[np.ndarray]
    codec: str = "libx264"
    fmt: str = "yuv420p"
    options: Mapping[str, str] | None = None
    disposition: Disposition | None = None


PICTURE = [np.full((32, 40, 3), 255, np.uint8)]
COVER = Track(PICTURE, "mjpeg", "yuvj420p", disposition=Disposition.attached_pic)


def write(path, *tracks, sound=False):
    """Writes several streams, and silence as the last."""
    with av.open(str(path), "w") as container:
        made = []
        for track in tracks:
            stream = container.add_stream(track.codec, rate=25, options=dict(track.options or {}))
            stream.height, stream.width = track.pictures[0].shape[:2]
            stream.pix_fmt = track.fmt
            if track.disposition is not None:
                stream.disposition = track.disposition
            pictures = map(np.ascontiguousarray, track.pictures)
            made.append((stream, [av.VideoFrame.from_ndarray(x, format="rgb24") for x in pictures]))
        if sound:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.float32), "fltp", "mono")
            frame.rate = 16000
            made.append((container.add_stream("aac", rate=16000), [frame]))
        for stream, frames in made:
            for frame in (*frames, None):
                container.mux(stream.encode(frame))
    return path


def film(path, pictures, *how):
    return write(path, Track(pictures, *how))


def plain(level, h=48, w=64, count=12):
    return [np.full((h, w, 3), level, np.uint8)] * count


def packets_of(path, bsf=None):
    """The packets of a file's video as (bytes, time stamp, whether it is a key frame)."""
    found = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        filters = bsf and av.BitStreamFilterContext(bsf, stream)
        for packet in container.demux(stream):
            for one in filters.filter(packet) if bsf and packet.size else [packet]:
                if one.size:
                    found.append((bytes(one), one.pts, one.is_keyframe))
    return found


def remux(path, template, packets):
    """Writes packets (bytes, whether it is a key frame) to a container of any kind."""
    with av.open(str(template)) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        stream.time_base = Fraction(1, 25)
        for n, (data, key) in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.is_keyframe = stream, key
            packet.time_base, packet.pts = Fraction(1, 25), n
            packet.dts, packet.duration = packet.pts, 1
            container.mux(packet)
    return path


def spliced(path, parts, codec="libx264", fmt="yuv420p", options=None):
    """One stream of the pictures of several parts, whose sizes differ, in the container of `path`;
    of raw H.264, MPEG-TS or MPEG-PS, one file after the other."""
    files = [
        film(path.with_name(f"part{n}{path.suffix}"), one, codec, fmt, options)
        for n, one in enumerate(parts)
    ]
    if path.suffix in (".h264", ".ts", ".mpg"):
        path.write_bytes(b"".join(one.read_bytes() for one in files))
        return path
    bsf = "h264_mp4toannexb" if codec == "libx264" and path.suffix in (".mp4", ".mkv") else None
    found = [(data, key) for one in files for data, _, key in packets_of(one, bsf)]
    return remux(path, files[0], found)


def with_matrix(path, a, b, c, d, h=48, w=64):
    """Replaces the display matrix of an mp4's track: x' = ax + cy, y' = bx + dy."""
    data = path.read_bytes()
    at = data.index(b"tkhd") + 44
    corners = [(a * x + c * y, b * x + d * y) for x in (0, w) for y in (0, h)]
    left, top = (round(-min(side) * ONE) for side in zip(*corners, strict=True))
    a, b, c, d = (round(one * ONE) for one in (a, b, c, d))
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, left, top, 1 << 30)
    path.write_bytes(data[:at] + matrix + data[at + 36 :])
    return path


def without_decoder(path, fourcc, new=b"zzzz"):
    """Replaces the code that names a codec."""
    path.write_bytes(path.read_bytes().replace(fourcc, new))
    return path


def ivf(path, codec, side, packets):
    """Writes packets (bytes, time stamp) as they are."""
    header = struct.pack("<4sHH4sHHIIII", b"DKIF", 0, 32, codec, side, side, 25, 1, len(packets), 0)
    body = b"".join(struct.pack("<IQ", len(data), at) + data for data, at in packets)
    path.write_bytes(header + body)
    return path
