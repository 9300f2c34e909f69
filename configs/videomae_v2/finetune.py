"""VideoMAE V2: post-pretraining on K710, and fine-tuning (Wang et al., arXiv 2303.16727).

    python -m vtp_jax.train --config configs/videomae_v2/finetune.py --workdir runs/v2_g_k710 \
        --config.data.train.root=DIR --config.data.train.captions=train.txt
    python -m vtp_jax.train --config configs/videomae_v2/finetune.py:g_k710_k400 --workdir runs/k400

It starts from the run or the imported weights that warm_start names; every stage is a run.

    switch        what it does                              rate   layer decay  drop path   epochs
                  ViT-g on K710: the post-pretraining       1e-3           0.9        0.3       35
    g_k400        ViT-g on K400, without K710               1e-3           0.9        0.2       30
    g_k710_k400   ViT-g from K710 to K400                   1e-5           0.9       0.25        3
    g_ssv2        ViT-g on SSv2, without K710               3e-4           0.9       0.25       20
    H_k400        ViT-H on K400, dropout 0.5                1e-3           0.8        0.2       40
    H_ssv2        ViT-H on SSv2                             5e-4           0.8        0.2       20
    L_k400        ViT-L on K400                             2e-3          0.75        0.2       35
    L_ssv2        ViT-L on SSv2                             5e-4          0.75        0.2       20
    B_k400        ViT-B on K400                             7e-4          0.75        0.1       90
    B_ssv2        ViT-B on SSv2                             2e-3          0.65        0.1       25
    tiny          a small net that names the colours of shapes drawn in memory, in under a minute

Published, top-1 / top-5, 16 x 224^2, 5 x 3 views (SSv2 2 x 3): g K710 83.8/96.4, K400 87.2/97.4,
K710 to K400 88.4/98.0, SSv2 77.0/95.9.

g_k710_k400 trains on with K710's head, of which it reads the 400 outputs that are K400's classes:
give them in K400's order, --config.task.pick="(N, N, ...)" (the code's misc/label_710to400.json).
Without that they are the first 400. configs/videomae/finetune_k400.py says what is not as in the
code.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg, pick
from configs.videomae.finetune_k400 import DATA, Recipe, recognise, shrink

GIANT = Recipe("g", 40, 96, 1e-3, 35, layer_decay=0.9, weight_decay=0.1, patch=14)
HUGE = Recipe("H", 32, 128, 1e-3, 40, layer_decay=0.8, drop_path=0.2)
RECIPES = {
    "g_k710": GIANT._replace(data="k710", drop_path=0.3, clip=5.0),
    "g_k400": GIANT._replace(batch=192, epochs=30, drop_path=0.2),
    "g_k710_k400": GIANT._replace(rate=1e-5, epochs=3, warmup=1, drop_path=0.25),
    "g_ssv2": GIANT._replace(
        data="ssv2", rate=3e-4, epochs=20, drop_path=0.25, weight_decay=0.05
    ),
    "H_k400": HUGE._replace(dropout=0.5),
    "H_ssv2": HUGE._replace(data="ssv2", rate=5e-4, epochs=20),
    "L_k400": Recipe("L", 24, 192, 2e-3, 35, drop_path=0.2),
    "L_ssv2": Recipe("L", 24, 192, 5e-4, 20, "ssv2", drop_path=0.2),
    "B_k400": Recipe("B", 12, 512, 7e-4, 90),
    "B_ssv2": Recipe("B", 12, 256, 2e-3, 25, "ssv2", layer_decay=0.65),
}  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    switches = parse_arg(
        arg, "g_k400", "g_k710_k400", "g_ssv2", "H_k400", "H_ssv2", "L_k400", "L_ssv2",
        "B_k400", "B_ssv2", "tiny",
    )  # fmt: skip
    c = recognise(pick(switches, RECIPES, "g_k710"), "runs/v2")
    if "g_k710_k400" in switches:  # the whole classifier goes on
        c.warm_start, c.fresh = [("runs/v2_g_k710", "(params/.*)", r"\1")], []
        c.task.classes, c.task.pick = DATA["k710"].classes, tuple(range(DATA["k400"].classes))
    if c.method.size in ("H", "g"):
        c.method.remat = "nothing_saveable"
    if "tiny" in switches:
        shrink(c)
    return c
