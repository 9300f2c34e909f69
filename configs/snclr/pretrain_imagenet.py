"""SNCLR pretraining as in the paper: arXiv 2303.17142, code ChongjianGE/SNCLR @b95c7e5.

    vtp train --config snclr/pretrain_imagenet --workdir runs/snclr

    switch     what it does
               ViT-S/16 with 12 heads on ImageNet-1K, 300 epochs at batch 4096
    per_gpu    one queue per 128 rows, as in the code: 32 queues, 4.2 GB together
    clips      8 frames of each video of K400 instead of images (not in the paper)
    tiny       a small net on clips drawn in memory: any machine, a minute or two

Published: "on par or better" than contemporary methods in linear classification and detection; no
figures are known here.

The base rate is 1.5e-4 for 256 rows, as in MoCo v3 and in the code's launch scripts; its start.sh
has 1.5e-5. The list of images names files; an image is read as a video of one frame.
"""

from ml_collections import ConfigDict

from vtp_jax.setup.recipes import SPLIT_BLOCKS, SPLIT_REST, parse_arg, per_clips, share


def get_config(arg: str = "") -> ConfigDict:
    switches = parse_arg(arg, "per_gpu", "clips", "tiny")
    c = ConfigDict()
    c.seed = 0
    c.batch = 4096
    rows, epochs, frames = (240_000, 300, 8) if "clips" in switches else (1_281_167, 300, 1)
    epoch = rows // c.get_ref("batch")
    c.steps = epochs * epoch

    c.data = ConfigDict()
    c.data.kind = "files"
    where = "data/k400" if "clips" in switches else "data/imagenet"
    c.data.train = dict(root=where, list=f"{where}/train.txt", caption_column=None)
    c.data.evals = dict()
    # Two crops of each decoded clip, of 8 to 100 % of the area.
    c.data.video = dict(frames=frames, stride=8, size=224, crop="resized", repeats=2)
    c.data.max_failed = 0.05

    c.method = ConfigDict()
    c.method.name = "snclr"
    c.method.size = (384, 12, 12, 1536)
    c.method.cube = (min(frames, 2), 16, 16)
    c.method.hidden = 4096
    c.method.features = 256
    c.method.neighbours = 30
    c.method.queue = 128_000
    c.method.groups = 32 if "per_gpu" in switches else 1
    c.method.temperature = 0.2
    c.method.momentum = dict(kind="cosine", start=0.99, end=1.0, steps=share(c, 1, 1))
    c.method.dtype = "bfloat16"

    # AdamW that decays everything; warm-up from 0 over 40 epochs, cosine to 0. The embedding of
    # cubes stays at its random initialization (MoCo v3).
    c.optim = ConfigDict()
    c.optim.lr = dict(
        kind="warmup_cosine", peak=per_clips(c, 1.5e-4), end=0.0,
        warmup=share(c, 40, epochs), steps=share(c, 1, 1),
    )  # fmt: skip
    c.optim.betas = (0.9, 0.999)
    c.optim.weight_decay = 0.1
    c.optim.rules = [(r"patch_embed/.*", dict(frozen=True)), (r".*", dict())]

    c.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1)
    queue = (r"extra/queue/(key|real)", (("data", "fsdp"),))
    c.sharding = [queue, *SPLIT_BLOCKS, *SPLIT_REST]
    c.evals = ConfigDict()
    c.checkpoint = dict(every=10 * epoch, keep=3)
    c.log = dict(every=50)

    if "tiny" in switches:
        shrink(c)
    return c


def shrink(c: ConfigDict) -> None:
    """The same recipe, small enough for any machine."""
    c.steps, c.batch = 30, 16
    c.data.kind = "shapes"
    c.data.train = dict(clips=256)
    c.data.evals = dict(val=dict(clips=64, label="shape"))
    c.data.video.update(frames=4, stride=4, size=32)
    c.method.size = (64, 2, 2, 128)
    c.method.cube = (2, 8, 8)
    c.method.update(hidden=128, features=32, neighbours=4, queue=64)
    c.method.groups = min(c.method.groups, 4)
    c.optim.lr.update(peak=2e-3)
    c.optim.lr.warmup = share(c, 5, 30)
    c.evals.val = dict(type="probe", stream="val", ks=(1, 5), every=15)
    c.checkpoint = dict(every=15, keep=2)
    c.log.every = 5
