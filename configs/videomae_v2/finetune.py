"""VideoMAE V2: post-pretraining on K710, and fine-tuning (Wang et al., arXiv 2303.16727).

    vtp train --config videomae_v2/finetune --workdir runs/v2_k710 \
        --config.data.train.root=DIR --config.data.train.list=train.txt
    vtp train --config videomae_v2/finetune:g_k710_k400 --workdir runs/v2_k710_k400

Each stage is a run. It starts from the run or the imported weights in runs/v2 (of
pretrain_hybrid.py, with the same size); g_k710_... from those in runs/v2_k710. For another folder:
--config.warm_start.0.0=DIR.

    switch         what it does                             rate   layer decay  drop path   epochs
                   ViT-g on K710: the post-pretraining      1e-3           0.9        0.3       35
    g_k400         ViT-g on K400, without K710              1e-3           0.9        0.2       30
    g_k710_k400    ViT-g from K710 to K400                  1e-5           0.9       0.25        3
    g_k710_k600    ViT-g from K710 to K600                  1e-5           0.9       0.25        3
    g_k710_ucf101  ViT-g from K710 to UCF101, dropout 0.5   1e-3           0.9       0.35       50
    g_k710_hmdb51  ViT-g from K710 to HMDB51, dropout 0.5   5e-4           0.9       0.35       15
    g_ssv2         ViT-g on SSv2, without K710              3e-4           0.9       0.25       20
    H_k710         ViT-H on K710, dropout 0.5               1e-3           0.8        0.2       40
    H_k400         ViT-H on K400, dropout 0.5               1e-3           0.8        0.2       40
    H_k600         ViT-H on K600, dropout 0.5               1e-3           0.8        0.2       40
    H_ssv2         ViT-H on SSv2                            5e-4           0.8        0.2       20
    L_k400         ViT-L on K400                            2e-3          0.75        0.2       35
    L_ssv2         ViT-L on SSv2                            5e-4          0.75        0.2       20
    B_k710         ViT-B on K710                            7e-4          0.75        0.1       90
    B_k400         ViT-B on K400                            7e-4          0.75        0.1       90
    B_ssv2         ViT-B on SSv2                            2e-3          0.65        0.1       25
    tiny           a small net that names the colours of shapes drawn in memory, in a minute or two

Published, top-1 / top-5, 16 x 224^2, 5 x 3 views (SSv2 2 x 3): g K710 83.8/96.4, K400 87.2/97.4,
K710 to K400 88.4/98.0, to K600 88.8/98.2, to UCF101 99.6/100, to HMDB51 88.1/98.5, SSv2 77.0/95.9.

For K400 and K600 the head of K710 is trained further, restricted to the outputs of the data's
classes: task.pick is the path of a JSON list of them in the data's order, here
data/label_710to400.json and data/label_710to600.json, from misc/ of the code. For UCF101 and HMDB51
(here their first splits) the head is new. The switches cover all scripts of the code (@29eab1e,
where H_k600 has 4 clips: here 128, as H on K400). configs/videomae/finetune_k400.py lists what
differs from the code.
"""

from ml_collections import ConfigDict

from vtp_jax.setup import shipped
from vtp_jax.setup.recipes import parse_arg, pick

finetune = shipped.module("videomae/finetune_k400")
Recipe = finetune.Recipe

REMAT = "nothing_saveable"
GIANT = Recipe("g", 40, 96, 1e-3, 35, layer_decay=0.9, weight_decay=0.1, patch=14, remat=REMAT)
HUGE = Recipe("H", 32, 128, 1e-3, 40, layer_decay=0.8, drop_path=0.2, remat=REMAT)
CONTINUED = GIANT._replace(rate=1e-5, epochs=3, warmup=1, drop_path=0.25)
SMALL_DATA = GIANT._replace(batch=24, drop_path=0.35, dropout=0.5, weight_decay=0.05)
RECIPES = {
    "g_k710": GIANT._replace(data="k710", drop_path=0.3, clip=5.0),
    "g_k400": GIANT._replace(batch=192, epochs=30, drop_path=0.2),
    "g_k710_k400": CONTINUED._replace(pick="data/label_710to400.json"),
    "g_k710_k600": CONTINUED._replace(data="k600", pick="data/label_710to600.json"),
    "g_k710_ucf101": SMALL_DATA._replace(data="ucf101", epochs=50),
    "g_k710_hmdb51": SMALL_DATA._replace(data="hmdb51", rate=5e-4, epochs=15),
    "g_ssv2": GIANT._replace(
        data="ssv2", rate=3e-4, epochs=20, drop_path=0.25, weight_decay=0.05
    ),
    "H_k710": HUGE._replace(data="k710", dropout=0.5),
    "H_k400": HUGE._replace(dropout=0.5),
    "H_k600": HUGE._replace(data="k600", dropout=0.5),
    "H_ssv2": HUGE._replace(data="ssv2", rate=5e-4, epochs=20),
    "L_k400": Recipe("L", 24, 192, 2e-3, 35, drop_path=0.2),
    "L_ssv2": Recipe("L", 24, 192, 5e-4, 20, "ssv2", drop_path=0.2),
    "B_k710": Recipe("B", 12, 512, 7e-4, 90, "k710"),
    "B_k400": Recipe("B", 12, 512, 7e-4, 90),
    "B_ssv2": Recipe("B", 12, 256, 2e-3, 25, "ssv2", layer_decay=0.65),
}  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    switches = parse_arg(
        arg, "g_k400", "g_k710_k400", "g_k710_k600", "g_k710_ucf101", "g_k710_hmdb51", "g_ssv2",
        "H_k710", "H_k400", "H_k600", "H_ssv2", "L_k400", "L_ssv2", "B_k710", "B_k400", "B_ssv2",
        "tiny",
    )  # fmt: skip
    c = finetune.recognise(pick(switches, RECIPES, "g_k710"), "runs/v2")
    if switches & {"g_k710_k400", "g_k710_k600"}:  # the whole classifier is trained further
        c.warm_start, c.fresh = (("runs/v2_k710", "(params/.*)", r"\1"),), ()
        c.task.classes = finetune.DATA["k710"].classes
    if switches & {"g_k710_ucf101", "g_k710_hmdb51"}:
        kept = ("runs/v2_k710", "(params/(base|fc_norm)/.*)", r"\1")
        c.warm_start, c.fresh = (kept,), ("params/head/.*",)
    if "tiny" in switches:
        finetune.shrink(c)
    return c
