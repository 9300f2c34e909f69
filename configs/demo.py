"""SimVTP on drawn scenes, from real mp4 files, in minutes on two CPU cores: `make demo`.

    vtp demo                          corpus, tokenizer, training, evaluation, report
    vtp demo --ablation no_contrast
    vtp train --config demo --workdir runs/mine    training only

The corpus (`vtp prepare shapes --corpus scenes --out runs/scenes`) shows a thing that moves near a
ring, on a patterned ground, while a light changes its colour. Its 200 evaluation clips show scenes
that never occur in training. The target is pixels, not normalised cubes as in the paper:
they need no statistics of hidden cubes to be looked at, and the codec's noise in cubes of one
colour is not blown up to the size of a pattern.

    switch       what it does
    no_contrast  without VTC and VTM: masked autoencoding only; retrieval stays near chance
    no_masking   without masks: VTC and VTM on whole videos and captions
    tiny         a few steps of a smaller net on clips drawn in memory
"""

from ml_collections import ConfigDict

from vtp_jax.setup.recipes import DECAY, SHARDING, parse_arg, share


def get_config(arg: str = "") -> ConfigDict:
    switches = parse_arg(arg, "no_contrast", "no_masking", "tiny")
    c = ConfigDict()
    c.seed = 0
    c.steps = 2000
    c.batch = 32

    c.data = ConfigDict()
    c.data.kind = "files"
    c.data.train = dict(root="runs/scenes", list="runs/scenes/train.csv")
    c.data.evals = dict(val=dict(root="runs/scenes", list="runs/scenes/val.csv"))
    # Every second of 16 frames. No random crop: captions say what is above and below.
    c.data.video = dict(frames=8, stride=2, size=64, crop="centre")
    model = "runs/scenes/tokenizer.model"
    c.data.text = dict(kind="sentencepiece", path=model, length=22, vocab_size=300)

    # The paper's losses and temperature; the net is small. At 64 pixels there are 64 tubes: a ratio
    # of 0.65 shows 23 of them, about as many as the paper's 20 of 196. Half of the words are
    # hidden, not three quarters: a small net learns from those that remain within minutes.
    c.method = ConfigDict()
    c.method.name = "simvtp"
    c.method.size = (128, 3, 2, 256)
    c.method.decoder = (64, 1, 1, 256)
    c.method.cube = (8, 8, 8)
    c.method.video_ratio = 0.65
    c.method.text_ratio = 0.5
    c.method.target = "pixels"
    # Errors of pixels in [0, 1] are small: at 20 times, L_v is about as large as the others.
    c.method.weights = dict(video=20.0, text=1.0, vtc=1.0, vtm=1.0)
    c.method.dropout = 0.0
    c.method.sum_directions = True  # VTC's weight as in the reference
    c.method.dtype = "float32"  # CPUs have no fast bf16
    c.method.unroll = 3

    c.optim = ConfigDict()
    c.optim.lr = dict(
        kind="warmup_cosine", peak=1.8e-3, end=1e-5,
        warmup=share(c, 150, 2000), steps=share(c, 1, 1),
    )  # fmt: skip
    c.optim.betas = (0.9, 0.95)
    c.optim.weight_decay = 0.05
    c.optim.rules = DECAY

    c.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1)
    c.sharding = SHARDING
    c.evals = ConfigDict()
    c.evals.retrieval = dict(type="retrieval", stream="val", every=400)
    c.evals.restoration = dict(type="restoration", stream="val", every=400)
    c.evals.losses = dict(type="mean", stream="val", every=400)
    c.checkpoint = dict(every=1000, keep=2)
    c.log = dict(every=20)

    if "no_contrast" in switches:
        c.method.weights.update(vtc=0.0, vtm=0.0)
    if "no_masking" in switches:
        c.method.update(video_ratio=0.0, text_ratio=0.0)
        c.method.weights.update(video=0.0, text=0.0)
        del c.evals.restoration
    if "tiny" in switches:
        c.steps, c.batch = 12, 16
        c.data.kind = "shapes"
        c.data.train, c.data.evals = dict(clips=64), dict(val=dict(clips=16))
        c.data.text.update(path=None, vocab_size=256)
        c.method.size, c.method.unroll = (64, 1, 1, 128), 1
        c.optim.lr.update(peak=1e-3)
        c.optim.lr.warmup = share(c, 4, 12)
        c.checkpoint.every, c.log.every = 6, 2
        for one in c.evals.values():
            one.every = 6
    return c
