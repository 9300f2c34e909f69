"""A `Case` for each method, for tests/methods/test_laws.py. A new method adds its own here."""

import functools

from tests.methods.laws import DEEP, LENGTH, SIZE, Case, Made, Tasks
from vtp_jax.methods import coca, omnivl, simvtp, snclr, tvtsv2, videomae

POOLS = ("mean_norm", "embedding")
FLIPPED = dict(jittered=0.0, grey=0.0, blur=0.0, solarise=0.0)
CASES = dict(
    simvtp=Case(
        simvtp.make, "simvtp/pretrain_webvid",
        dict(size=DEEP, decoder=SIZE, cube=(2, 8, 8), video_ratio=0.5, text_ratio=0.5, groups=2,
             dropout=0.1, vocab_size=30, pad_id=0, mask_id=3,
             weights=dict(video=1.5, text=0.7, vtc=1.2, vtm=0.4)),
        text=True, grouped=("vtc", "vtm"),
        tasks=Tasks(
            retrieve=POOLS, classify=POOLS, answer=("pair", "embedding"),
            never=("text_.*", "vtm_head/.*", "decoder.*", "encoder_to_decoder/.*", "mask_token"),
            mean_norm=("encoder_norm/.*",),
        ),
    ),
    videomae=Case(
        videomae.make, "videomae/pretrain_k400",
        dict(size=DEEP, decoder=SIZE, cube=(2, 8, 8), ratio=0.5),
        tasks=Tasks(
            classify=POOLS, never=("decoder.*", "encoder_to_decoder/.*", "mask_token"),
            mean_norm=("encoder_norm/.*",),
        ),
    ),
    videomae_v2=Case(
        videomae.make, "videomae_v2/pretrain_hybrid",
        dict(size=DEEP, decoder=SIZE, cube=(2, 4, 4), ratio=0.75, decoder_ratio=0.5,
             drop_path=0.2),
    ),
    coca=Case(
        coca.make, "coca/pretrain",
        dict(size=SIZE, text_size=SIZE, side=16, patch=8, queries=3, length=LENGTH + 2,
             weights=dict(contrast=0.7, caption=1.6)),
        video=(2, 16, 16), text=True, random=False,
        tasks=Tasks(
            retrieve=POOLS, classify=POOLS, answer=("embedding",), never=("text/.*", "logit_scale"),
            mean_norm=("visual/norm/.*", ".*_pool/.*", "video_proj/.*"),
        ),
    ),
    snclr=Case(
        snclr.make, "snclr/pretrain_imagenet",
        # Views are flipped only: the other changes have tests of their own and cost half a step.
        dict(size=SIZE, cube=(1, 8, 8), hidden=16, features=8, neighbours=3, queue=16,
             momentum=dict(kind="linear", start=0.0, end=1.0, steps=4), first=FLIPPED,
             second=FLIPPED),
        video=(2, 1, 16, 16), views=True, decays_biases=True,
        tasks=Tasks(
            classify=POOLS, never=("projector/.*", "predictor/.*"), mean_norm=("norm/.*",)
        ),
    ),
    tvtsv2=Case(
        tvtsv2.make, "tvtsv2/pretrain_yt_webvid",
        dict(size=SIZE, text_size=SIZE, features=16, side=16, patch=8, frames=5, turns=2, ratio=0.5,
             text_length=LENGTH + 2, weights=dict(vtc=0.7, sort=1.6)),
        video=(2, 2, 16, 16), text=True, texts=2,
        tasks=Tasks(
            retrieve=("embedding",), classify=POOLS, answer=("embedding",),
            never=("text/.*", "sorter/.*"), computed=("visual/(norm|proj)/.*",),
        ),
    ),
    omnivl=Case(
        omnivl.make, "omnivl/pretrain",
        # Dropout, which adds half to what is compiled, is traced in tests/methods/test_omnivl.py.
        dict(size=DEEP, text_size=SIZE, features=8, picture=16, frames=4, cube=(2, 8, 8), queue=16,
             text_length=LENGTH + 2, groups=2, momentum=0.8, length=5, dropout=0.0,
             alpha=dict(kind="linear", start=0.0, end=0.8, steps=2),
             weights=dict(contrast=0.7, match=1.6, words=0.5)),
        text=True, label=True, always=("contrast",), grouped=("contrast", "match", "words"),
        given=dict(temperature=0.07),
        tasks=Tasks(
            retrieve=POOLS, classify=POOLS, answer=("pair", "embedding"),
            never=("text.*", "decoder/.*", ".*_head/.*", "temperature"),
            mean_norm=("video_proj/.*",),
            computed=("visual/(norm|patch_embed)/.*",),  # patch_embed: of images
        ),
    ),
)  # fmt: skip


@functools.cache
def made(name: str) -> Made:
    """The laws and the method's own tests share its programs: one worker runs both."""
    return Made(CASES[name])
