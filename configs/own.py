"""SimVTP on your own videos with captions, a few hundred or many thousands, from nothing.

    vtp train --config own --workdir runs/mine \
        --config.data.train.root=DIR --config.data.train.list=mine.csv

The list has columns path and caption (docs/data.md has the other forms). Without a list, the folder
has one, or captions beside the videos: those of a.mp4 in a.txt, one a line. For shards:
--config.data.kind=shards --config.data.train.root=SHARDS.

What the data and the machine decide is chosen when the run begins, and shown: the frames and pixels
of a clip, the length of captions, the size of the net, batch, steps and rate (`auto` below). A flag
that sets one of them wins. A tenth of the videos, by a hash of their paths, is held out: its losses
and retrieval are measured at every tenth of the run. The tokenizer is trained on the captions of
the others, unless --config.data.text.path names one.

    switch  what it does
    tiny    a small net on clips drawn in memory: any machine, a minute or two

The method and its weights are those of configs/simvtp/pretrain_webvid.py. Nets that start from
nothing need many videos: retrieval from a few thousand is far from that of published models.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtp_jax.setup.recipes import DECAY, SHARDING, parse_arg, share


def get_config(arg: str = "") -> ConfigDict:
    switches = parse_arg(arg, "tiny")
    c = ConfigDict()
    c.seed = 0
    c.steps = 20_000
    c.batch = 64
    c.auto = (
        "data.video.frames", "data.video.stride", "data.video.size", "data.text.vocab_size",
        "data.text.length", "method.size", "method.decoder", "method.cube", "method.video_ratio",
        "method.dtype", "batch", "steps", "optim.lr.peak",
    )  # fmt: skip

    c.data = ConfigDict()
    c.data.kind = "files"
    c.data.train = dict(
        root="videos",
        list=placeholder(str),
        path_column="path",
        caption_column="caption",
        held_out=0.1,
    )
    # The same set: whatever a flag changes of it.
    same = {name: c.data.train.get_oneway_ref(name) for name in c.data.train}
    c.data.evals = dict(val=same)
    c.data.video = dict(frames=16, stride=4, size=224, crop="multiscale")
    c.data.text = dict(kind="sentencepiece", path=None, length=32, vocab_size=8000)
    c.data.max_failed = 0.05

    c.method = ConfigDict()
    c.method.name = "simvtp"
    c.method.size = "S"
    c.method.decoder = None
    c.method.cube = (2, 16, 16)
    c.method.video_ratio = 0.9
    c.method.text_ratio = 0.75
    c.method.dtype = "bfloat16"

    c.optim = ConfigDict()
    c.optim.lr = dict(
        kind="warmup_cosine", peak=4e-4, end=1e-5, warmup=share(c, 1, 20), steps=share(c, 1, 1)
    )
    c.optim.betas = (0.9, 0.95)
    c.optim.weight_decay = 0.05
    c.optim.rules = DECAY

    c.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1)
    c.sharding = SHARDING
    tenth = share(c, 1, 10) + 1  # checkpoints are ranked where they are evaluated
    c.evals = ConfigDict()
    c.evals.retrieval = dict(type="retrieval", stream="val", every=tenth)
    c.evals.val = dict(type="mean", stream="val", every=tenth)
    c.checkpoint = dict(every=tenth, keep=2, best=("retrieval/t2v_r1", "max"))
    c.log = dict(every=20)

    if "tiny" in switches:
        shrink(c)
    return c


def shrink(c: ConfigDict) -> None:
    """The same recipe, small enough for any machine."""
    c.auto = ()
    c.steps, c.batch = 20, 16
    c.data.kind = "shapes"
    c.data.train = dict(clips=256)
    c.data.evals = dict(val=dict(clips=32))
    c.data.video = dict(frames=8, stride=2, size=32, crop="multiscale")
    c.data.text = dict(kind="sentencepiece", path=None, length=24)
    c.method.update(size="tiny", cube=(2, 8, 8), video_ratio=0.75, dtype="float32")
    c.optim.lr.peak = 1e-3
    c.log.every = 5
