"""SimVTP pretraining on WebVid-2M (Ma et al., arXiv 2212.03490): the released settings.

    vtp train --config simvtp/pretrain_webvid --workdir runs/simvtp \
        --config.data.train.root=DIR --config.data.train.list=webvid.json

Hardware of the paper: 64 V100, 16 clips each, fp32. Here: any mesh; bf16 with softmax, norm
statistics, targets and losses in fp32.

The paper starts from VideoMAE ViT-B (K400, 1600 epochs, pretraining) and BERT-base's word
embeddings. Import their files once:

    vtp convert import --from checkpoint.pth --format videomae --out weights/videomae_b_k400
    vtp convert import --from pytorch_model.bin --format bert_embeddings --out weights/bert_base

data/bert-base-uncased-vocab.txt is `vocab.txt` of the model bert-base-uncased (docs/start.md).

    switch     what it does
    scratch    random initial weights
    tiny       from scratch, 0.8 M parameters, on clips drawn in memory: a minute or two
    official   the reference's quirks too (listed in methods/simvtp.py): masked captions in VTC and
               VTM, means over padding, summed directions, 64 groups of 16 for negatives and means

Published (fine-tuned on MSR-VTT 1k-A, text to video; best epoch chosen on the test set):
    200 epochs of WebVid-2M, ViT-B     R@1 53.6   R@5 82.8   R@10 90.8   MdR 1
    10 % of WebVid-2M                  R@1 43.8
Zero-shot results were not published. WebVid is no longer distributed: data.train takes any folder
of videos with captions as CSV, JSONL or SimVTP's JSON.
"""

from ml_collections import ConfigDict

from vtp_jax.setup.recipes import DECAY, SHARDING, parse_arg, per_clips, share


def get_config(arg: str = "") -> ConfigDict:
    switches = parse_arg(arg, "scratch", "tiny", "official")
    epochs, rows = 200, 2_500_000

    c = ConfigDict()
    c.seed = 0
    c.batch = 1024
    epoch = rows // c.get_ref("batch")
    c.steps = epochs * epoch

    c.data = ConfigDict()
    c.data.kind = "files"
    c.data.train = dict(root="data/webvid", list="data/webvid/train.json")
    c.data.evals = dict()
    # 64-frame windows, every 4th frame; crops of 1, .875, .75 or .66 of the short side.
    c.data.video = dict(frames=16, stride=4, size=224, crop="multiscale")
    c.data.text = dict(kind="wordpiece", path="data/bert-base-uncased-vocab.txt", length=32)
    c.data.max_failed = 0.05

    c.method = ConfigDict()
    c.method.name = "simvtp"
    c.method.size = "B"
    c.method.cube = (2, 16, 16)
    c.method.video_ratio = 0.9
    c.method.text_ratio = 0.75
    c.method.dtype = "bfloat16"

    # AdamW; base rate 1.5e-4 for 256 clips, warm-up from 0 over 40 epochs, cosine to 1e-5.
    c.optim = ConfigDict()
    c.optim.lr = dict(
        kind="warmup_cosine", peak=per_clips(c, 1.5e-4), end=per_clips(c, 1e-5),
        warmup=share(c, 40, epochs), steps=share(c, 1, 1),
    )  # fmt: skip
    c.optim.betas = (0.9, 0.95)
    c.optim.weight_decay = 0.05
    c.optim.rules = DECAY

    c.warm_start = (
        ("weights/videomae_b_k400", r"params/(.*)", r"params/\1"),
        ("weights/bert_base", r"params/(.*)", r"params/\1"),
    )
    c.fresh = (r"params/(text_cls|vtm_head)/.*",)

    c.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1)
    c.sharding = SHARDING
    c.evals = ConfigDict()
    c.checkpoint = dict(every=epoch, keep=3)
    c.log = dict(every=50)

    if "official" in switches:
        c.method.update(
            contrast_text="masked", match_text="masked", pool_padding=True, sum_directions=True,
            second_draw=True, groups=64, dtype="float32",
        )  # fmt: skip
    if switches & {"scratch", "tiny"}:
        c.warm_start, c.fresh = (), ()
    if "tiny" in switches:
        shrink(c)
    return c


def shrink(c: ConfigDict) -> None:
    """The same recipe, small enough for any machine."""
    c.steps, c.batch = 20, 16
    c.data.kind = "shapes"
    c.data.train = dict(clips=256)
    c.data.evals = dict(val=dict(clips=32))
    c.data.video = dict(frames=8, stride=2, size=32, crop="multiscale")
    c.data.text = dict(kind="sentencepiece", path=None, length=24)
    c.method.size = "tiny"
    c.method.cube = (2, 8, 8)
    if "groups" in c.method:
        c.method.groups = 2
    c.optim.lr.update(peak=1e-3, end=1e-5)
    c.optim.lr.warmup = share(c, 4, 20)
    c.evals.val = dict(type="mean", stream="val", every=10)
    c.evals.retrieval = dict(type="retrieval", stream="val", every=10)
    c.checkpoint = dict(every=10, keep=2, best=("retrieval/t2v_r1", "max"))
    c.log.every = 5
