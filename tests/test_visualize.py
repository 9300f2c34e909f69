"""The pictures of a run: which rows and captions are drawn, and how they are described."""

import json

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.configs import blank
from vtp_jax import visualize
from vtp_jax.run import sharding
from vtp_jax.setup import build
from vtp_jax.show import draw, pictures
from vtp_jax.show.draw import Answer, Words
from vtp_jax.types import Data, Method, State, Stream, UserError


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 12))
def test_failures_are_shown_first_and_successes_too(ranks, count):
    asked = [Answer("", i, rank, [], []) for i, rank in enumerate(ranks)]
    shown = pictures.choose(asked, count)
    assert len(shown) == min(count, len(ranks)) == len({a.own for a in shown})
    failed = [a.rank for a in shown if a.rank > 1]
    assert [a.rank for a in shown] == sorted(failed, reverse=True) + [1] * (
        len(shown) - len(failed)
    )
    assert not failed or failed[0] == max(ranks)
    if count > 2 and 1 in ranks:
        assert len(failed) < len(shown)


# A whole run of a net that restores by a rule: hidden cubes are inverted, hidden words are "blue".

WORD = ["", "", "[MASK]", "red", "blue", "disc"]


def reconstruct(params, extra, batch, rng=None):
    video = batch["video"].astype(jnp.float32) / 255
    hidden = jnp.zeros(video.shape[:4], bool).at[:, :, :16].set(True)
    text_hidden = batch["text"] >= 4
    return {
        "video": video,
        "hidden": hidden,
        "restored": {
            "visible": jnp.where(hidden[..., None], 1 - video, video),
            "true": video,
            "normalised": jnp.where(hidden[..., None], 0.5, video),
        },
        "text": batch["text"],
        "masked_text": jnp.where(text_hidden, 2, batch["text"]),
        "predicted_text": jnp.where(text_hidden, 4, batch["text"]),
        "text_hidden": text_hidden,
    }


def encode_video(params, extra, batch, rng=None):
    return {"embedding": params["video"][batch["video"][:, 0, 0, 0, 0].astype(jnp.int32)]}


def encode_text(params, extra, batch, rng=None):
    return {"embedding": params["video"][batch["id"]]}


def run_of(rows=20, unreadable=(0, 7)):
    valid = ~np.isin(np.arange(24), [*unreadable, *range(rows, 24)])

    def batches():
        for start in range(0, 24, 8):
            at = np.arange(start, start + 8)
            text = np.tile(np.array([1, 3, 4, 5, 1, 0], np.int32), (8, 1))
            yield {
                "id": at.astype(np.int32),
                "valid": valid[at],
                "video": np.broadcast_to(
                    at.astype(np.uint8)[:, None, None, None, None], (8, 2, 32, 32, 3)
                ),
                "text": text,
                "text_mask": text > 0,
                "maskable": text > 2,
            }

    stream = Stream(batches, rows, {"path": [f"videos/{i}.mp4" for i in range(rows)]})
    encode = dict(video=encode_video, text=encode_text, reconstruct=reconstruct)
    params = {"video": jax.random.normal(jax.random.key(0), (24, 8))}
    return build.Run(
        blank(),
        Data(
            {},
            lambda step: iter(()),
            rows,
            {"val": stream},
            {},
            lambda ids: [" ".join(WORD[i] for i in row if WORD[i]) for row in np.asarray(ids)],
        ),
        Method(lambda *a: {}, lambda *a: None, encode),
        sharding.make_mesh(),
        State(jnp.int32(3), params, {}, {}),
    )


def test_readable_videos_are_drawn_and_described(tmp_path):
    run = run_of()
    made = pictures.write(run, run.data.streams, "val", tmp_path, clips=11, questions=4)
    assert made == json.loads((tmp_path / "index.json").read_text())
    titles = [one["title"] for one in made["reconstructions"]]
    assert titles == [f"{i}.mp4" for i in range(13) if i not in (0, 7)]
    assert made["note"] == pictures.STATISTICS["visible"]
    for one in made["reconstructions"]:
        assert (one["words_right"], one["words_hidden"]) == (1, 2)
        Image.open(tmp_path / one["animation"]).verify()
    for one in made["reconstructions"] + made["retrieval"]:
        Image.open(tmp_path / one["picture"]).verify()
    assert [(one["rank"], one["caption"]) for one in made["retrieval"]] == [
        (1, "red blue disc")
    ] * 4


def without(run, *verbs):
    left = {k: v for k, v in run.method.encode.items() if k not in verbs}
    return run._replace(method=run.method._replace(encode=left))


def test_what_a_method_cannot_do_is_not_drawn(tmp_path):
    """VideoMAE reads no words, and CoCa restores no pixels."""
    run = run_of()
    words = ("text", "masked_text", "predicted_text", "text_hidden", "text_mask", "maskable")

    def silent(*args):
        return {k: v for k, v in reconstruct(*args).items() if k not in words}

    def mute():
        for batch in run.data.streams["val"].batches():
            yield {k: v for k, v in batch.items() if k not in words}

    streams = {"val": run.data.streams["val"]._replace(batches=mute)}
    pixels = without(run, "text", "reconstruct")
    pixels.method.encode["reconstruct"] = lambda p, e, b, r: silent(p, e, {**b, "text": b["id"]}, r)
    made = pictures.write(pixels, streams, "val", tmp_path, clips=2)
    assert len(made["reconstructions"]) == 2 and not made["retrieval"]
    assert [one["words_hidden"] for one in made["reconstructions"]] == [0, 0]

    made = pictures.write(without(run, "reconstruct"), run.data.streams, "val", tmp_path)
    assert len(made["retrieval"]) == 9 and not made["reconstructions"]
    with pytest.raises(UserError, match="nothing to draw"):
        pictures.write(without(run, "reconstruct", "text"), run.data.streams, "val", tmp_path)


@pytest.mark.parametrize("statistics", [None, "visible", "true", "normalised"])
def test_the_chosen_statistics_are_drawn(statistics):
    run = run_of()
    clip = pictures.restore(run, run.data.streams["val"], 3, statistics)[2]
    expected = {None: 255 - 3, "visible": 255 - 3, "true": 3, "normalised": 128}[statistics]
    assert clip.id == 3 and np.all(clip.restored[clip.hidden] == expected)
    assert np.all(clip.restored[~clip.hidden] == 3)
    assert clip.words == Words(
        ["red", "blue", "disc"], ["red", "blue", "blue"], [False, True, True]
    )


def test_predicted_pixels_are_drawn_without_statistics():
    run = run_of()
    normalised = run.method.encode["reconstruct"]

    def pixels(*args):
        found = normalised(*args)
        return {**found, "restored": {"none": found["restored"]["visible"]}}

    run.method.encode["reconstruct"] = pixels
    clip = pictures.restore(run, run.data.streams["val"], 3)[2]
    assert clip.statistics == "none" and np.all(clip.restored[clip.hidden] == 255 - 3)
    own, none, visible = (
        np.asarray(image)
        for image in (
            pictures.storyboard(clip),
            draw.storyboard(clip, pictures.STATISTICS["none"]),
            draw.storyboard(clip, pictures.STATISTICS["visible"]),
        )
    )
    assert np.array_equal(own, none) and not np.array_equal(own, visible)
    with pytest.raises(UserError, match="statistics 'true'.*there are only none"):
        pictures.restore(run, run.data.streams["val"], 3, "true")


def test_an_unreadable_stream_is_a_one_line_error(tmp_path):
    run = run_of(unreadable=range(24))
    with pytest.raises(UserError, match="none of the videos can be read"):
        pictures.write(run, run.data.streams, "val", tmp_path)


def write_video(path, color):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(12):
            frame = np.full((48, 64, 3), color, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_given_files_become_streams(tmp_path):
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", 60 * i + 40)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    paths = [str(tmp_path / name) for name in ("0.mp4", "broken.mp4", "2.mp4")]
    cfg = blank(
        data=dict(
            kind="shapes",
            train=dict(clips=24),
            video=dict(frames=4, stride=1, size=32, views=[2, 3]),
            text=dict(kind="sentencepiece", length=12),
        )
    )
    run = run_of()._replace(config=cfg)
    for captions in (["a red disc", "a disc", "a square"], None):
        streams = visualize.given(run, paths, captions)
        (batch,) = streams["given"].batches()
        assert batch["valid"].tolist() == [True, False, True] + [False] * 5
        assert batch["video"].shape == (8, 4, 32, 32, 3)
        assert abs(int(batch["video"][2].mean()) - 160) < 6
        (texts,) = streams["given/captions"].batches()
        assert texts["maskable"][:3].any() == (captions is not None)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--captions", "a disc"], "needs --videos"),
        (["--statistics", "tru"], "did you mean 'true'"),
        (["--videos", "x.mp4"], "no run in"),
        (["--vidoes", "x.mp4"], "did you mean '--videos'"),
    ],
)
def test_wrong_arguments_are_one_line_errors(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        visualize.main(["--workdir", str(tmp_path), *argv])
