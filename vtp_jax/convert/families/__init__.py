"""Published nets, one module per family, with its names, layouts, nets and formats.

A module defines `FORMATS`, name -> `formats.Format`, for imports and for comparisons of training.
"""

from __future__ import annotations

from vtp_jax.convert.families import (
    bert,
    clip,
    coca,
    huggingface,
    omnivl,
    simvtp,
    snclr,
    timm,
    tvtsv2,
    videomae,
)
from vtp_jax.convert.formats import Format

FAMILIES = (simvtp, videomae, huggingface, bert, timm, clip, tvtsv2, coca, snclr, omnivl)
EVERY: dict[str, Format] = {name: x for family in FAMILIES for name, x in family.FORMATS.items()}
FORMATS = {name: form for name, form in EVERY.items() if form.proof}  # can be imported
STEPS = {name: form for name, form in EVERY.items() if form.step}  # can be compared in training
