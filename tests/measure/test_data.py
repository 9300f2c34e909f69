"""The cost of a config's input, part by part."""

import json

import numpy as np
import pytest

from vtp_jax import bench
from vtp_jax.data import inputs, shapes, shards, sources
from vtp_jax.measure import data as bench_data
from vtp_jax.setup import config
from vtp_jax.types import UserError


@pytest.fixture(scope="module")
def cfg():
    return config.load("configs/demo.py:tiny")


def test_parts_of_drawn_data_are_measured(cfg, tmp_path, capsys):
    argv = ["--config", "configs/demo.py:tiny", "--clips", "3", "--out", str(tmp_path / "o.jsonl")]
    bench.main(["data", *argv])
    shown = capsys.readouterr().out
    (found,) = map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())
    assert [*found["seconds"]] == ["decode", "transform", "batch", "transfer"]
    assert all(name in shown for name in [*found["seconds"], f"limit: {found['limit']} ("])
    assert found["limit"] == bench_data.limit(found["seconds"], found["cores"])
    assert found["together"] > 0 and found["cores"] >= 1


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_parts_of_read_data_are_measured(cfg, tmp_path, kind):
    shapes.write(tmp_path, shapes.Plan(train=4, val=1, side=32, frames=8), workers=1)
    train = dict(root=str(tmp_path), list=str(tmp_path / "train.csv"))
    if kind == "shards":
        (task,) = inputs.plan_files(sources.load(**train), 9)
        form = shards.Form(every=2)
        for one in shards.begin(tmp_path / "s", [task], form):
            shards.make_shard(one, tmp_path / "s", form)
        shards.finish(tmp_path / "s")
        train = dict(root=str(tmp_path / "s"))
    look = dict(frames=2, stride=2, size=16)
    data = dict(cfg.data, kind=kind, train=train, evals={}, video=look, workers=1)
    found = bench_data.measure(cfg._replace(data=data, batch=8), 4)
    assert [*found["seconds"]] == ["read", "decode", "transform", "batch", "transfer"]
    assert np.isfinite([*found["seconds"].values(), found["together"]]).all()


def test_parallel_parts_limit_less_with_more_workers():
    seconds = dict(read=1.0, decode=6.0, transform=2.0, batch=0.5, transfer=1.0)
    assert [bench_data.limit(seconds, cores) for cores in (1, 8, 16)] == [
        "decode", "decode", "transfer",
    ]  # fmt: skip


def test_a_mistake_is_a_one_line_error():
    with pytest.raises(UserError, match="--clips=0"):
        bench.main(["data", "--config", "configs/demo.py:tiny", "--clips", "0"])
