"""VideoMAE pretraining on Kinetics-400 (Tong et al., arXiv 2203.12602): the released settings.

    vtp train --config videomae/pretrain_k400 --workdir runs/videomae \
        --config.data.train.root=DIR --config.data.train.list=train.txt
    vtp train --config videomae/pretrain_k400:ssv2 --workdir runs/ssv2
    vtp train --config videomae/pretrain_k400:ucf101 --workdir runs/ucf101

    switch     what it does                                            batch   epochs
               ViT-B on K400                                            2048     1600
    S, L, H    the other sizes on K400                     1024, 512, 1024       1600
    ssv2       ViT-B on Something-Something V2: every 2nd frame         2048     2400
    ssv2_S     ViT-S on SSv2                                            2048     2400
    ucf101     ViT-B on UCF101: mask ratio 0.75, base rate 3e-4          192     3200
    tiny       a net of 0.5 M parameters on clips drawn in memory: any machine, a minute or two

Published, after fine-tuning (configs/videomae/finetune_k400.py), top-1 / top-5, no other data:
    K400, 16 x 224^2, 5 x 3 views    S 79.0/93.8  B 81.5/95.1  L 85.2/96.8  H 86.6/97.1
    SSv2, 2 x 3 views                S 66.8/90.3  B 70.8/92.4
    UCF101, 5 x 3 views              B 91.3/98.5

Batches are those of the scripts; the paper reports 1024 for K400 and SSv2. Rates scale with them
either way. The scripts run one more epoch (1601, ...), to save the last one. H recomputes blocks in
the backward pass (method.remat), as its script does. data.train takes any list of videos.
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
    size: str = "B"
    batch: int = 2048
    epochs: int = 1600
    rows: int = 240_000  # of the data set
    stride: int = 4
    ratio: float = 0.9
    rate: float = 1.5e-4  # for 256 clips
    remat: str | None = None


RECIPES = {
    "B": Recipe(),
    "S": Recipe("S", batch=1024),
    "L": Recipe("L", batch=512),
    "H": Recipe("H", batch=1024, remat="nothing_saveable"),
    "ssv2": Recipe(epochs=2400, rows=168_913, stride=2),
    "ssv2_S": Recipe("S", epochs=2400, rows=168_913, stride=2),
    "ucf101": Recipe(batch=192, epochs=3200, rows=9_537, ratio=0.75, rate=3e-4),
}


def get_config(arg: str = "") -> ConfigDict:
    switches = parse_arg(arg, "S", "L", "H", "ssv2", "ssv2_S", "ucf101", "tiny")
    recipe = pick(switches, RECIPES, "B")

    c = ConfigDict()
    c.seed = 0
    c.batch = recipe.batch
    epoch = recipe.rows // c.get_ref("batch")
    c.steps = recipe.epochs * epoch

    c.data = ConfigDict()
    c.data.kind = "files"
    c.data.train = dict(root="data/k400", list="data/k400/train.txt", caption_column=None)
    c.data.evals = dict()
    c.data.video = dict(frames=16, stride=recipe.stride, size=224, crop="multiscale")
    c.data.max_failed = 0.05

    c.method = ConfigDict()
    c.method.name = "videomae"
    c.method.size = recipe.size
    c.method.cube = (2, 16, 16)
    c.method.ratio = recipe.ratio
    c.method.dtype = "bfloat16"
    c.method.remat = recipe.remat

    # AdamW; warm-up from 0 over 40 epochs, cosine to 1e-5 for 256 clips.
    c.optim = ConfigDict()
    c.optim.lr = dict(
        kind="warmup_cosine", peak=per_clips(c, recipe.rate), end=per_clips(c, 1e-5),
        warmup=share(c, 40, recipe.epochs), steps=share(c, 1, 1),
    )  # fmt: skip
    c.optim.betas = (0.9, 0.95)
    c.optim.weight_decay = 0.05
    c.optim.rules = DECAY

    c.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1)
    c.sharding = [*SPLIT_BLOCKS, *SPLIT_REST]
    c.evals = ConfigDict()
    c.checkpoint = dict(every=20 * epoch, keep=3)
    c.log = dict(every=50)

    if "tiny" in switches:
        shrink(c)
    return c


def shrink(c: ConfigDict) -> None:
    """The same recipe, small enough for any machine."""
    c.steps, c.batch = 20, 16
    c.data.kind = "shapes"
    c.data.train = dict(clips=256)
    c.data.evals = dict(val=dict(clips=32))
    c.data.video.update(frames=8, stride=2, size=32)
    c.method.update(size="tiny", cube=(2, 8, 8), ratio=0.75, remat=None)
    c.optim.lr.update(peak=1e-3, end=1e-5)
    c.optim.lr.warmup = share(c, 4, 20)
    c.evals.val = dict(type="mean", stream="val", every=10)
    c.checkpoint = dict(every=10, keep=2)
    c.log.every = 5
