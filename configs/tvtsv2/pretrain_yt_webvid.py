"""TVTSv2 on YT-Temporal and WebVid-2M, from CLIP (Zeng et al., arXiv 2305.14173): the released
settings.

    vtp train --config tvtsv2/pretrain_yt_webvid --workdir runs/tvtsv2 \
        --config.data.train.root=DIR --config.data.train.list=yt.csv \
        --config.data.also.webvid.train.root=DIR

The run starts from CLIP. Import its file once:

    vtp convert import --from ViT-B-16.pt --format clip --out weights/clip_b16
    vtp convert import --from ViT-B-32.pt --format clip --out weights/clip_b32
    vtp convert import --from open_clip_pytorch_model.bin --format open_clip \
        --out weights/open_clip_h14

YT-Temporal: the code takes four segments of 3 to 5 seconds, 1 second apart, out of an hour. Here
each file holds four such segments, cut in advance, and the list has four rows per file, in order:
the transcript of each. Three frames of each segment are shown, twelve in total. Batches of WebVid,
twelve frames with one caption, alternate with these. Frames are a second apart, crops are the
pipeline's; the code draws twelve frames from equal parts of the whole, and squares of 224 pixels
out of 268.

    switch    what it does
              ViT-B/16, half of the tubes dropped, 12 clips on each of 80 GPUs
    B32       patches of 32, none dropped, 24 clips a GPU
    H14       OpenCLIP's H/14, 180 of 256 tubes dropped, 2 clips a GPU
    official  the reference's quirks too (listed in methods/tvtsv2.py)
    scratch   random initial weights, and therefore nothing frozen and one rate
    tiny      from scratch, a small net on clips drawn in memory, four in a row: any machine, under
              a minute

Published, zero-shot: MSR-VTT R@1 B/32 34.5, B/16 35.9, H/14 38.2. The number of rows in an epoch is
not published; this config assumes a million, which also determines the steps. The code adds Adam's
eps before the bias correction of the moments, and decays after the step.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from vtp_jax.setup.recipes import (
    DECAY,
    NO_DECAY,
    SPLIT_BLOCKS,
    SPLIT_REST,
    parse_arg,
    pick,
    share,
)

PIECES = 4
NEW = r"visual/encoder/blocks/(time_attn|norm_time)/.*|sorter/.*"
SPLIT_TIME = [(r.replace("/attn/", "/time_attn/"), s) for r, s in SPLIT_BLOCKS if "/attn/" in r]


class Recipe(NamedTuple):
    """clips: per GPU, of 80; ratio: of places dropped; depth: of the text tower; clip: the folder
    of CLIP's weights."""

    size: str = "B"
    patch: int = 16
    features: int = 512
    clips: int = 12
    ratio: float = 0.5
    depth: int = 12
    clip: str = "clip_b16"
    act: str = "quick_gelu"


RECIPES = {
    "B16": Recipe(),
    "B32": Recipe(patch=32, clips=24, ratio=0.0, clip="clip_b32"),
    "H14": Recipe(
        size="H", patch=14, features=1024, clips=2, ratio=180 / 256, depth=24, clip="open_clip_h14",
        act="gelu",
    ),
}  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    switches = parse_arg(arg, "B32", "H14", "official", "scratch", "tiny")
    recipe, gpus = pick(switches, RECIPES, "B16"), 80

    c = ConfigDict()
    c.seed = 0
    c.batch = recipe.clips * gpus
    epoch = 2 * (1_000_000 // c.get_ref("batch"))  # steps: the two sources alternate
    c.steps = 10 * epoch
    c.warm_start = ((f"weights/{recipe.clip}", r"params/(visual|text)/(.*)", r"params/\1/\2"),)
    c.fresh = (rf"params/({NEW})", "params/visual/time_position")

    c.data = ConfigDict()
    c.data.kind = "files"
    c.data.train = dict(root="data/yt", list="data/yt/train.csv", pieces=PIECES)
    c.data.video = dict(frames=3, stride=25, size=224, crop="multiscale")
    c.data.also = dict(
        webvid=dict(
            train=dict(root="data/webvid", list="data/webvid/train.csv"),
            video=dict(frames=12, stride=25),
        )
    )
    c.data.evals = dict()
    c.data.text = dict(kind="clip", path="data/bpe_simple_vocab_16e6.txt.gz", length=77)
    c.data.max_failed = 0.05

    c.method = ConfigDict()
    c.method.name = "tvtsv2"
    c.method.size = recipe.size
    c.method.patch = recipe.patch
    c.method.features = recipe.features
    c.method.act = recipe.act
    c.method.side = 224
    c.method.frames = 12
    c.method.turns = PIECES
    c.method.ratio = recipe.ratio
    c.method.weights = dict(vtc=1.0, sort=2.0)
    c.method.temperature = 0.05
    c.method.time_init = "zero"
    c.method.sorted_by = "patches" if "H14" in switches else "tokens"
    c.method.dtype = "bfloat16"

    # AdamW, 1e-4 for new parameters and a thousandth of it for CLIP's; a tenth after 6 and 8 of 10
    # epochs. No warm-up, no clipping.
    c.optim = ConfigDict()
    stairs = (share(c, 6, 10), share(c, 8, 10))
    c.optim.lr = dict(kind="stairs", value=1e-4, factor=0.1, at=stairs)
    c.optim.betas = (0.9, 0.999)
    c.optim.eps = 1e-6
    c.optim.weight_decay = 0.05
    c.optim.rules = rates(recipe.depth)

    c.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1)
    c.sharding = [*SPLIT_BLOCKS, *SPLIT_TIME, (r"text/word", ("tensor", "fsdp")), *SPLIT_REST]
    c.evals = ConfigDict()
    c.checkpoint = dict(every=epoch, keep=3)
    c.log = dict(every=50)

    if "official" in switches:
        c.method.update(time_init="reference", weights=dict(vtc=1 / gpus, sort=2.0))
    if switches & {"scratch", "tiny"}:
        c.warm_start, c.fresh = (), ()
        c.optim.rules = DECAY
    if "tiny" in switches:
        shrink(c)
    return c


def rates(depth: int) -> list[tuple[str, dict]]:
    """The full rate for new blocks and a thousandth of it for the rest, the time table included; of
    the text tower's blocks only the last quarter is trained."""
    frozen = [i < depth * 3 // 4 for i in range(depth)]
    kept = dict(lr=1e-3, frozen=frozen)
    return [
        (rf"(?=({NO_DECAY})$)({NEW})", dict(wd=0.0)),
        (NEW, dict()),
        (rf"(?=({NO_DECAY})$)text/encoder/blocks/.*", dict(kept, wd=0.0)),
        (r"text/encoder/blocks/.*", kept),
        (NO_DECAY, dict(lr=1e-3, wd=0.0)),
        (r".*", dict(lr=1e-3)),
    ]


def shrink(c: ConfigDict) -> None:
    """The same recipe, small enough for any machine."""
    c.steps, c.batch = 20, 16
    c.data.kind = "shapes"
    drawn = dict(side=32, frames=8)
    c.data.train = dict(clips=128, pieces=PIECES, **drawn)
    c.data.video = dict(frames=2, stride=4, size=32, crop="centre")
    c.data.also = dict()
    c.data.evals = dict(val=dict(clips=32, **drawn), order=dict(clips=32, pieces=PIECES, **drawn))
    c.data.text = dict(kind="sentencepiece", path=None, length=24)
    c.method.update(
        size="tiny", features=64, side=32, patch=8, frames=8, act="quick_gelu", dtype="float32"
    )
    c.optim.lr.value = 1e-3
    c.evals.retrieval = dict(type="retrieval", stream="val", every=10)
    c.evals.order = dict(type="mean", stream="order", every=10)
    c.checkpoint = dict(every=10, keep=2)
    c.log.every = 5
