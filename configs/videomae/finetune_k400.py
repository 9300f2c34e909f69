"""VideoMAE fine-tuned for recognition (Tong et al., arXiv 2203.12602): the released settings.

    vtp train --config videomae/finetune_k400 --workdir runs/videomae_ft \
        --config.data.train.root=DIR --config.data.train.list=train.txt

The run starts from the run or the imported weights in runs/videomae; ssv2 and ssv2_S start from
runs/ssv2, ucf101 from runs/ucf101, pretrained on the same videos (pretrain_k400.py). For another
folder: --config.warm_start.0.0=DIR. The evaluation at the end uses 5 segments x 3 crops of each
video (SSv2 2 x 3) and averages after the softmax, as published.

    switch    what it does                            batch  rate for 256   epochs  layer decay
              ViT-B on K400                             384          5e-4       75         0.75
    S, L, H   the other sizes              384, 128, 512  5e-4, 2e-3, 1e-3  150, 35, 50     0.75
    ssv2      ViT-B on Something-Something V2           384          5e-4       30         0.75
    ssv2_S    ViT-S on SSv2                             384          1e-3       40         0.7
    ucf101    ViT-B on UCF101                           128          5e-4      100         0.7
    tiny      a small net that names the colours of shapes drawn in memory, in a minute or two

H and ucf101 recompute blocks in the backward pass (method.remat), as their scripts do.

Published, top-1 / top-5: K400 S 79.0/93.8, B 81.5/95.1, L 85.2/96.8, H 86.6/97.1; SSv2 S 66.8/90.3,
B 70.8/92.4; UCF101 B 91.3/98.5.

Different from the code: no RandAugment (rand-m7-n4-mstd0.5-inc1), which acts on 8-bit frames before
the crop. Mixup and CutMix draw once for the whole batch; with task.groups=N, once per GPU. Clips of
SSv2 are one frame from each of 16 parts of the whole video, as in the code.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from vtp_jax.setup.recipes import (
    DECAY,
    SPLIT_BLOCKS,
    SPLIT_REST,
    layer_decay,
    parse_arg,
    per_clips,
    pick,
    share,
)

UNUSED = ("decoder.*", "encoder_to_decoder.*", "mask_token", "encoder_norm.*")
FIRST = r"base/patch_embed/.*"  # has the lowest rate


class Recipe(NamedTuple):
    """The settings in which fine-tuning runs of VideoMAE and V2 differ."""

    size: str
    depth: int
    batch: int  # clips read; each is shown twice
    rate: float  # for 256 clips read
    epochs: int
    data: str = "k400"
    layer_decay: float = 0.75
    drop_path: float = 0.1
    dropout: float = 0.0  # before the head
    weight_decay: float = 0.05
    end: float = 1e-6
    warmup: int = 5
    clip: float | None = None
    patch: int = 16
    remat: str | None = None
    pick: tuple[int, ...] | str = ()  # of the head's classes; see tasks/classify.py


class Dataset(NamedTuple):
    classes: int
    rows: int  # for training
    stride: int = 4
    flip: float = 0.5
    views: tuple[int, int] = (5, 3)


DATA = {
    "k400": Dataset(400, 240_000),
    "k600": Dataset(600, 392_622),
    "k710": Dataset(710, 658_340),
    "ssv2": Dataset(174, 168_913, 2, 0.0, (2, 3)),
    "ucf101": Dataset(101, 9_537),
    "hmdb51": Dataset(51, 3_570, 2),
}
RECIPES = {
    "B": Recipe("B", 12, 384, 5e-4, 75),
    "S": Recipe("S", 12, 384, 5e-4, 150),
    "L": Recipe("L", 24, 128, 2e-3, 35),
    "H": Recipe(
        "H", 32, 512, 1e-3, 50, drop_path=0.2, dropout=0.5, end=1e-5, remat="nothing_saveable"
    ),
    "ssv2": Recipe("B", 12, 384, 5e-4, 30, "ssv2"),
    "ssv2_S": Recipe("S", 12, 384, 1e-3, 40, "ssv2", 0.7),
    "ucf101": Recipe(
        "B", 12, 128, 5e-4, 100, "ucf101", 0.7, 0.2, 0.5, end=1e-5, remat="nothing_saveable"
    ),
}  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    switches = parse_arg(arg, "S", "L", "H", "ssv2", "ssv2_S", "ucf101", "tiny")
    recipe = pick(switches, RECIPES, "B")
    c = recognise(recipe, "runs/videomae" if recipe.data == "k400" else f"runs/{recipe.data}")
    if "tiny" in switches:
        shrink(c)
    return c


def recognise(recipe: Recipe, source: str) -> ConfigDict:
    """Fine-tuning from the encoder in `source`."""
    dataset = DATA[recipe.data]

    c = ConfigDict()
    c.seed = 0
    c.batch = recipe.batch
    epoch = dataset.rows // c.get_ref("batch")
    c.steps = recipe.epochs * epoch
    c.warm_start = ((source, "params/(patch_embed|encoder)/(.*)", r"params/base/\1/\2"),)
    c.fresh = ("params/(fc_norm|head)/.*",)

    c.data = ConfigDict()
    c.data.kind = "files"
    # Lists of `path label`.
    root, columns = f"data/{recipe.data}", dict(caption_column=None, label_column="label")
    c.data.train = dict(root=root, list=f"{root}/train.txt", **columns)
    c.data.evals = dict(test=dict(root=root, list=f"{root}/test.txt", **columns))
    c.data.video = dict(
        frames=16, stride=dataset.stride, size=224, crop="resized", repeats=2, views=dataset.views
    )
    if recipe.data == "ssv2":
        c.data.video.sampling = "segments"
    c.data.max_failed = 0.05

    c.method = ConfigDict()
    c.method.name = "videomae"
    c.method.size = recipe.size
    c.method.cube = (2, recipe.patch, recipe.patch)
    c.method.drop_path = recipe.drop_path
    c.method.dtype = "bfloat16"
    c.method.remat = recipe.remat

    c.task = ConfigDict()
    c.task.name = "classify"
    c.task.classes = dataset.classes
    c.task.pick = recipe.pick
    c.task.dropout = recipe.dropout
    c.task.smoothing = 0.1
    c.task.flip = dataset.flip
    c.task.erase = 0.25
    c.task.mixup = 0.8
    c.task.cutmix = 1.0
    c.task.drop = UNUSED

    # AdamW; warm-up from 0.
    c.optim = ConfigDict()
    c.optim.lr = dict(
        kind="warmup_cosine", peak=per_clips(c, recipe.rate), end=per_clips(c, recipe.end),
        warmup=share(c, recipe.warmup, recipe.epochs), steps=share(c, 1, 1),
    )  # fmt: skip
    c.optim.betas = (0.9, 0.999)
    c.optim.weight_decay = recipe.weight_decay
    c.optim.clip = recipe.clip
    c.optim.rules = [*layer_decay(recipe.layer_decay, recipe.depth, first=FIRST), *DECAY]

    c.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1)
    c.sharding = [*SPLIT_BLOCKS, *SPLIT_REST]
    c.evals = ConfigDict()
    c.evals.test = dict(type="classify", stream="test")
    c.checkpoint = dict(every=epoch, keep=2)
    c.log = dict(every=50)
    return c


def shrink(c: ConfigDict) -> None:
    """The same recipe, small enough for any machine, from random weights."""
    c.warm_start, c.fresh = (), ()
    c.steps, c.batch = 30, 16
    c.data.kind = "shapes"
    c.data.train = dict(clips=256, label="colour")
    c.data.evals = dict(test=dict(clips=32, label="colour"))
    c.data.video.update(frames=8, stride=2, size=32, crop="multiscale", views=(2, 2))
    c.method.update(size="tiny", cube=(2, 8, 8), remat=None)
    with c.task.ignore_type():  # pick may be a path
        c.task.update(classes=12, pick=(), mixup=0.1, cutmix=0.1)
    c.optim.lr.update(peak=2e-3, end=1e-5)
    c.optim.lr.warmup = share(c, 4, 30)
    c.optim.rules = [*layer_decay(0.75, 2, first=FIRST), *DECAY]
    c.checkpoint = dict(every=15, keep=2)
    c.log.every = 10
