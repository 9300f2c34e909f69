"""OmniVL pretraining (Wang et al., arXiv 2209.07526): first images with texts, then images and
videos, in alternating batches.

    vtp train --config omnivl/pretrain:images --workdir runs/omnivl_images
    vtp train --config omnivl/pretrain --workdir runs/omnivl

The data: 14 M images with texts (COCO, VG, SBU, CC3M, CC12M), ImageNet-1K, 2.5 M videos with texts
(WebVid) and Kinetics-400. Labelled lists have a column `label` and, as caption, a prompt with the
name of the class, one row per prompt. An image is a video file of one frame.

The first stage (`:images`) starts from a supervised ViT-B/16 and BERT's words:

    vtp convert import --from vit_b16.pth --format vit --out weights/vit_b16
    vtp convert import --from pytorch_model.bin --format bert_embeddings --out weights/bert_base

data/bert-base-uncased-vocab.txt is `vocab.txt` of the model bert-base-uncased (docs/start.md).

    switch     what it does
    images     the first stage: images only; the parameters for video are frozen
    scratch    random initial weights, without the first stage
    tiny       from scratch, a small net on clips and images drawn in memory, the images named by
               their colour: a minute or two

Published (fine-tuned; text to video R@1, R@5, R@10): MSR-VTT 47.8, 74.2, 83.8; DiDeMo 52.4, 79.5,
85.4; zero-shot 34.6, 58.4, 66.6 and 33.3, 58.7, 68.5.

Not found in the paper and taken from BLIP: momentum, queues, temperature, soft targets with a ramp
of two epochs, 3,000 steps of warm-up. Not yet checked against the paper: rates 3e-4 and 8e-5, 20
and 10 epochs, batches of 2,880 images and 800 videos, 8 frames. Choices of this config: frames are
half a second apart; the weights of the word encoder and of the fusing attention are random (BERT's
blocks are not imported); of every ten batches four are videos and four images with texts, and one
of each has classes; an epoch is one epoch of WebVid. Differences from BLIP: a cosine (BLIP: a
factor of .9 per epoch), a warm-up from 0 (1e-6), no decay of biases and norms (all decay), squares
of 8 to 100 % of an image (from 20 %), neither flips nor RandAugment (both), ImageNet's mean and
deviation of pixels (CLIP's).
"""

from ml_collections import ConfigDict

from vtp_jax.setup.recipes import (
    DECAY,
    SPLIT_BLOCKS,
    SPLIT_REST,
    SPLIT_WORDS,
    parse_arg,
    share,
)

TIME = r"visual/(time_position|video_patch_embed/.*|encoder/blocks/(time_\w+|norm_time)/.*)"
STACKED = (None, "fsdp", "tensor")
SHARDING = [
    (r".*/time_attn/qkv", (*STACKED, None, None)),
    (r".*/cross/q", STACKED),
    (r".*/cross/kv", (*STACKED, None, None)),
    *SPLIT_BLOCKS,
    *SPLIT_WORDS,
    *SPLIT_REST,
]
IMAGE = dict(frames=1, stride=1)


def get_config(arg: str = "") -> ConfigDict:
    switches = parse_arg(arg, "images", "scratch", "tiny")
    images = "images" in switches
    batch, epochs, rows = (2880, 20, 14_000_000) if images else (800, 10, 2_500_000)

    c = ConfigDict()
    c.seed = 0
    c.batch = batch
    # 4 of these 5 or 10 batches
    epoch = rows // c.get_ref("batch") * (5 if images else 10) // 4
    c.steps = epochs * epoch

    c.data = ConfigDict()
    c.data.kind = "files"
    c.data.train = files("images14m") if images else files("webvid")
    c.data.also = ConfigDict()
    c.data.also.image_classes = dict(
        train=files("imagenet", label_column="label"), video=IMAGE, batch=2880
    )
    c.data.turns = 4
    if not images:
        c.data.also.images = dict(train=files("images14m"), video=IMAGE, batch=2880, turns=4)
        c.data.also.video_classes = dict(train=files("k400", label_column="label"))
    c.data.evals = dict()
    c.data.video = dict(frames=8, stride=15, size=224, crop="resized")
    if images:
        c.data.video.update(IMAGE)
    c.data.text = dict(kind="wordpiece", path="data/bert-base-uncased-vocab.txt", length=30)
    c.data.max_failed = 0.05

    c.method = ConfigDict()
    c.method.name = "omnivl"
    c.method.size = "B"
    c.method.text_size = "B"
    c.method.features = 256
    c.method.picture = 224
    c.method.frames = 8
    c.method.cube = (2, 16, 16)
    c.method.temperature = 0.07
    c.method.queue = 57600
    c.method.momentum = 0.995
    c.method.alpha = dict(kind="linear", start=0.0, end=0.4, steps=share(c, 2, epochs))
    c.method.dtype = "bfloat16"
    c.method.remat = "nothing_saveable"

    c.optim = ConfigDict()
    c.optim.lr = dict(
        kind="warmup_cosine", peak=3e-4 if images else 8e-5, end=1e-6,
        warmup=share(c, 3000, c.steps), steps=share(c, 1, 1),
    )  # fmt: skip
    c.optim.betas = (0.9, 0.999)
    c.optim.weight_decay = 0.05
    resting = [(TIME, dict(frozen=True))] if images else []
    c.optim.rules = [*resting, ("temperature", dict(wd=0.0)), *DECAY]

    if "scratch" in switches or "tiny" in switches:
        c.warm_start, c.fresh = (), ()
    elif images:
        c.warm_start = (
            ("weights/vit_b16", r"params/((?!head).*)", r"params/visual/\1"),
            ("weights/bert_base", r"params/(.*)", r"params/text/\1"),
        )
        new = r"text/text_embed/task|text/encoder/.*|\w+_proj/.*|\w+_head/.*|decoder/.*|temperature"
        c.fresh = (rf"params/({TIME}|{new})",)
    else:
        c.warm_start = (
            ("runs/omnivl_images", rf"params/((?!{TIME}).*)", r"params/\1"),
            (
                "runs/omnivl_images",
                r"params/visual/patch_embed/(.*)",
                r"params/visual/video_patch_embed/\1",
            ),
        )
        c.fresh = (r"params/visual/(time_position|encoder/blocks/(time_\w+|norm_time)/.*)",)

    c.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1)
    c.sharding = SHARDING
    c.evals = ConfigDict()
    c.checkpoint = dict(every=epoch, keep=3)
    c.log = dict(every=50)

    if "tiny" in switches:
        shrink(c, images)
    return c


def files(name: str, **columns: str) -> dict:
    return dict(root=f"data/{name}", list=f"data/{name}/train.csv", **columns)


def shrink(c: ConfigDict, images: bool) -> None:
    """The same recipe, small enough for any machine."""
    c.steps, c.batch = 24, 16
    c.data.kind = "shapes"
    c.data.train, c.data.turns = dict(clips=256), 1
    colours = dict(clips=128, label="colour", caption="class", seed=1)
    c.data.also = dict(image_classes=dict(train=colours, video=IMAGE))
    c.data.evals = dict(val=dict(clips=32))
    c.data.video = dict(frames=4, stride=4, size=32, crop="centre")
    if images:
        c.data.video.update(IMAGE)
    c.data.text = dict(kind="sentencepiece", path=None, length=20)
    shrink_net(c)
    c.method.update(features=32, momentum=0.9)
    del c.method.remat
    c.method.alpha.steps = share(c, 1, 2)
    c.optim.lr.update(peak=2e-3, end=1e-4)
    c.optim.lr.warmup = share(c, 4, 24)
    c.evals.retrieval = dict(type="retrieval", stream="val", every=12)
    c.evals.rerank = dict(type="rerank", stream="val", k=8, block=32)
    c.checkpoint = dict(every=12, keep=2)
    c.log.every = 6


def shrink_net(c: ConfigDict) -> None:
    c.method.update(size="tiny", text_size="tiny", picture=32, frames=4, cube=(2, 8, 8), queue=64)
