"""What configs share: their arguments, and rules on parameter names (first match wins)."""

from __future__ import annotations

# Leading axes of stacked blocks are layers. An axis that does not divide a dimension leaves it
# whole, and the run's parameter table shows it.
SHARDING = [
    (r".*/attn/qkv", (None, "fsdp", "tensor", None, None)),  # layer, d, head, 3, k
    (r".*/attn/[qv]_bias", (None, "tensor", None)),
    (r".*/attn/proj/kernel", (None, "tensor", "fsdp")),
    (r".*/mlp/fc1/kernel", (None, "fsdp", "tensor")),
    (r".*/mlp/fc1/bias", (None, "tensor")),
    (r".*/mlp/fc2/kernel", (None, "tensor", "fsdp")),
    (r"text_embed/word", ("tensor", "fsdp")),
    (r"text_cls/kernel", ("fsdp", "tensor")),
    (r".*/kernel", "fsdp"),
    (r".*", ()),
]

# BEiT's, MAE's and SimVTP's exclusions from weight decay: every bias and norm, and the mask token.
# The three tables of BERT's embeddings are decayed.
DECAY = [
    (r".*/(bias|scale|q_bias|v_bias)|mask_token", dict(wd=0.0)),
    (r".*", dict()),
]


def parse_arg(argument: str | None, *known: str) -> set[str]:
    """The switches in `FILE.py:a,b`. A switch that is not known is an error."""
    switches = {s for s in (argument or "").split(",") if s}
    if wrong := sorted(switches - set(known)):
        raise ValueError(f"no switch '{wrong[0]}'; this config has {', '.join(known)}")
    return switches
