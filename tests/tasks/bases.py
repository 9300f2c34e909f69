"""What each task does with each method: one row a method. test_every_base.py traces every cell, and
`python -m tests.tables` writes them to docs/methods.md."""

from collections.abc import Mapping
from typing import NamedTuple


class Base(NamedTuple):
    """What tasks accept of a method; the names are regexes of the method's parameters.

    retrieve, classify: the values of `config.task.pool` that work; answer: those of
        `config.task.fuse`. Any other value is rejected with a one-line error
    never: the parameters that `classify` never reads, for `config.task.drop`
    mean_norm: those that it does not read with pool="mean_norm" either
    """

    retrieve: tuple[str, ...] = ()
    classify: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    mean_norm: tuple[str, ...] = ()


POOLS = ("mean_norm", "embedding")
BASES: Mapping[str, Base] = dict(
    coca=Base(
        retrieve=POOLS,
        classify=POOLS,
        answer=("embedding",),
        never=("text/.*", "logit_scale"),
        mean_norm=("visual/norm/.*", ".*_pool/.*", "video_proj/.*"),
    ),
    omnivl=Base(
        retrieve=POOLS,
        classify=POOLS,
        answer=("pair", "embedding"),
        never=("text.*", "decoder/.*", ".*_head/.*", "temperature"),
        mean_norm=("video_proj/.*",),
    ),
    simvtp=Base(
        retrieve=POOLS,
        classify=POOLS,
        answer=("pair", "embedding"),
        never=("text_.*", "vtm_head/.*", "decoder.*", "encoder_to_decoder/.*", "mask_token"),
        mean_norm=("encoder_norm/.*",),
    ),
    snclr=Base(classify=POOLS, never=("projector/.*", "predictor/.*"), mean_norm=("norm/.*",)),
    tvtsv2=Base(
        retrieve=("embedding",),
        classify=POOLS,
        answer=("embedding",),
        never=("text/.*", "sorter/.*"),
    ),
    videomae=Base(
        classify=POOLS,
        never=("decoder.*", "encoder_to_decoder/.*", "mask_token"),
        mean_norm=("encoder_norm/.*",),
    ),
)
