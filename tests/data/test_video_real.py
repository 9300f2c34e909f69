"""The frames that are read are those asked for: in real files."""

from pathlib import Path

import av
import numpy as np
import pytest

from vtp_jax.data import ops, video

REAL = Path(__file__).parents[3] / "shared" / "videos"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="no folder ../shared/videos with real files"
)
# Real files: (frames, height, width) as their README says.
FILES = {
    "arm_wrestling.mp4": (280, 256, 340),
    "hug_1080p.mp4": (72, 1080, 1920),
    "cleaning_pool.mp4": (300, 256, 340),
    "eye_makeup.avi": (164, 240, 320),
    "basketball.mp4": (300, 240, 426),
    "telescope.mp4": (390, 270, 480),  # the larger of two, which is also the default
    "testsrc_av1.mkv": (125, 360, 640),
    "testsrc_h264_10bit.mp4": (30, 200, 200),
    "frames_hevc.mp4": (10, 128, 128),
    "keyboard_rot0.mov": (3, 320, 568),
    "keyboard_rot90.mov": (3, 568, 320),
    "unordered_4frames.mov": (4, 50, 50),
}


@needs_real
@pytest.mark.parametrize("name", FILES)
def test_real_files_are_what_their_readme_says(name):
    frames, h, w = FILES[name]
    info = video.probe(REAL / name)
    assert (info.frames, info.height, info.width) == FILES[name]
    assert video.scan(REAL / name).frames == frames
    wanted = np.asarray([frames - 1, 0, frames // 2])
    assert video.read_frames(REAL / name, lambda n: wanted).shape == (3, h, w, 3)


def decode_all(path, turns=0):
    """PyAV alone, from the start: what `read_frames` must agree with."""
    with av.open(str(path)) as container:
        best = container.streams.best("video")
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(best)]
    return np.rot90(np.stack(frames), turns, (1, 2))


@needs_real
@pytest.mark.parametrize("name", FILES)
def test_requested_frames_of_real_files_are_returned(name):
    """Windows as training asks for them, and frames at random."""
    everything = decode_all(REAL / name) if "rot90" not in name else decode_all(REAL / name, -1)
    n = len(everything)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        for wanted in (rng.integers(0, n, 3), ops.sample_frames(n, 16, min(4, 1 + n // 40), rng)):
            got = video.read_frames(REAL / name, lambda n, wanted=wanted: wanted)
            np.testing.assert_array_equal(got, everything[wanted])


@needs_real
def test_hevc_shows_ten_different_numbers():
    """Each frame shows its own number, so ten different pictures in order are ten right frames."""
    frames = [video.read_frames(REAL / "frames_hevc.mp4", lambda n, i=i: np.asarray([i]))[0]
              for i in range(10)]  # fmt: skip
    assert len({f.tobytes() for f in frames}) == 10
    np.testing.assert_array_equal(np.stack(frames), decode_all(REAL / "frames_hevc.mp4"))
    # The digit is all that differs: the rest of the picture stays as it is.
    spread = np.ptp(np.stack(frames).astype(int), axis=0).max(-1)
    assert spread[40:90, 100:].max() > 100 and spread[:40].max() < 30 and spread[90:].max() < 30


@needs_real
def test_real_rotation_is_honoured():
    """The same stream, with 0 and with 90 degrees in the header."""
    (upright,) = video.read_frames(REAL / "keyboard_rot90.mov", lambda n: np.asarray([0]))
    lying = decode_all(REAL / "keyboard_rot90.mov")[0]
    np.testing.assert_array_equal(upright, np.rot90(lying, -1))


@needs_real
def test_real_damaged_file_is_counted():
    with pytest.raises(video.Unreadable, match="damaged"):
        video.scan(REAL / "corrupted.mp4")
    with pytest.raises(video.Unreadable, match="damaged"):
        video.read_frames(REAL / "corrupted.mp4", lambda n: np.asarray([49]))
    assert len(video.read_frames(REAL / "corrupted.mp4", lambda n: np.arange(20))) == 20
