"""From a config to its parts: what train, evaluate, visualize, plan and bench have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from vtp_jax import evals, schedules, tree
from vtp_jax.data import kept, pipeline
from vtp_jax.data.outline import Outline
from vtp_jax.run import average, checkpoint, optim, paths, sharding
from vtp_jax.run.step import Step, make_step
from vtp_jax.setup import cli, config, warm_start
from vtp_jax.setup.config import Config, Section
from vtp_jax.types import (
    KEYS,
    Batch,
    Data,
    Evaluator,
    Extra,
    Mean,
    Method,
    Params,
    Spec,
    State,
    Stream,
    UserError,
    at_least,
    check_batch,
)

T = TypeVar("T")
NOTHING: Mapping[str, Any] = {}
HELD_OUT = 2**30  # added to an evaluation's ids, which begin at 0 as training's do


class Parts(NamedTuple):
    """What a config makes of the outline of its data, on a mesh; nothing is compiled or allocated.

    start:  leaves of a warm start, by name, or none -> the state of step 0
    shapes: of the state; placed: the NamedSharding of each of its leaves
    step:   (state, batch) -> (state, numbers), not yet jitted
    """

    method: Method
    start: Callable[..., State]
    optimizer: optim.Optim
    shapes: State
    placed: State
    step: Step


class Run(NamedTuple):
    """A run, finished or not, at one of its checkpoints. The state has no optimizer state."""

    config: Config
    data: Data
    method: Method
    mesh: Mesh
    state: State


@cli.blame("config")
def prepare(
    cfg: Config, outline: Outline | Data, mesh: Mesh, note: Callable[[str], None] = logging.warning
) -> Parts:
    """The parts of a config: data facts -> method -> start -> shapes -> shardings -> step.

    note: takes a line for each parameter that the mesh cannot split as its rule asks. Raises
    UserError on whatever of the config does not fit together.
    """
    made = method(cfg, outline.facts)
    begin, optimizer = start(made, cfg.optim, outline.spec, cfg.seed)
    shapes = jax.eval_shape(begin)
    placed = sharding.state_shardings(shapes, mesh, cfg.sharding, note)
    return Parts(made, begin, optimizer, shapes, placed, make_step(made, optimizer, cfg.seed))


def mesh(cfg: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config.mesh`, over all devices or over `devices`."""
    given = {} if devices is None else dict(devices=devices)
    return cli.call(sharding.make_mesh, "config.mesh", **given, **cfg.mesh)


def mesh_here(cfg: Config) -> Mesh:
    """The mesh of `config.mesh`; if it does not fit the devices of this machine, rows are divided
    over all of them: a run is not always used where it was trained."""
    try:
        return mesh(cfg)
    except UserError as error:
        if not set(cfg.mesh) <= set(sharding.AXES):
            raise
        made = sharding.make_mesh()
        logging.warning("%s: rows are divided over all %d devices instead", error, made.size)
        return made


@cli.blame("config")
def training_mesh(cfg: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config.mesh`; raises UserError unless it divides the rows of every batch."""
    made = mesh(cfg, devices)
    sharding.check_rows(batch_sizes(cfg), made)
    return made


def batch_sizes(cfg: Config) -> dict[str, int]:
    """Rows of every global batch of a config, by the name of the value that sets it."""
    sizes, given = {"config.batch": cfg.batch}, cfg.data
    if given.get("evals") and given.get("eval_batch"):
        sizes["config.data.eval_batch"] = given["eval_batch"]
    for name, more in (given.get("also") or {}).items():
        if more.get("batch"):
            sizes[f"config.data.also.{name}.batch"] = more["batch"]
    return sizes


def data(cfg: Section, *, batch: int, seed: int) -> Data:
    """The pipeline of `config.data`."""
    process = (jax.process_index(), jax.process_count())
    made = cli.call(pipeline.make, "config.data", batch=batch, seed=seed, process=process, **cfg)
    check_batch(made.spec, "config.data")
    return made


def method(cfg: Config, facts: Mapping[str, Any]) -> Method:
    """The method of `config.method`, wrapped in the task of `config.task` if there is one, with
    `encode["loss"]` added for validation, and with averaged weights if `config.average` is set."""
    made = part("methods", cfg.method, "config.method", facts)
    if cfg.task:
        made = part("tasks", cfg.task, "config.task", facts, base=made)

    def losses(params: Params, extra: Extra, batch: Batch, rng: Any) -> Mapping[str, Mean]:
        if "id" in batch:  # not an id that a queue has kept from training
            batch = {**batch, "id": batch["id"] + HELD_OUT}
        total, out = made.loss(params, extra, batch, rng, jnp.zeros((), jnp.int32))
        rows = batch["valid"].sum(dtype=total.dtype)  # a batch that is partly padding weighs less
        return {"loss": Mean(total * rows, rows), **out.metrics}

    made = made._replace(encode={**made.encode, "loss": losses})
    return made if cfg.average is None else average.average(made, cfg.average)


def part(kind: str, cfg: Section, where: str, facts: Mapping[str, Any], **more: Any) -> Any:
    """Calls `make` of vtp_jax/<kind>/<cfg["name"]>.py with the rest of `cfg`, with `more`, and with
    the facts of the data that its signature names."""
    if "name" not in cfg:
        raise UserError(f"{where}: the key 'name' is missing")
    make = cli.find(kind, cfg["name"])
    takes = inspect.signature(make).parameters
    known = {name: value for name, value in facts.items() if name in takes}
    given = {name: value for name, value in cfg.items() if name != "name"}
    return cli.call(make, where, **{**known, **more, **given})


@cli.blame("config")
def evaluators(
    cfg: Mapping[str, Section],
    made: Method,
    streams: Mapping[str, Stream],
    mesh: Mesh,
    shapes: State | None = None,
) -> dict[str, tuple[int, Evaluator]]:
    """The evaluators of `config.evals`: name -> (steps between two evaluations, evaluator).

    An evaluator with `weights="ema"` gets the functions `encode["ema/..."]` alone, under their
    plain names. With the shapes of the state, a key or an output that an evaluator lacks is
    reported here; without them, when it runs.
    """
    check = evals.checker(shapes, streams, mesh) if shapes else evals.unchecked
    found = {}
    for name, one in cfg.items():
        where, one = f"config.evals.{name}", dict(one)
        kind, every = one.pop("type", None), one.pop("every", 0)
        at_least(where, 0, every=every)
        at_least(where, 1, block=one.get("block"), k=one.get("k"))
        if kind is None:
            raise UserError(f"{where}: the key 'type' is missing")
        encode = made.encode
        if weights := one.pop("weights", None):
            encode = tree.under(encode, f"{weights}/")
            if not encode:
                raise UserError(f"{where}.weights='{weights}': the method has none of that name")
        context = dict(encode=encode, streams=streams, mesh=mesh, check=check)
        found[name] = (every, cli.call(cli.find("evals", kind), where, **context, **one))
    return found


def start(
    made: Method, cfg: Section, spec: Spec, seed: int
) -> tuple[Callable[..., State], optim.Optim]:
    """A function that makes the state of step 0, and the optimizer of `config.optim`.

    The function takes the leaves of a warm start, by name ("params/...", "extra/..."), or none.
    """
    first, begin = jax.random.split(jax.random.key(seed))
    init = jax.jit(lambda key: made.init(key, spec))  # traced here, and not again by `fresh`
    try:
        shapes = jax.eval_shape(init, first)
    except KeyError as error:
        if error.args[0] not in KEYS or error.args[0] in spec:
            raise
        raise UserError(
            f"config.data gives no '{error.args[0]}', which the method reads; it gives "
            f"{', '.join(sorted(spec))}"
        ) from None
    cfg = {**cfg, "lr": schedules.make(cfg.get("lr", 0.0), "config.optim.lr")}
    optimizer = cli.call(optim.make, "config.optim", shapes, **cfg)

    def fresh(given: Mapping[str, Any] = NOTHING) -> State:
        params = tree.replace(init(first), tree.under(given, "params/"))
        trainable, _ = optimizer.split(params)
        # After the parameters are filled, so that a momentum twin copies what was loaded.
        extra = made.start(begin, spec, params)
        extra = tree.replace(extra, tree.under(given, "extra/"))
        return State(jnp.zeros((), jnp.int32), params, optimizer.init(trainable), extra)

    return fresh, optimizer


@cli.blame("config")
def warm(
    sources: Sequence[Sequence[str]], fresh: Sequence[str], shapes: State, workdir: paths.PathLike
) -> tuple[Mapping[str, Any], list[checkpoint.Source]]:
    """The leaves that `config.warm_start` loads, and where those of teachers came from. Prints a
    summary, and writes what was done to each leaf to WORKDIR/warm_start.txt."""
    leaves, rows = warm_start.load(sources, fresh, shapes)
    if rows and jax.process_index() == 0:
        file = paths.path(workdir) / "warm_start.txt"
        file.write_text(warm_start.report(rows) + "\n", encoding="utf-8")
        print(f"{warm_start.summary(rows)}; each in {file}", flush=True)
    return leaves, warm_start.teachers(rows)


def with_teachers(state: T, sources: Sequence[checkpoint.Source]) -> T:
    """A state, or some of its fields, as a checkpoint is restored, with the teachers that it does
    not hold: they replace their ShapeDtypeStructs."""
    wanted = tree.flatten(state)
    leaves = warm_start.load_teachers(sources, wanted)

    def placed(name: str) -> Any:
        x, sharding = leaves[name], wanted[name].sharding
        return (
            x
            if sharding is None
            else jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
        )

    found = [placed(name) if name in leaves else x for name, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(state), found)


def reopen(
    cfg: Config, workdir: paths.PathLike, overrides: Sequence[str] = ()
) -> tuple[Config, Data]:
    """The data of a run by what its folder has kept, and its config with the tokenizer that is
    there. Runs of older versions have kept nothing, so that their training set is read."""
    known = kept.read(paths.path(workdir))
    if known is None:
        return cfg, data(cfg.data, batch=cfg.batch, seed=cfg.seed)
    if not any(one.startswith("--config.data.text.path=") for one in overrides):
        cfg = cfg._replace(data=kept.with_own_words(cfg.data, known))
    process = (jax.process_index(), jax.process_count())
    return cfg, pipeline.reopen(cfg.data, known, batch=cfg.batch, process=process)


def restore(
    workdir: paths.PathLike, which: int | str = "latest", overrides: Sequence[str] = ()
) -> Run:
    """The run in `workdir` at a checkpoint: its step, "latest" or "best".

    The training set is not read, nor is the optimizer's state: the tokenizer and the facts of the
    data are those that the run has kept in its folder. overrides: `--config.x=y`, on the run's own
    config.
    """
    path = paths.path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"no run in {workdir}: it has no config.json, which train writes")
    cfg = config.load(str(path), overrides)
    step = checkpoint.find_step(workdir, which)
    cfg, loaded = reopen(cfg, workdir, overrides)
    devices = mesh_here(cfg)
    parts = prepare(cfg, loaded, devices)
    wanted = {
        name: sharding.with_shardings(getattr(parts.shapes, name), getattr(parts.placed, name))
        for name in ("params", "extra")
    }
    found = checkpoint.restore_part(workdir, step, wanted)
    found = with_teachers(found, checkpoint.read_meta(workdir, step).teachers)
    state = State(jnp.asarray(step, jnp.int32), found["params"], {}, found["extra"])
    return Run(cfg, loaded, parts.method, devices, state)
