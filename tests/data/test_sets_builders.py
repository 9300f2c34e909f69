"""Builders of TFDS made from the table, prepared and read again on dummy data."""

import json

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="needs the extra [tfds]")

from vtp_jax.data.sets import builders  # noqa: E402
from vtp_jax.types import UserError  # noqa: E402


def prepare(name, folder):
    import tensorflow_datasets as tfds

    builder = builders.make(name)(data_dir=str(folder / "tfds"))
    config = tfds.download.DownloadConfig(manual_dir=str(folder / "manual"))
    builder.download_and_prepare(download_config=config)
    again = tfds.builder_from_directory(builder.data_dir)
    return {
        split: list(tfds.as_numpy(again.as_dataset(split=split, shuffle_files=False)))
        for split in again.info.splits
    }


@pytest.fixture
def manual(tmp_path):
    (tmp_path / "manual").mkdir()
    return tmp_path / "manual"


def test_rows_and_bytes_come_back(tmp_path, manual):
    (manual / "a_1.0_5.0.mp4").write_bytes(b"\x00video\xff")
    (manual / "b.webm").write_bytes(b"whole")
    rows = [
        dict(qid=1, query="a dog", duration=4, vid="a_1.0_5.0", relevant_windows=[[0, 2], [2, 4]],
             relevant_clip_ids=[1], saliency_scores=[[1, 2, 3]]),
        dict(qid=2, query="a cat", duration=4, vid="b_2.0_6.0", relevant_windows=[[0, 2]],
             relevant_clip_ids=[], saliency_scores=[]),
        dict(qid=3, query="gone", duration=4, vid="c_2.0_6.0", relevant_windows=[[0, 2]],
             relevant_clip_ids=[], saliency_scores=[]),
    ]  # fmt: skip
    (manual / "highlight_val_release.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = prepare("qvhighlights", tmp_path)
    assert list(made) == ["val"]  # the others lack their files
    one, two = sorted(made["val"], key=lambda e: e["id"])  # the third has no video
    assert one["id"] == b"1" and one["video"] == b"\x00video\xff" and one["suffix"] == b".mp4"
    assert list(one["captions"]) == [b"a dog"] and one["label"] == -1
    np.testing.assert_array_equal(one["moments"], [[0, 2], [2, 4]])
    np.testing.assert_array_equal(one["saliency"], [0, 2])
    np.testing.assert_array_equal(one["span"], builders.NO_SPAN)
    np.testing.assert_array_equal(two["span"], [2, 6])
    assert two["origin"] == b"qvhighlights/val"


def test_boxes_come_back_by_person_and_action(tmp_path, manual):
    (manual / "v.mp4").write_bytes(b"x")
    (manual / "ava_val_v2.2.csv").write_text(
        "v,0902,0.1,0.2,0.3,0.4,9,1\nv,0902,0.1,0.2,0.3,0.4,80,1\nv,0903,,,,,,\n"
    )
    one, two = sorted(prepare("ava", tmp_path)["val"], key=lambda e: e["id"])
    np.testing.assert_allclose(one["boxes"]["box"], [[0.1, 0.2, 0.3, 0.4]], rtol=1e-6)
    assert np.asarray(one["boxes"]["actions"][0]).tolist() == [9, 80]
    assert one["boxes"]["person"].tolist() == [1] and len(two["boxes"]["person"]) == 0


def test_errors_are_reported(tmp_path, manual):
    with pytest.raises(UserError, match="no data set 'ssv3'; did you mean 'ssv2'"):
        builders.make("ssv3")
    (manual / "a_test_split4.txt").touch()
    with pytest.raises(UserError, match="hmdb51: no split has all its files below.*Serre"):
        prepare("hmdb51", tmp_path)
