"""What a stream or a verb lacks is reported before a run, with the error of the run itself."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax import evals
from vtp_jax.run import sharding
from vtp_jax.setup import build, cli
from vtp_jax.types import Mean, Method, State, Stream, UserError

STATE = State(jnp.int32(0), {"scale": jnp.float32(2)}, None, {})
SHAPES = jax.eval_shape(lambda: STATE)
KINDS = sorted(p.stem for p in Path(evals.__file__).parent.glob("[!_]*.py"))
STREAMS = ("val", "val/captions")
BATCH = dict(
    id=np.arange(4, dtype=np.int32),
    valid=np.ones(4, bool),
    video=np.arange(12, dtype=np.uint8).reshape(4, 1, 1, 1, 3),
    text=np.arange(12, dtype=np.int32).reshape(4, 3) + 1,
    maskable=np.ones((4, 3), bool),
    label=np.int32([0, 0, 1, 1]),
    text_mask=np.ones((4, 3), bool),
)


def pixels(batch):
    return batch["video"][:, 0, 0, 0].astype(jnp.float32)


def shown(batch):
    video = batch["video"] / 255.0
    return dict(video=video, hidden=video[..., 0] >= 0, restored={"none": video})


VERBS = dict(
    video=lambda p, e, b: dict(embedding=p["scale"] * pixels(b), memory=pixels(b)),
    text=lambda p, e, b: dict(embedding=jnp.float32(b["text"]), memory=jnp.float32(b["text"])),
    pair=lambda p, e, a, b: dict(score=(a["memory"] * b["memory"]).sum(axis=1)),
    classes=lambda p, e, b: dict(score=jax.nn.softmax(pixels(b))),
    generate=lambda p, e, b: dict(ids=jnp.int32(pixels(b))),
    reconstruct=lambda p, e, b, rng: shown(b),
    loss=lambda p, e, b, rng: dict(loss=Mean.of(p["scale"] * b["text_mask"][:, 0], b["valid"])),
)


def without(verb, key):
    return lambda *args: {k: v for k, v in verb(*args).items() if k != key}


def streams(read=None, **lacking):
    """Two batches each, without a key; `read` collects the stream of each batch that is taken."""

    def batches(name):
        for start in (0, 4):
            if read is not None:
                read.append(name)
            batch = {**BATCH, "id": BATCH["id"] + start}
            yield {k: v for k, v in batch.items() if k != lacking.get(name)}

    return {name: Stream(lambda name=name: batches(name), 8, {}) for name in STREAMS}


def make(kind, encode, data, shapes=None):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    method = Method(lambda *_: {}, lambda *_: (jnp.zeros(()), None), encode)
    return build.evaluators({"a": dict(type=kind, every=1)}, method, data, mesh, shapes)["a"][1]


def error_of(f, *args):
    """The text of the UserError that f raises, or None."""
    try:
        f(*args)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)


def mistakes():
    """Verbs and streams that each lack one thing, and its name."""
    for name, key in itertools.product(STREAMS, BATCH):
        yield key, VERBS, streams(**{name: key})
    keys = dict(video=("embedding", "memory"), text=("embedding", "memory"), loss=())
    keys["reconstruct"] = ("hidden", "restored")
    for name in VERBS:
        yield name, {k: v for k, v in VERBS.items() if k != name}, streams()
        for key in keys.get(name, ("score", "ids")):
            yield key, {**VERBS, name: without(VERBS[name], key)}, streams()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_is_reported_before_a_run_if_and_only_if_the_run_would_find_it(kind):
    found = set()
    for name, encode, data in mistakes():
        here = error_of(make, kind, encode, data, SHAPES)
        assert here == error_of(lambda e, d: dict(make(kind, e, d).run(STATE)), encode, data), name
        assert here is None or f"'{name}'" in here and here.startswith(f"{kind}: "), here
        found |= {name} if here else set()
    reads = dict(
        caption={"generate", "ids", "id", "valid", "video", "text", "maskable"},
        classify={"classes", "score", "label", "valid", "video"},
        mean={"loss", "text_mask", "valid"},
        probe={"video", "embedding", "label", "valid"},
        rerank={"text", "embedding", "memory", "pair", "score", "video", "id", "valid"},
        restoration={"reconstruct", "hidden", "restored", "video", "valid"},
        retrieval={"video", "text", "embedding", "id", "valid"},
    )
    assert found == reads[kind]


def test_all_checks_together_read_one_batch_of_each_stream():
    read = []
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    data = streams(read)
    check = evals.checker(SHAPES, data, mesh)
    for kind in KINDS:
        cli.find("evals", kind)(encode=VERBS, streams=data, mesh=mesh, check=check)
    assert sorted(read) == sorted(STREAMS)


def test_a_stream_without_rows_is_reported():
    empty = {name: Stream(lambda: iter(()), 0, {}) for name in STREAMS}
    with pytest.raises(UserError, match="mean: stream 'val' has no rows"):
        make("mean", VERBS, empty, SHAPES)


def test_a_methods_own_error_is_not_reported_as_the_streams():
    def loss(params, extra, batch, rng):
        return params["gone"]

    with pytest.raises(UserError, match=r"config.evals.a: KeyError: 'gone' \(.*, line \d+\)"):
        make("mean", dict(loss=loss), streams(), SHAPES)


def test_blocks_of_pairs_divide_over_the_devices():
    mesh = sharding.make_mesh()
    with pytest.raises(UserError, match="rerank.block=30 does not divide over 8 devices"):
        cli.find("evals", "rerank")(encode=VERBS, streams=streams(), mesh=mesh, block=30)
