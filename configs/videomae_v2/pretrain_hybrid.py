"""VideoMAE V2 pretraining on 1.35 M clips of mixed sources (Wang et al., arXiv 2303.16727).

    vtp train --config videomae_v2/pretrain_hybrid --workdir runs/v2 \
        --config.data.train.root=DIR --config.data.train.list=hybrid.txt

Each clip is decoded once and shown as four crops with masks of their own. The decoder predicts
every second place, and the loss counts the hidden ones among them: 160 tokens encoded, 784
predicted, 704 counted of 1568 (g: 208, 1024 and 920 of 2048).

    switch   what it does                        clips read a step   epochs (x 4 crops)   base rate
             ViT-g, gradients clipped at 0.02                 2048           300 (1200)        6e-4
    H        ViT-H                                            2048           300 (1200)        1e-3
    L        ViT-L                                            1536           300 (1200)        1e-3
    B        ViT-B                                            1024            200 (800)        1e-3
    tiny     a small net on clips drawn in memory: any machine, a minute or two

The three stages: this config; configs/videomae_v2/finetune.py, the post-pretraining on K710, in
runs/v2_k710; and the same file's g_k710_k400.

Published: 1.79 times faster than V1 for B on SSv2 (28.4 -> 15.9 h on 64 GPUs), 1.48 times for g;
finetune.py has the accuracies after fine-tuning.

The 1.35 M clips: K710 658k, SSv2 169k (every 2nd frame; every 4th of the others, here of all), AVA
21k, 250k of WebVid-2M and 250k of Instagram, which were not released.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from vtp_jax.setup.recipes import (
    DECAY,
    SPLIT_BLOCKS,
    SPLIT_REST,
    parse_arg,
    per_clips,
    pick,
    share,
)


class Recipe(NamedTuple):
    size: str
    decoder: str | tuple[int, int, int, int] = (512, 4, 8, 2048)
    patch: int = 16
    batch: int = 2048  # clips read; each is shown four times
    epochs: int = 300
    rate: float = 1e-3  # for 256 clips read
    clip: float | None = None


RECIPES = {
    "g": Recipe("g", "g", patch=14, rate=6e-4, clip=0.02),
    "H": Recipe("H"),
    "L": Recipe("L", batch=1536),
    "B": Recipe("B", "B", batch=1024, epochs=200),
}
ROWS = 1_348_000


def get_config(arg: str = "") -> ConfigDict:
    switches = parse_arg(arg, "B", "L", "H", "tiny")
    recipe = pick(switches, RECIPES, "g")

    c = ConfigDict()
    c.seed = 0
    c.batch = recipe.batch
    epoch = ROWS // c.get_ref("batch")
    c.steps = recipe.epochs * epoch

    c.data = ConfigDict()
    c.data.kind = "files"
    c.data.train = dict(root="data/hybrid", list="data/hybrid/train.txt", caption_column=None)
    c.data.evals = dict()
    c.data.video = dict(frames=16, stride=4, size=224, crop="multiscale", repeats=4)
    c.data.max_failed = 0.05

    c.method = ConfigDict()
    c.method.name = "videomae"
    c.method.size = recipe.size
    c.method.decoder = recipe.decoder
    c.method.cube = (2, recipe.patch, recipe.patch)
    c.method.ratio = 0.9
    c.method.decoder_ratio = 0.5
    c.method.dtype = "bfloat16"
    c.method.remat = "nothing_saveable" if recipe.size in ("H", "g") else None

    # AdamW; warm-up from 0 over a tenth of the run, cosine to 1e-5 for 256 clips read.
    c.optim = ConfigDict()
    c.optim.lr = dict(
        kind="warmup_cosine", peak=per_clips(c, recipe.rate), end=per_clips(c, 1e-5),
        warmup=share(c, 1, 10), steps=share(c, 1, 1),
    )  # fmt: skip
    c.optim.betas = (0.9, 0.95)
    c.optim.weight_decay = 0.05
    c.optim.clip = recipe.clip
    c.optim.rules = DECAY

    c.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1)
    c.sharding = [*SPLIT_BLOCKS, *SPLIT_REST]
    c.evals = ConfigDict()
    c.checkpoint = dict(every=5 * epoch, keep=3)
    c.log = dict(every=50)

    if "tiny" in switches:
        shrink(c)
    return c


def shrink(c: ConfigDict) -> None:
    """The same recipe, small enough for any machine."""
    c.steps, c.batch = 20, 8
    c.data.kind = "shapes"
    c.data.train = dict(clips=128)
    c.data.evals = dict(val=dict(clips=32))
    c.data.video.update(frames=8, stride=2, size=32, repeats=2)
    c.method.update(size="tiny", decoder="tiny", cube=(2, 8, 8), ratio=0.75, remat=None)
    c.optim.lr.update(peak=1e-3, end=1e-5)
    c.optim.lr.warmup = share(c, 4, 20)
    c.optim.clip = None
    c.evals.val = dict(type="mean", stream="val", every=10)
    c.checkpoint = dict(every=10, keep=2)
    c.log.every = 5
