"""Published sizes of the backbones: one table, read by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vtp_jax.types import UserError


class Size(NamedTuple):
    """A stack of Transformer blocks. `mlp` is the hidden width of the feed-forward part."""

    width: int
    depth: int
    heads: int
    mlp: int


# ViT sizes; S to H as in VideoMAE (arXiv 2203.12602), g as in VideoMAE V2 (2303.16727), whose
# cubes are 2 x 14 x 14; tiny is for tests.
ENCODERS = {
    "tiny": Size(128, 2, 2, 512),
    "S": Size(384, 12, 6, 1536),
    "B": Size(768, 12, 12, 3072),
    "L": Size(1024, 24, 16, 4096),
    "H": Size(1280, 32, 16, 5120),
    "g": Size(1408, 40, 16, 6144),
}

# VideoMAE's decoders for encoders of the same names (official code; SimVTP-B's agrees with "B").
DECODERS = {
    "tiny": Size(64, 1, 1, 256),
    "S": Size(192, 4, 3, 768),
    "B": Size(384, 4, 6, 1536),
    "L": Size(512, 12, 8, 2048),
    "H": Size(640, 12, 8, 2560),
    "g": Size(512, 4, 8, 2234),  # mlp = width x 48 / 11, rounded down, as in the encoder
}

# CLIP's text towers for image towers of the same names (OpenAI's B and L, OpenCLIP's H).
TEXTS = {
    "tiny": Size(64, 2, 2, 256),
    "B": Size(512, 12, 8, 2048),
    "L": Size(768, 12, 12, 3072),
    "H": Size(1024, 24, 16, 4096),
}


def pick(table: dict[str, Size], size: str | Sequence[int], where: str) -> Size:
    """The size of a name in `table`, or of four numbers (width, depth, heads, mlp). On anything
    else, and where the heads do not divide the width, raises UserError, which begins with
    `where`."""
    if isinstance(size, str):
        if size not in table:
            raise UserError(f"{where}: no size '{size}'; known: {', '.join(table)}")
        return table[size]
    if len(size) != 4:
        raise UserError(f"{where}: a size is a name or (width, depth, heads, mlp), not {size}")
    chosen = Size(*size)
    if chosen.width % chosen.heads:
        raise UserError(f"{where}: {chosen.heads} heads do not divide the width {chosen.width}")
    return chosen


def check_patches(name: str, side: int, *patch: int) -> None:
    """Raises UserError unless patches of these sides divide a picture of side `method.{name}`."""
    if odd := [p for p in patch if side % p]:
        raise UserError(f"method.{name}={side} does not divide into patches of {odd[0]} pixels")
