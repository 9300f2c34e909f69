"""Momentum twins: moving averages of parameters, and the targets that they give (MoCo, arXiv
1911.05722; ALBEF, 2107.07651, section 3.3). A twin lives in a method's `extra` as a tree with the
names of the parameters that it averages.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtp_jax import tree
from vtp_jax.objectives.classification import soft_cross_entropy
from vtp_jax.types import Mean, Params, wide


def twin(params: Params, names: str) -> Params:
    """A copy, to average into, of the parameters whose whole names match the regex `names`. It is
    in fp32 or wider: in bf16 an average with a decay of 0.999 never moves."""
    taken = tree.split(params, lambda name: re.fullmatch(names, name) is not None)[0]
    return jax.tree.map(wide, taken)


def follow(old: Params, params: Params, decay: float | Float[Array, ""]) -> Params:
    """decay * old + (1 - decay) * params, for the parameters that the twin `old` has, in its
    dtypes."""
    new = tree.flatten(params)
    return tree.map_named(lambda name, x: decay * x + (1 - decay) * new[name].astype(x.dtype), old)


def soft_targets(
    logits: Float[Array, "b *n c"],
    own: Float[Array, "b *n c"],
    alpha: float | Float[Array, ""],
) -> Float[Array, "b *n c"]:
    """alpha * softmax(logits) + (1 - alpha) * own: the twin's predictions mixed into the targets
    that the data give (ALBEF, equations 6 and 7). No gradient flows into the twin."""
    return alpha * jax.lax.stop_gradient(jax.nn.softmax(wide(logits))) + (1 - alpha) * own


def distilled(
    logits: Float[Array, "b *n c"],
    twin_logits: Float[Array, "b *n c"],
    target: Int[Array, "b *n"],
    where: Bool[Array, "b *n"],
    alpha: float | Float[Array, ""],
) -> Mean:
    """Cross-entropy against `soft_targets` of classes, as for ALBEF's masked words (equation 7); at
    alpha 0 it is `classification.cross_entropy`."""
    own = jax.nn.one_hot(jnp.where(where, target, 0), logits.shape[-1], dtype=wide(logits).dtype)
    return soft_cross_entropy(logits, soft_targets(twin_logits, own, alpha), where)
