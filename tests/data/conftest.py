"""Small corpora: files, files of which some are unreadable, and shards."""

import json

import pytest

from tests.films import BAD, ROWS
from vtp_jax.data import inputs, shapes, shards, sources


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small corpus of mp4 files; clip 1 has three captions."""
    root = tmp_path_factory.mktemp("corpus")
    shapes.write(root, shapes.Plan(train=ROWS, val=5, side=32, frames=10), workers=1)
    source = shapes.source(shapes.Plan(train=ROWS), "train")
    captions = {clip.path: list(clip.captions) for clip in source.clips}
    captions["train/00001.mp4"] += ["a second caption", "a third"]
    (root / "train.json").write_text(json.dumps(captions))
    return root


@pytest.fixture(scope="session")
def broken(corpus, tmp_path_factory):
    """The same corpus with three unreadable videos."""
    root = tmp_path_factory.mktemp("broken")
    for path in [*corpus.glob("*/*.mp4"), *corpus.glob("*.*s*")]:
        (root / path.relative_to(corpus)).parent.mkdir(exist_ok=True)
        (root / path.relative_to(corpus)).write_bytes(path.read_bytes())
    for index, (_, content) in BAD.items():
        path = root / f"train/{index:05d}.mp4"
        path.unlink() if content is None else path.write_bytes(content)
    return root


@pytest.fixture(scope="session")
def sharded(corpus, tmp_path_factory):
    """The same corpus as shards of five clips each, all frames at high quality."""
    out = tmp_path_factory.mktemp("sharded")
    clips = sources.load(corpus, corpus / "train.json")
    tasks, form = inputs.plan_files(clips, 5), shards.Form(every=1, quality=95, ratio=0.0)
    for task in shards.begin(out, tasks, form):
        shards.make_shard(task, out, form)
    shards.finish(out)
    return out


@pytest.fixture(params=["files", "shapes"])
def root(request, corpus):
    return corpus if request.param == "files" else None
