"""Parts of recipes that configs share: switches, and rules on parameter names.

A config anywhere can import these. In a list of rules (regex, value) the first match wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ml_collections import ConfigDict, FieldReference

T = TypeVar("T")

# Leading axes of stacked blocks are layers. An axis that does not divide a dimension leaves it
# whole; the run's parameters.txt shows it.
SPLIT_BLOCKS = [
    (r".*/attn/qkv", (None, "fsdp", "tensor", None, None)),  # layer, d, head, 3, k
    (r".*/attn/(q|v|qkv)_bias", (None, "tensor")),
    (r".*/attn/proj/kernel", (None, "tensor", "fsdp")),
    (r".*/mlp/fc1/kernel", (None, "fsdp", "tensor")),
    (r".*/mlp/fc1/bias", (None, "tensor")),
    (r".*/mlp/fc2/kernel", (None, "tensor", "fsdp")),
]
SPLIT_WORDS = [(r"(.*/)?text_embed/word", ("tensor", "fsdp"))]
SPLIT_LOGITS = [(r"text_cls/kernel", ("fsdp", "tensor"))]
SPLIT_REST = [(r".*/kernel", "fsdp"), (r".*", ())]
SHARDING = [*SPLIT_BLOCKS, *SPLIT_WORDS, *SPLIT_LOGITS, *SPLIT_REST]  # of SimVTP

# BEiT's, MAE's and SimVTP's exclusions from weight decay: every bias and norm, and the mask token.
# The three tables of BERT's embeddings are decayed.
NO_DECAY = r".*/(bias|scale|(q|v|kv|qkv)_bias)|(.*/)?mask_token"
DECAY = [(NO_DECAY, dict(wd=0.0)), (r".*", dict())]


def layer_decay(
    decay: float, depth: int, *, first: str, blocks: str = r".*/blocks/.*"
) -> list[tuple[str, dict]]:
    """BEiT's layer-wise rates, as in VideoMAE's fine-tuning: factors decay^(depth + 1 - i) on the
    rate, where i is 0 for embeddings (names that `first` matches) and j + 1 for block j of `depth`.
    What follows the blocks has factor 1 and is left to the rules after these.
    """
    rates = [(first, decay ** (depth + 1)), (blocks, [decay ** (depth - j) for j in range(depth)])]
    rules = []
    for names, lr in rates:
        rules += [(rf"(?=({NO_DECAY})$)({names})", dict(lr=lr, wd=0.0)), (names, dict(lr=lr))]
    return rules


def share(c: ConfigDict, part: int, whole: int) -> FieldReference:
    """`part` of `whole` of the run's steps, rounded down: `share(c, 40, 200)` is 40 of 200 epochs.

    Like everything computed from `c.get_ref(...)`, it follows when a switch or a flag changes what
    it was computed from, and is a plain number to whoever reads the config.
    """
    return c.get_ref("steps") * part // whole


def per_clips(c: ConfigDict, value: float, clips: int = 256) -> FieldReference:
    """`value` for batches of `clips` rows, in proportion to the rows of the run's batches."""
    return value * c.get_ref("batch").to_float() / clips


def pick(switches: set[str], table: Mapping[str, T], default: str) -> T:
    """The entry of `table` that one of the switches names, or the default's. Raises ValueError if
    several do."""
    named = sorted(switches & set(table))
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} exclude each other; choose one")
    return table[named[0] if named else default]


def parse_arg(argument: str | None, *known: str) -> set[str]:
    """The switches in `NAME:a,b`. Raises ValueError if one is not among `known`."""
    switches = {s for s in (argument or "").split(",") if s}
    if wrong := sorted(switches - set(known)):
        raise ValueError(f"no switch '{wrong[0]}'; this config has {', '.join(known)}")
    return switches
