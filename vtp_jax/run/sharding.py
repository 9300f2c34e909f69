"""Meshes, shardings by rules on names, and moving batches from the host to the mesh.

There are four mesh axes: the rows of a batch are split over `data` and `fsdp`, the tokens of a row
over `sequence`, parameters over `fsdp` and `tensor`. Rules `(regex, spec)` on parameter names
(tree.match) define how each is split; a spec is `()` (replicated), `"fsdp"` (the largest dimension
that the axis divides), or a tuple with one entry per dimension: an axis, a tuple of axes, or None.
"""

from __future__ import annotations

import contextlib
import functools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from absl import logging
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vtp_jax import tree
from vtp_jax.types import Batch, State, UserError

T = TypeVar("T")
Spec = str | Sequence[str | Sequence[str] | None]
Rules = Sequence[Sequence[Any]]  # [(regex, Spec)], lists where JSON made them

AXES = ("data", "fsdp", "sequence", "tensor")
ROWS = ("data", "fsdp")
EXTRA = "extra/"  # prefix of the rules for a state's `extra`

# Logical axes of activations, for nn.with_logical_constraint: a network names axes without knowing
# the mesh. Residual activations stay whole over `tensor`; heads and hidden units are split over it.
# Keys and values are gathered over `sequence`, since each device's queries need all of them.
ACTIVATIONS = (
    ("act_batch", ROWS),
    ("act_len", "sequence"),
    ("act_keys", None),
    ("act_emb", None),
    ("act_heads", "tensor"),
)


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The mesh of all devices (or of `devices`). One axis may be -1: it takes the remaining ones.

    Axes are Auto: the compiler propagates shardings from the arrays that are placed on the mesh.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
    asked = ", ".join(f"{k}={v}" for k, v in sizes.items())
    if wrong := [k for k, v in sizes.items() if v < 1 and v != -1]:
        raise UserError(
            f"mesh: {wrong[0]}={sizes[wrong[0]]}; an axis must be at least 1, or -1 to fill"
        )
    open_axes = [k for k, v in sizes.items() if v == -1]
    if len(open_axes) > 1:
        raise UserError(f"mesh: {asked}: only one axis can be -1")
    fixed = math.prod(v for v in sizes.values() if v != -1)
    for name in open_axes:
        sizes[name] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh: {asked} does not fit {len(devices)} devices; "
            f"the product must be their number (-1 fills one axis)"
        )
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    kinds = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds, devices=devices)
    # Slices are connected by the slower data-centre network, so only `data` spans them.
    if sizes["data"] % slices:
        raise UserError(f"mesh: data={sizes['data']} does not divide over {slices} slices")
    inner = {**sizes, "data": sizes["data"] // slices}
    outer = {**dict.fromkeys(AXES, 1), "data": slices}
    placed = mesh_utils.create_hybrid_device_mesh(
        tuple(inner.values()), tuple(outer.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(placed, AXES, axis_types=kinds)


def describe(mesh: Mesh) -> str:
    """The devices of a mesh in words: "8 TPU v5 lite (tpu) devices of 2 processes, JAX 0.10.2"."""
    first, count, processes = mesh.devices.flat[0], mesh.size, jax.process_count()
    kind = first.device_kind
    if kind != first.platform:
        kind = f"{kind} ({first.platform})"
    many = f" of {processes} processes" if processes > 1 else ""
    return f"{count} {kind} device{'s' * (count > 1)}{many}, JAX {jax.__version__}"


def specs(
    rules: Rules, shapes: Any, mesh: Mesh, note: Callable[[str], None] = logging.warning
) -> Any:
    """The tree of PartitionSpecs for a tree of shapes, by the rules.

    A dimension that its axes do not divide stays whole and is reported to `note` in one line.
    Raises UserError on an axis that the mesh lacks, on an axis used twice, on a spec longer than
    the rank, and, as tree.match does, on uncovered parameters and idle rules.
    """
    makers = [(regex, functools.partial(_spec, spec)) for regex, spec in rules]
    chosen = tree.match(makers, shapes, "sharding")
    return tree.map_named(lambda name, x, make: make(name, x.shape, mesh, note), shapes, chosen)


def _spec(
    spec: Spec, name: str, shape: tuple[int, ...], mesh: Mesh, note: Callable[[str], None]
) -> P:
    if isinstance(spec, str):
        if spec != "fsdp":
            raise UserError(
                f"sharding: '{spec}' for {name} is not a spec; write 'fsdp', (), or a tuple of axes"
            )
        fits = [i for i, n in enumerate(shape) if n % mesh.shape["fsdp"] == 0]
        if not fits:
            if shape:
                note(
                    f"sharding: {name} {shape} stays whole, fsdp={mesh.shape['fsdp']} divides none"
                )
            return P()
        largest = max(fits, key=lambda i: shape[i])
        return P(*[None] * largest, "fsdp")
    if len(spec) > len(shape):
        raise UserError(f"sharding: {tuple(spec)} is longer than the rank of {name} {shape}")
    groups = [(s,) if isinstance(s, str) else tuple(s or ()) for s in spec]
    axes = [a for group in groups for a in group]
    if unknown := [a for a in axes if a not in mesh.shape]:
        raise UserError(
            f"sharding: '{unknown[0]}' for {name} is not an axis of the mesh; "
            f"axes: {', '.join(mesh.shape)}"
        )
    if len(set(axes)) < len(axes):
        raise UserError(f"sharding: {tuple(spec)} for {name} uses an axis twice")
    parts: list[Any] = []
    for i, group in enumerate(groups):
        ways = math.prod(mesh.shape[a] for a in group)
        if shape[i] % ways:
            note(
                f"sharding: dimension {i} of {name} {shape} stays whole, "
                f"{'*'.join(group)}={ways} does not divide it"
            )
            group = ()
        parts.append(group[0] if len(group) == 1 else group or None)
    return P(*parts)


def state_shardings(
    state: State, mesh: Mesh, rules: Rules, note: Callable[[str], None] = logging.warning
) -> State:
    """The NamedSharding of every leaf of a state (of arrays or shapes).

    Parameters are split by `rules`. Rules that begin with "extra/" apply to `extra`, such as
    ("extra/queue/feature", (("data", "fsdp"),)). Leaves of `extra` without such a rule, and leaves
    of the optimizer, are split like the parameter of the same shape whose name is a suffix of the
    leaf's; all others are replicated.
    """
    of_extra = [rule for rule in rules if rule[0].startswith(EXTRA)]
    own = [(r.removeprefix(EXTRA), functools.partial(_spec, s)) for r, s in of_extra]
    params = specs([rule for rule in rules if rule not in of_extra], state.params, mesh, note)
    by_name, shape_of = tree.flatten(params), tree.flatten(state.params)

    def follow(name: str, shape: tuple[int, ...], *_: Any) -> P:
        parts = name.split("/")
        for i in range(len(parts)):
            suffix = "/".join(parts[i:])
            if suffix in by_name and shape_of[suffix].shape == shape:
                return by_name[suffix]
        return P()

    makers = tree.match([*own, (".*", follow)], state.extra, "sharding of extra", idle_ok=True)
    used = jax.tree.leaves(makers)
    if idle := [regex for regex, make in own if make not in used]:
        raise UserError(f"sharding: the rule '{EXTRA}{idle[0]}' matches nothing in extra")
    chosen = state._replace(
        step=P(),
        params=params,
        opt=tree.map_named(lambda name, x: follow(name, x.shape), state.opt),
        extra=tree.map_named(
            lambda name, x, make: make(name, x.shape, mesh, note), state.extra, makers
        ),
    )
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), chosen)


def with_shardings(shapes: T, shardings: Any) -> T:
    """The tree of ShapeDtypeStructs with these shardings, as for checkpoint.restore_latest."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`; every other axis whole."""
    return NamedSharding(mesh, P(ROWS))


def spec_on(
    spec: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """The spec of batches with the shardings that `put` gives them."""
    sharding = batch_sharding(mesh)
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for k, x in spec.items()}


def check_rows(rows: Mapping[str, int], mesh: Mesh) -> None:
    """Raises UserError unless data x fsdp divides the rows of every batch. rows: the number of rows
    by the name of the config value that sets it."""
    ways = math.prod(mesh.shape[a] for a in ROWS)
    for where, count in rows.items():
        if count % ways:
            raise UserError(f"{where}={count} does not divide over {ways} devices (data x fsdp)")


def put(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows (numpy) -> global arrays on the mesh.

    On CPU an array may share memory with its numpy source, which must not be modified afterwards.
    """
    sharding = batch_sharding(mesh)
    check_rows({"batch": jax.process_count() * next(iter(batch.values())).shape[0]}, mesh)
    return {
        k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()
    }


class Prefetch(Generic[T]):
    """Iterates over `put(item)` for the items of an iterator, computed ahead in a thread: for
    batches on a mesh, `Prefetch(batches, partial(put, mesh=mesh))`.

    At most `depth` results are queued. An exception in the iterator or in `put` is raised in the
    consumer at its place in the order. `waited` is the total time in seconds that the consumer has
    waited: the cost of data. `close` (or leaving a `with`) stops the thread and closes the
    iterator.
    """

    def __init__(self, iterator: Iterator[Any], put: Callable[[Any], T], depth: int = 2):
        self.waited = 0.0
        self._stop = threading.Event()
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._thread = threading.Thread(
            target=self._work, args=(iterator, put), name="prefetch", daemon=True
        )
        self._thread.start()

    def _work(self, iterator: Iterator[Any], put: Callable[[Any], T]) -> None:
        try:
            for item in iterator:
                if not self._offer((put(item), None)):
                    break
            else:
                self._offer((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer
            self._offer((None, error))
        finally:
            # Here, not in `close`: a generator can only be closed by the thread that runs it.
            if hasattr(iterator, "close"):
                iterator.close()  # pyright: ignore[reportAttributeAccessIssue]

    def _offer(self, item: tuple[T | None, BaseException | None]) -> bool:
        """Queues an item; returns False once `close` has been called."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return True
        return False

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        start = time.perf_counter()
        item, error = self._queue.get()
        self.waited += time.perf_counter() - start
        if error is not None:
            self._stop.set()
            raise error
        return item  # pyright: ignore[reportReturnType]

    def close(self, timeout: float = 5.0) -> None:
        """Stops; waits up to `timeout` seconds for the item in progress."""
        self._stop.set()
        self._thread.join(timeout)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[None]:
    """Sets the mesh and the rules ACTIVATIONS for nn.with_logical_constraint while tracing.

    Outside this context the constraints have no effect. `with mesh:` would silently drop them.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(ACTIVATIONS):
        yield


def table(shapes: Any, **columns: Any) -> str:
    """One line per leaf: name, shape, dtype, and one column for each further tree of the same
    structure, as in `table(shapes, sharding=specs(...))`."""
    names = list(tree.flatten(shapes))
    leaves = jax.tree.leaves(shapes)
    cells: Mapping[str, list[str]] = {
        "name": names,
        "shape": ["x".join(map(str, x.shape)) or "scalar" for x in leaves],
        "dtype": [str(x.dtype) for x in leaves],
        **{k: [_text(v) for v in tree.flatten(column).values()] for k, column in columns.items()},
    }
    widths = {k: max(map(len, [k, *column])) for k, column in cells.items()}
    rows = [list(cells), *zip(*cells.values(), strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths.values(), strict=True)).rstrip()
        for row in rows
    )


def _text(cell: Any) -> str:
    spec = cell.spec if isinstance(cell, NamedSharding) else cell
    if not isinstance(spec, P):
        return str(cell)
    parts = [s if isinstance(s, str) else "*".join(s or ()) or "-" for s in spec]
    return ", ".join(parts) or "replicated"
