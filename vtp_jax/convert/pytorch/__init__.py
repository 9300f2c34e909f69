"""The files of a SimVTP folder in addition to its weights: a PyTorch module, and its sizes.

vtp_jax, which needs no PyTorch, does not import `simvtp.py`: it is copied (`MODULE`) into exported
folders and is self-contained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODULE = Path(__file__).with_name("simvtp.py")

Size = tuple[int, int, int, int]  # width, depth, heads, mlp: a `nn.sizes.Size`


def config(
    *,
    encoder: Size,
    decoder: Size | None,
    video: Sequence[int],
    cube: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    vocab_size: int,
    text_length: int,
    pad_id: int,
    dropout: float,
    pool_padding: bool,
) -> dict[str, Any]:
    """config.json of a SimVTP folder: everything that `MODULE` needs and tensors do not show.

    decoder: None for the two towers that are fine-tuned for retrieval. video: frames, height and
    width of a clip. text_length: rows of the position table. dropout: of word embeddings, in
    further training. pool_padding: texts are averaged over padding too, as in the released nets.
    """
    kind = "simvtp_finetune" if decoder is None else "simvtp"
    sizes = {"encoder": encoder} if decoder is None else {"encoder": encoder, "decoder": decoder}
    return dict(
        kind=kind,
        **{name: dict(zip(FIELDS, size, strict=True)) for name, size in sizes.items()},
        video=list(video),
        cube=list(cube),
        mean=list(mean),
        std=list(std),
        vocab_size=vocab_size,
        text_length=text_length,
        pad_id=pad_id,
        dropout=dropout,
        pool_padding=pool_padding,
    )


FIELDS = ("width", "depth", "heads", "mlp")
