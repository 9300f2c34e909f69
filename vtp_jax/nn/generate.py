"""Generation word by word: the most likely word at every position (`greedy`), or the most likely
text that a search finds (`beam`).

Pure functions of a `Step` and its memory, under jit, with static shapes: every row has room for l
tokens, and a while loop ends when all rows have ended. Row i depends on row i only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

T = TypeVar("T")
Cache = PyTree  # whatever a step remembers of the tokens that it was given
# (cache, token i32 "r", place i32 "r") -> (logits "r v" of the token after it, cache): `token` of a
# row stands at `place`, and the cache knows the row's tokens before it. Asked once more for a place
# it answers for the new token. A cache keeps its structure, shapes and dtypes.
Step = Callable[[Cache, Int[Array, " r"], Int[Array, " r"]], tuple[Float[Array, "r v"], Cache]]


def rereading(
    read: Callable[[Int[Array, "r l"], Bool[Array, "r l"]], Float[Array, "r l v"]],
) -> Step:
    """The step of a net that remembers nothing: `read` gives the logits after each token of whole
    lines, where a mask is True. The cache is the lines, as `ids` is at first."""

    def step(
        ids: Int[Array, "r l"], token: Int[Array, " r"], place: Int[Array, " r"]
    ) -> tuple[Float[Array, "r v"], Int[Array, "r l"]]:
        ids = put(ids, place, token)
        return at(read(ids, jnp.arange(ids.shape[1]) <= place[:, None]), place), ids

    return step


def begin(
    rows: int, length: int, start_id: int, pad_id: int
) -> tuple[Int[Array, "b l"], Int[Array, " b"]]:
    """Lines of which only the first token stands, `start_id`: ids, and how many tokens each has."""
    ids = jnp.full((rows, length), pad_id, jnp.int32).at[:, 0].set(start_id)
    return ids, jnp.ones(rows, jnp.int32)


class Said(NamedTuple):
    """ids: each row its prompt, what follows it and `end_id`, then padding; a row that is full has
    no end. score: the log probability of what follows, divided where a search says so."""

    ids: Int[Array, "b l"]
    score: Float[Array, " b"]


class Line(NamedTuple):
    """`greedy` underway. place: of the last token of each row."""

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
) -> Said:
    """The likeliest token at every place, until `end_id` or until the row is full.

    ids: each row begins with `start` tokens of a prompt, at least one; what stands behind them is
    not read. cache: it knows the prompts but for their last tokens, which may be in it or not.
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
    return Said(last.ids, last.score)


class Search(NamedTuple):
    """`beam` underway: g lines a row that have not ended, and the best of those that have."""

    ids: Int[Array, "b g l"]
    log_p: Float[Array, "b g"]  # of what follows the prompt
    place: Int[Array, " b"]
    best: Said
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
) -> Said:
    """The best line that is found by going on with the `beams` likeliest at every place.

    A line's score is its log probability / n^penalty, n the tokens behind the prompt, the end
    included. Every line that goes on may also end, at every place; one that fills its row need
    not. With as many beams as there are lines the search is exhaustive.

    axis: of the rows in every leaf of the cache, which has the b rows of `ids`; `step` is given
    b x beams, those of one row one after the other. The rest as in `greedy`.
    """
    (b, length), g = ids.shape, beams
    room = jnp.maximum(length - start, 1)  # the most tokens that a row can get

    def advance(carry: tuple[Search, Cache]) -> tuple[Search, Cache]:
        now, cache = carry
        place = jnp.repeat(now.place, g)
        logits, cache = step(cache, at(now.ids.reshape(b * g, length), place), place)
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(b, g, -1)
        place, v = now.place + 1, log_p.shape[-1]
        places = jnp.broadcast_to(place[:, None], (b, g))
        count = (places - start[:, None] + 1).astype(jnp.float32) ** penalty

        # Every line ended here; then the likeliest of those that go on.
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
        best = Said(at(found, first), at(score, first))
        # Going on makes a line less likely only: no line can still get more than this.
        hope = likely.max(axis=1) / room.astype(jnp.float32) ** penalty
        new = Search(lines, likely, place, best, full | (best.score >= hope))
        return where(now.done, now, new), pick(cache, parent, axis)

    ids = cleared(ids, start, pad_id)
    full = start == length
    first = Search(
        jnp.repeat(ids[:, None], g, axis=1),
        jnp.full((b, g), -jnp.inf).at[:, 0].set(0.0),  # one line, not g that are equal
        start.astype(jnp.int32) - 1,
        Said(ids, jnp.where(full, 0.0, -jnp.inf)),
        full,
    )
    lines = jax.tree.map(lambda x: jnp.repeat(x, g, axis=axis), cache)
    last, _ = jax.lax.while_loop(lambda carry: ~carry[0].done.all(), advance, (first, lines))
    return last.best


def cleared(ids: Int[Array, "b l"], start: Int[Array, " b"], pad_id: int) -> Int[Array, "b l"]:
    """The prompts alone."""
    return jnp.where(jnp.arange(ids.shape[1]) < start[:, None], ids, pad_id)


def at(x: Shaped[Array, "b n *d"], index: Int[Array, " b"]) -> Shaped[Array, "b *d"]:
    """What each row has at its own place."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def put(
    ids: Int[Array, "*b l"], place: Int[Array, "*b"], token: Int[Array, "*b"]
) -> Int[Array, "*b l"]:
    """The rows with a token at a place of each."""
    return jnp.where(jnp.arange(ids.shape[-1]) == place[..., None], token[..., None], ids)


def where(done: Bool[Array, " b"], old: T, new: T) -> T:
    """`old` in rows that are done, `new` in the others."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(done.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, old, new)


def pick(cache: Cache, parent: Int[Array, "b g"], axis: int) -> Cache:
    """The cache in which line j of row i goes on from line parent[i, j] of that row."""

    def go_on(x: Array) -> Array:
        lines = x.reshape(*x.shape[:axis], *parent.shape, *x.shape[axis + 1 :])
        take = partial(jnp.take, axis=axis)
        return jax.vmap(take, (axis, 0), axis)(lines, parent).reshape(x.shape)

    return jax.tree.map(go_on, cache)
