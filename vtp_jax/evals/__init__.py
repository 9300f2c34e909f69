"""Evaluators: make(*, encode, streams, mesh, check, **cfg) -> Evaluator. They get a method's
`encode` functions, never the method.

This module has what they share: finding the streams and verbs that a config names, and running a
function over a stream. A key that a stream or a verb lacks is reported when the function is traced:
by `check`, before the first training step, or else at the first batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vtp_jax.run import sharding
from vtp_jax.types import KEYS, Batch, Encoded, Spec, State, Stream, UserError

# (evaluator, f, names of streams): raises UserError unless f(params, extra, a batch of each) can be
# traced. `make` calls it for every function that it runs over a stream.
Check = Callable[..., None]


def unchecked(kind: str, f: Callable[..., Any], *names: str) -> None:
    """The Check of an evaluator that runs right after it is made."""


def need(kind: str, streams: Mapping[str, Stream], *names: str) -> None:
    """Raises UserError unless the data has these streams."""
    for name in names:
        if name not in streams:
            known = ", ".join(sorted(streams)) or "none"
            raise UserError(f"{kind}: no stream '{name}'; the data has {known}")


def verb(
    kind: str, encode: Mapping[str, Callable[..., Encoded]], name: str, *gives: str
) -> Callable[..., Encoded]:
    """`encode[name]`, which must return these keys."""
    if name not in encode:
        known = ", ".join(sorted(encode))
        raise UserError(f"{kind}: the method has no encode '{name}'; it has {known}")

    def f(*args: Any) -> Encoded:
        found = encode[name](*args)
        if lacking := [key for key in gives if key not in found]:
            known = ", ".join(sorted(found))
            raise UserError(f"{kind}: encode '{name}' gives no '{lacking[0]}'; it gives {known}")
        return found

    return f


def jitted(f: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`f`, jitted, with its results replicated on all devices."""
    return jax.jit(f, out_shardings=NamedSharding(mesh, PartitionSpec()))


def over(
    kind: str,
    streams: Mapping[str, Stream],
    name: str,
    f: Callable[..., Any],
    state: State,
    mesh: Mesh,
) -> Iterator[tuple[Batch, Any]]:
    """Each batch of a stream (this process's rows), and the result of f(params, extra, batch) on
    the host."""
    for batch in streams[name].batches():
        with sharding.activate(mesh), naming_keys(kind, name, batch):
            found = jax.device_get(f(state.params, state.extra, sharding.put(batch, mesh)))
        yield batch, found


@contextlib.contextmanager
def naming_keys(kind: str, name: str, keys: Iterable[str]) -> Iterator[None]:
    """Turns the KeyError of a key that batches of the stream lack into a one-line UserError."""
    try:
        yield
    except KeyError as error:
        if (key := error.args[0]) not in KEYS or key in keys:
            raise
        known = ", ".join(sorted(keys))
        raise UserError(
            f"{kind}: stream '{name}' has no '{key}', it has {known}; see docs/data.md"
        ) from None


def structure(kind: str, streams: Mapping[str, Stream], name: str) -> Spec:
    """Shapes and dtypes of a global batch of a stream; its first batch is made only if the stream
    does not tell them."""
    stream = streams[name]
    if stream.spec and stream.rows:
        return stream.spec
    first = next(stream.batches(), None)
    if first is None:
        raise UserError(f"{kind}: stream '{name}' has no rows; check the data")
    shapes = {k: (len(x) * jax.process_count(), *x.shape[1:]) for k, x in first.items()}
    return {k: jax.ShapeDtypeStruct(shapes[k], x.dtype) for k, x in first.items()}


def checker(state: State, streams: Mapping[str, Stream], mesh: Mesh) -> Check:
    """The Check for the shapes of a state; it makes a batch only of streams without a `spec`."""
    known: dict[str, Spec] = {}

    def check(kind: str, f: Callable[..., Any], *names: str) -> None:
        for name in names:
            if name not in known:
                known[name] = structure(kind, streams, name)
        specs = [known[name] for name in names]
        with sharding.activate(mesh), naming_keys(kind, "' and '".join(names), set().union(*specs)):
            jax.eval_shape(f, state.params, state.extra, *specs)

    return check
