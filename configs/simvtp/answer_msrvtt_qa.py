"""SimVTP fine-tuned for open-ended video question answering on MSRVTT-QA; not in the paper.

    vtp train --config simvtp/answer_msrvtt_qa --workdir runs/simvtp_qa \
        --config.data.train.root=DIR --config.data.evals.test.root=DIR

The lists are those of configs/omnivl/answer_msrvtt_qa.py. The run starts from runs/simvtp. The
encoder takes video and question as one sequence, and the head reads the mean of its tokens.

    switch     what it does
    scratch    random initial weights
    tiny       from scratch, a small net and questions on shapes drawn in memory: a minute or two
"""

from ml_collections import ConfigDict

from vtp_jax.setup import shipped
from vtp_jax.setup.recipes import DECAY, SPLIT_BLOCKS, SPLIT_REST, SPLIT_WORDS, parse_arg

answer = shipped.module("omnivl/answer_msrvtt_qa")

UNUSED = (r"decoder(_.*)?/.*|encoder_to_decoder/.*|mask_token|text_cls/.*|vtm_head/.*",)


def get_config(arg: str = "") -> ConfigDict:
    switches = parse_arg(arg, "scratch", "tiny")
    c = answer.ask(epochs=10, batch=128, rate=1e-4)
    c.data.video.update(frames=16, stride=8)

    c.method = ConfigDict()
    c.method.name = "simvtp"
    c.method.size = "B"
    c.method.cube = (2, 16, 16)
    c.method.drop_path = 0.1
    c.method.dtype = "bfloat16"
    c.task.drop = UNUSED

    kept = "encoder|encoder_norm|patch_embed|text_embed"
    c.warm_start = (("runs/simvtp", rf"params/(({kept})/.*)", r"params/base/\1"),)
    c.fresh = (r"params/head/.*",)
    c.optim.rules = DECAY
    c.sharding = [*SPLIT_BLOCKS, *SPLIT_WORDS, *SPLIT_REST]
    if "scratch" in switches or "tiny" in switches:
        c.warm_start, c.fresh = (), ()
    if "tiny" in switches:
        answer.shrink(c)
        c.method.update(size="tiny", cube=(2, 8, 8))
    return c
