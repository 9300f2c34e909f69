"""CoCa pretraining on images with texts (Yu et al., arXiv 2205.01917): the paper's settings.

    vtp train --config coca/pretrain --workdir runs/coca \
        --config.data.train.root=DIR --config.data.train.list=images.csv

    switch   what it does
             CoCa of 2.1 B parameters: ViT-g, 18 + 18 decoder layers
    L, B     787 M (ViT-L, 12 + 12) and 383 M (ViT-B, 12 + 12)
    videos   batches of 8-frame clips alternate with those of images (not in the paper)
    tiny     a small net on clips drawn in memory: any machine, a minute or two

Published, zero-shot (g; B, L): ImageNet top-1 86.3 (82.6, 84.8); COCO image-to-text R@1 66.3 (B
63.8), text-to-image 51.2 (B 47.5); MSR-VTT, full test set, text-to-video R@1 30.0, video-to-text
49.9. Neither data set is public: half of each batch is JFT-3B, whose class names become texts by
CLIP's prompts, and half ALIGN's 1.8 B alt-texts. data.train takes any list of images and texts; an
image is read as a video of one frame.

The paper continues for one epoch at 576 pixels: --config.method.side=576
--config.data.video.size=576 with a warm start from this run, which resizes the position table. The
paper uses Adafactor; this config uses AdamW with the same moments, decay and rates. The paper does
not specify, and this config chooses: the length of texts, squares of 8 to 100 % of an image, no
decay of biases and norms, ImageNet's mean and deviation of pixels. method.sum_words=True sums the
captioning loss over words, as in the paper's formula.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from vtp_jax.setup.recipes import NO_DECAY, SPLIT_BLOCKS, SPLIT_REST, parse_arg, pick, share

SPLIT_CROSS = [
    (r".*/blocks/cross/q", (None, "fsdp", "tensor", None)),
    (r".*/blocks/cross/kv", (None, "fsdp", "tensor", None, None)),
    (r".*/blocks/cross/(q|kv)_bias", (None, "tensor")),
    (r".*/blocks/cross/proj/kernel", (None, "tensor", "fsdp")),
    (r".*_pool/cross/(q|kv)", "fsdp"),
]
SPLIT_TEXT = [(r"text/word", ("tensor", "fsdp")), (r"text/head/kernel", ("fsdp", "tensor"))]


class Recipe(NamedTuple):
    size: str
    remat: str | None = None


RECIPES = {"B": Recipe("B"), "L": Recipe("L"), "g": Recipe("g", "nothing_saveable")}


def get_config(arg: str = "") -> ConfigDict:
    switches = parse_arg(arg, "B", "L", "videos", "tiny")
    recipe = pick(switches, RECIPES, "g")

    c = ConfigDict()
    c.seed = 0
    c.steps = 500_000
    c.batch = 65_536

    c.data = ConfigDict()
    c.data.kind = "files"
    c.data.train = dict(root="data/images", list="data/images/train.csv")
    c.data.evals = dict()
    c.data.video = dict(frames=1, stride=1, size=288, crop="resized")
    c.data.text = dict(kind="sentencepiece", path="data/tokenizer.model", length=64)
    c.data.text.vocab_size = 64_000
    c.data.max_failed = 0.05
    if "videos" in switches:
        videos = dict(root="data/webvid", list="data/webvid/train.csv")
        look = dict(frames=8, stride=8, crop="multiscale")
        c.data.also = dict(videos=dict(train=videos, video=look, batch=8192))

    c.method = ConfigDict()
    c.method.name = "coca"
    c.method.size = recipe.size
    c.method.side = 288
    c.method.patch = 18
    c.method.queries = 256
    c.method.length = 64
    c.method.weights = dict(contrast=1.0, caption=2.0)
    c.method.dtype = "bfloat16"
    c.method.remat = recipe.remat

    # Warm-up from 0 over 2 % of the run, then linear decay to 0.
    c.optim = ConfigDict()
    c.optim.lr = dict(
        kind="warmup_linear", peak=8e-4, end=0.0, warmup=share(c, 1, 50), steps=share(c, 1, 1)
    )
    c.optim.betas = (0.9, 0.999)
    c.optim.weight_decay = 0.01
    c.optim.rules = [(NO_DECAY + "|logit_scale", dict(wd=0.0)), (r".*", dict())]

    c.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1)
    c.sharding = [*SPLIT_BLOCKS, *SPLIT_CROSS, *SPLIT_TEXT, *SPLIT_REST]
    c.evals = ConfigDict()
    c.checkpoint = dict(every=5_000, keep=3)
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
    c.data.video = dict(frames=2, stride=4, size=32, crop="centre")
    c.data.text.update(path=None, length=24, vocab_size=256)
    c.method.update(size="tiny", side=32, patch=8, queries=8, length=24, dtype="float32")
    c.method.remat = None
    c.optim.lr.update(peak=8e-4)
    c.optim.lr.warmup = share(c, 1, 2)
    c.evals.val = dict(type="mean", stream="val", every=10)
    c.evals.retrieval = dict(type="retrieval", stream="val", every=10)
    c.evals.captions = dict(type="caption", stream="val", every=10)
    c.checkpoint = dict(every=10, keep=2)
    c.log.every = 5
