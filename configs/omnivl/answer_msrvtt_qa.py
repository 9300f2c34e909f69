"""OmniVL fine-tuned for open-ended video question answering (MSRVTT-QA; Xu et al., 2017).

    vtp train --config omnivl/answer_msrvtt_qa --workdir runs/omnivl_qa \
        --config.data.train.root=DIR --config.data.evals.test.root=DIR

The lists have columns path, question and answer; answers.txt has the 1,500 most frequent answers of
the training set, one per line. The run starts from runs/omnivl (configs/omnivl/pretrain.py).
data/bert-base-uncased-vocab.txt is `vocab.txt` of the model bert-base-uncased (docs/start.md).

    switch     what it does
    scratch    random initial weights
    tiny       from scratch, a small net and questions on shapes drawn in memory: a minute or two

Published: 44.1. In the paper the causal decoder generates the answer (according to second-hand
sources); here it is chosen from a list, the more common protocol. The paper's settings are unknown:
rate, batch, epochs and augmentation are choices of this config, close to those of BLIP's VQA.
"""

from ml_collections import ConfigDict

from vtp_jax.setup import shipped
from vtp_jax.setup.recipes import DECAY, parse_arg, share

pretrain = shipped.module("omnivl/pretrain")

# Used in pretraining only; answers are read from the token that fuses both.
UNUSED = (r"decoder/.*|word_head/.*|match_head/.*|\w+_proj/.*|temperature",)


def get_config(arg: str = "") -> ConfigDict:
    switches = parse_arg(arg, "scratch", "tiny")
    c = ask(epochs=10, batch=128, rate=3e-5)

    c.method = ConfigDict()
    c.method.name = "omnivl"
    c.method.size = "B"
    c.method.text_size = "B"
    c.method.picture = 224
    c.method.frames = 8
    c.method.cube = (2, 16, 16)
    c.method.queue = 128  # unused here
    c.method.dtype = "bfloat16"
    c.task.drop = UNUSED

    c.warm_start = (("runs/omnivl", r"params/((visual|text)/.*)", r"params/base/\1"),)
    c.fresh = (r"params/head/.*",)
    c.sharding = pretrain.SHARDING
    if "scratch" in switches or "tiny" in switches:
        c.warm_start, c.fresh = (), ()
    if "tiny" in switches:
        shrink(c)
        pretrain.shrink_net(c)
    return c


def ask(epochs: int, batch: int, rate: float) -> ConfigDict:
    """Training on MSRVTT-QA, without the method."""
    c = ConfigDict()
    c.seed = 0
    c.batch = batch
    epoch = 158_581 // c.get_ref("batch")
    c.steps = epochs * epoch

    c.data = ConfigDict()
    c.data.kind = "files"
    root = "data/msrvtt"
    columns = dict(caption_column="question", label_column="answer", answers=f"{root}/answers.txt")
    c.data.train = dict(root=root, list=f"{root}/qa_train.csv", **columns)
    c.data.evals = dict(test=dict(root=root, list=f"{root}/qa_test.csv", **columns))
    c.data.video = dict(frames=8, stride=15, size=224, crop="multiscale")
    c.data.text = dict(kind="wordpiece", path="data/bert-base-uncased-vocab.txt", length=30)
    c.data.max_failed = 0.05

    c.task = ConfigDict()
    c.task.name = "answer"
    c.task.answers = 1500
    c.task.fuse = "pair"
    c.task.dropout = 0.1
    c.task.smoothing = 0.0

    c.optim = ConfigDict()
    c.optim.lr = dict(
        kind="warmup_cosine", peak=rate, end=rate / 100,
        warmup=share(c, 1, 2 * epochs), steps=share(c, 1, 1),
    )  # fmt: skip
    c.optim.betas = (0.9, 0.999)
    c.optim.weight_decay = 0.05
    c.optim.rules = DECAY

    c.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1)
    c.evals = ConfigDict()
    c.evals.answer = dict(type="classify", stream="test", classes="answer", every=epoch)
    c.checkpoint = dict(every=epoch, keep=2)
    c.log = dict(every=50)
    return c


def shrink(c: ConfigDict) -> None:
    """The same recipe on questions about shapes, small enough for any machine."""
    c.steps, c.batch = 24, 16
    c.data.kind = "shapes"
    c.data.train = dict(clips=256, caption="question")
    c.data.evals = dict(test=dict(clips=32, caption="question"))
    c.data.video = dict(frames=4, stride=4, size=32, crop="centre")
    c.data.text = dict(kind="sentencepiece", path=None, length=12)
    c.task.answers = 100
    c.optim.lr.update(peak=2e-3, end=1e-4)
    c.optim.lr.warmup = share(c, 4, 24)
    c.evals.answer.every = 12
    c.checkpoint.every, c.log.every = 12, 6
