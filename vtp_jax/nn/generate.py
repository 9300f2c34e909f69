"""Generation word by word: the most likely word at every position (`greedy`), or the most likely
text that a search finds (`beam`).

Pure functions of a `Step` and its cache, under jit, with static shapes: every row has room for l
tokens, and a while loop ends when all rows have ended. Row i of the result depends on row i only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

T = TypeVar("T")
Cache = PyTree  # whatever a step keeps of the tokens that it has been given
# (cache, token i32 "r", place i32 "r") -> (logits "r v" of the next token, cache). `token` is the
# row's token at index `place`; the cache covers the row's tokens before it. Calling a step again
# with the same place replaces the token there. A cache keeps its structure, shapes and dtypes.
Step = Callable[[Cache, Int[Array, " r"], Int[Array, " r"]], tuple[Float[Array, "r v"], Cache]]


def rereading(
    read: Callable[[Int[Array, "r l"], Bool[Array, "r l"]], Float[Array, "r l v"]],
) -> Step:
    """The step of a net without a cache: `read` returns the logits after each token of whole rows,
    of which a mask marks the tokens that are there. The cache is the rows, initially `ids`."""

    def step(
        ids: Int[Array, "r l"], token: Int[Array, " r"], place: Int[Array, " r"]
    ) -> tuple[Float[Array, "r v"], Int[Array, "r l"]]:
        ids = put(ids, place, token)
        return at(read(ids, jnp.arange(ids.shape[1]) <= place[:, None]), place), ids

    return step


def begin(
    rows: int, length: int, start_id: int, pad_id: int
) -> tuple[Int[Array, "b l"], Int[Array, " b"]]:
    """Rows that contain the token `start_id` and then padding: (ids, the length of each, 1)."""
    ids = jnp.full((rows, length), pad_id, jnp.int32).at[:, 0].set(start_id)
    return ids, jnp.ones(rows, jnp.int32)


class Generated(NamedTuple):
    """ids: in each row the prompt, the generated tokens, `end_id`, then padding; a row that is full
    has no `end_id`. score: the log probability of what follows the prompt; from `beam`, divided by
    the length penalty."""

    ids: Int[Array, "b l"]
    score: Float[Array, " b"]


class Line(NamedTuple):
    """The loop state of `greedy`. place: index of the last token of each row."""

    ids: Int[Array, "b l"]
    score: Float[Array, " b"]
    place: Int[Array, " b"]
    done: Bool[Array, " b"]


def greedy(
    step: Step,
    cache: Cache,
    ids: Int[Array, "b l"],
    start: Int[Array, " b"],
    *,
    end_id: int,
    pad_id: int = 0,
) -> Generated:
    """The most likely token at every position, until `end_id` or until the row is full.

    ids: each row begins with a prompt of `start` tokens, at least one; the rest is not read.
    cache: covers the prompts; it makes no difference whether their last tokens are in it.
    """
    length = ids.shape[1]

    def advance(carry: tuple[Line, Cache]) -> tuple[Line, Cache]:
        now, cache = carry
        logits, cache = step(cache, at(now.ids, now.place), now.place)
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        token, place = jnp.argmax(log_p, axis=-1).astype(ids.dtype), now.place + 1
        done = (token == end_id) | (place == length - 1)
        new = Line(put(now.ids, place, token), now.score + log_p.max(axis=-1), place, done)
        return where(now.done, now, new), cache

    place = start.astype(jnp.int32) - 1
    first = Line(cleared(ids, start, pad_id), jnp.zeros(len(ids)), place, place == length - 1)
    last, _ = jax.lax.while_loop(lambda carry: ~carry[0].done.all(), advance, (first, cache))
    return Generated(last.ids, last.score)


class Search(NamedTuple):
    """The loop state of `beam`: for each row g open lines, and the best line that has ended."""

    ids: Int[Array, "b g l"]
    log_p: Float[Array, "b g"]  # of what follows the prompt
    place: Int[Array, " b"]
    best: Generated
    done: Bool[Array, " b"]


def beam(
    step: Step,
    cache: Cache,
    ids: Int[Array, "b l"],
    start: Int[Array, " b"],
    *,
    beams: int,
    end_id: int,
    pad_id: int = 0,
    penalty: float = 1.0,
    axis: int = 0,
) -> Generated:
    """The best line found by a search that keeps the `beams` most likely lines at every position.

    The score of a line is its log probability / n^penalty, where n is the number of tokens after
    the prompt, including `end_id`. An open line may end at any position; a line that fills its row
    needs no `end_id`. With `beams` at least the number of possible lines, the search is exhaustive.

    axis: the row axis of every leaf of the cache, of size b as in `ids`; `step` gets b x beams
    rows, the lines of one row consecutively. The rest is as in `greedy`.
    """
    (b, length), g = ids.shape, beams
    room = jnp.maximum(length - start, 1)  # the largest number of tokens after the prompt

    def advance(carry: tuple[Search, Cache]) -> tuple[Search, Cache]:
        now, cache = carry
        place = jnp.repeat(now.place, g)
        logits, cache = step(cache, at(now.ids.reshape(b * g, length), place), place)
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(b, g, -1)
        place, v = now.place + 1, log_p.shape[-1]
        places = jnp.broadcast_to(place[:, None], (b, g))
        count = (places - start[:, None] + 1).astype(jnp.float32) ** penalty

        # Every line with `end_id` here, then the most likely continuations.
        ended = put(now.ids, places, jnp.full((b, g), end_id, ids.dtype))
        ended_score = (now.log_p + log_p[..., end_id]) / count
        onward = (now.log_p[..., None] + log_p).at[..., end_id].set(-jnp.inf)
        likely, chosen = jax.lax.top_k(onward.reshape(b, g * v), g)
        parent, token = chosen // v, (chosen % v).astype(ids.dtype)
        lines = put(jnp.take_along_axis(now.ids, parent[..., None], axis=1), places, token)
        full = place == length - 1
        full_score = jnp.where(full[:, None], likely / count, -jnp.inf)

        found = jnp.concatenate([now.best.ids[:, None], ended, lines], axis=1)
        score = jnp.concatenate([now.best.score[:, None], ended_score, full_score], axis=1)
        first = jnp.argmax(score, axis=1)
        best = Generated(at(found, first), at(score, first))
        # A continuation only lowers the log probability, so no open line can exceed this score.
        hope = likely.max(axis=1) / room.astype(jnp.float32) ** penalty
        new = Search(lines, likely, place, best, full | (best.score >= hope))
        return where(now.done, now, new), pick(cache, parent, axis)

    ids = cleared(ids, start, pad_id)
    full = start == length
    first = Search(
        jnp.repeat(ids[:, None], g, axis=1),
        jnp.full((b, g), -jnp.inf).at[:, 0].set(0.0),  # one line, not g that are equal
        start.astype(jnp.int32) - 1,
        Generated(ids, jnp.where(full, 0.0, -jnp.inf)),
        full,
    )
    lines = jax.tree.map(lambda x: jnp.repeat(x, g, axis=axis), cache)
    last, _ = jax.lax.while_loop(lambda carry: ~carry[0].done.all(), advance, (first, lines))
    return last.best


def cleared(ids: Int[Array, "b l"], start: Int[Array, " b"], pad_id: int) -> Int[Array, "b l"]:
    """The prompts, with padding after them."""
    return jnp.where(jnp.arange(ids.shape[1]) < start[:, None], ids, pad_id)


def at(x: Shaped[Array, "b n *d"], index: Int[Array, " b"]) -> Shaped[Array, "b *d"]:
    """The entry of each row at that row's index."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def put(
    ids: Int[Array, "*b l"], place: Int[Array, "*b"], token: Int[Array, "*b"]
) -> Int[Array, "*b l"]:
    """The rows with the token at index `place` of each replaced by `token`."""
    return jnp.where(jnp.arange(ids.shape[-1]) == place[..., None], token[..., None], ids)


def where(done: Bool[Array, " b"], old: T, new: T) -> T:
    """`old` in rows that are done, `new` in the others."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(done.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, old, new)


def pick(cache: Cache, parent: Int[Array, "b g"], axis: int) -> Cache:
    """The cache in which line j of row i continues line parent[i, j] of that row."""

    def reorder(x: Array) -> Array:
        lines = x.reshape(*x.shape[:axis], *parent.shape, *x.shape[axis + 1 :])
        take = partial(jnp.take, axis=axis)
        return jax.vmap(take, (axis, 0), axis)(lines, parent).reshape(x.shape)

    return jax.tree.map(reorder, cache)
