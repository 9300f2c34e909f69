"""Joint sequences: the tokens of a video followed by those of a text, in one row, and the masks
that define which token attends to which.

Shapes: b rows, k video tokens, all of them real, l text tokens, n = k + l, d width. Masks are True
where a query "b n _" may attend to a key "b _ n".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Pass = tuple[Float[Array, "b k d"], Float[Array, "b l d"], Bool[Array, "b #n n"]]


def join(video: Float[Array, "b k d"], text: Float[Array, "b l d"]) -> Float[Array, "b n d"]:
    return jnp.concatenate([video, text], axis=1)


def real(k: int, text_mask: Bool[Array, "b l"]) -> Bool[Array, "b n"]:
    """What is not padding: all of the video's tokens, the text's where `text_mask` holds."""
    return jnp.pad(text_mask, ((0, 0), (k, 0)), constant_values=True)


def together(k: int, text_mask: Bool[Array, "b l"]) -> Bool[Array, "b 1 n"]:
    """Every token attends to all of both."""
    return real(k, text_mask)[:, None]


def apart(k: int, text_mask: Bool[Array, "b l"]) -> Bool[Array, "b n n"]:
    """Every token attends to those of its own kind: two encoders in one pass."""
    keys = together(k, text_mask)
    is_text = jnp.arange(keys.shape[-1]) >= k
    return keys & (is_text[:, None] == is_text)


def prefix(k: int, text_mask: Bool[Array, "b l"]) -> Bool[Array, "b n n"]:
    """The video's tokens attend to each other, a word to the video and to the words up to itself: a
    captioner (UniLM, arXiv 1905.03197; LAVENDER, 2206.07160)."""
    keys = together(k, text_mask)
    place = jnp.arange(keys.shape[-1])
    return keys & (place <= jnp.maximum(place, k - 1)[:, None])


def encode_passes(
    encode: Callable[[Float[Array, "c n d"], Bool[Array, "c n n"]], Float[Array, "c n e"]],
    passes: Mapping[str, Pass],
) -> Mapping[str, Float[Array, "b n e"]]:
    """The output of `encode` for each (video, text, mask) by name, all of the same shapes. They are
    rows of one batch: a weight is read once, and its gradient computed in one product."""
    tokens, masks = [], []
    for video, text, mask in passes.values():
        tokens.append(join(video, text))
        n = tokens[0].shape[1]
        masks.append(jnp.broadcast_to(mask, (len(mask), n, n)))
    # Passes vary faster than rows: the device that holds a row holds all of its passes.
    x, mask = jnp.stack(tokens, axis=1), jnp.stack(masks, axis=1)
    y = encode(x.reshape(-1, *x.shape[2:]), mask.reshape(-1, *mask.shape[2:]))
    y = y.reshape(*x.shape[:2], *y.shape[1:])
    return {name: y[:, i] for i, name in enumerate(passes)}
