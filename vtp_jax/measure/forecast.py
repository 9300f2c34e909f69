"""Predicts the memory, traffic and time of a step on a pod. The step is compiled for the pod from
shapes alone: no data is read and no parameter is created."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from vtp_jax.data import outline
from vtp_jax.measure import flops, hlo
from vtp_jax.measure.pods import Pod
from vtp_jax.run import sharding
from vtp_jax.run.step import jit_step
from vtp_jax.setup import build
from vtp_jax.setup.config import Config
from vtp_jax.types import Spec, State, UserError

REMAT = (None, "dots_with_no_batch_dims_saveable", "nothing_saveable")  # from fast to small
# An option of the compiler: it searches less and takes a third of the time. The programs need up to
# 10 % more memory and have the same traffic, but their products are estimated at ten times the time
# (8 x 785 tokens from 768 to 3072 on v5e: 1.87 ms instead of 0.22; 0.15 at the chip's rate), so no
# time of a step is estimated from them.
QUICK: Any = {"exec_time_optimization_effort": -1.0}


class Plan(NamedTuple):
    """The requirements of a step. Bytes are per device; FLOPs are of all devices.

    memory:  bytes by use; incomplete if the program does not fit
    need:    total bytes; have: bytes of the device, None if unknown
    flops:   of the method's products, forward and backward; again: what remat recomputes
    traffic: bytes by kind of collective; None if the program does not fit
    seconds: estimated time of a step, one part after the other; None if unknown, or with the quick
             compiler
    best:    lower bound of a step's time: the longer of its products at the chip's rate and its
             traffic at the links' rate; None if unknown
    """

    shape: Mapping[str, int]
    batch: int
    steps: int
    memory: Mapping[str, int]
    need: int
    have: int | None
    flops: int
    again: int
    traffic: Mapping[str, int] | None
    seconds: float | None
    best: float | None

    @property
    def fits(self) -> bool:
        return self.traffic is not None and (self.have is None or self.need <= self.have)

    @property
    def clips(self) -> float:
        """Rows per second, from the estimate or else from the bound; 0 if the step does not fit or
        its time is unknown."""
        took = self.seconds or self.best
        return self.batch / took if self.fits and took else 0.0


class Lowered(NamedTuple):
    """The step of a config for a pod, not yet compiled."""

    program: jax.stages.Lowered
    mesh: jax.sharding.Mesh
    state: State  # of shapes with shardings
    batch: Spec


class Tried(NamedTuple):
    """A candidate of a sweep and its plan, or the error if the config does not allow it."""

    mesh: Mapping[str, int]
    batch: int
    remat: str
    plan: Plan | None
    error: str = ""


class Remedy(NamedTuple):
    """A change under which a step that does not fit would. flags: of the config, or a sentence;
    need: bytes per device; compiled: whether the compiler says so, or arithmetic"""

    flags: str
    need: int
    compiled: bool


Stage = Callable[[str], contextlib.AbstractContextManager[Any]]


def unsaid(text: str) -> contextlib.AbstractContextManager[None]:
    """A stage of planning that is not reported."""
    return contextlib.nullcontext()


def make_plan(cfg: Config, pod: Pod, quick: bool = False, stage: Stage = unsaid) -> Plan:
    """Compiles the step of a config for a pod and returns its plan. Raises UserError where the
    config is inconsistent. stage: entered with a name while each stage runs"""
    with stage("trace the step"):
        step = lower(cfg, pod)
    return compile_plan(step, cfg, pod, quick, stage)


def lower(cfg: Config, pod: Pod) -> Lowered:
    """The step that `train` would jit."""
    mesh = build.training_mesh(cfg, pod.devices)
    spec, parts = prepare(cfg, mesh)
    rows = sharding.batch_sharding(mesh)
    batch = sharding.with_shardings(spec, dict.fromkeys(spec, rows))
    state = sharding.with_shardings(parts.shapes, parts.placed)
    with sharding.activate(mesh):
        program = jit_step(parts.step, parts.placed, mesh).lower(state, batch)
    return Lowered(program, mesh, state, batch)


def prepare(cfg: Config, mesh: jax.sharding.Mesh) -> tuple[Spec, build.Parts]:
    """The shapes of a config's batch, and its parts."""
    found = outline.describe(cfg.data, cfg.batch)
    return found.spec, build.prepare(cfg, found, mesh, note=lambda text: None)


def work(cfg: Config) -> tuple[int, int]:
    """FLOPs of a step's products: those of the method, and those that remat recomputes."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def count(cfg: Config) -> int:
        spec, parts = prepare(cfg, mesh)
        return flops.macs(parts.step, parts.shapes, spec)

    done = once = count(cfg)
    if cfg.method.get("remat"):
        once = count(cfg._replace(method={**cfg.method, "remat": None}))
    return 2 * once, 2 * (done - once)


def compile_plan(
    step: Lowered, cfg: Config, pod: Pod, quick: bool = False, stage: Stage = unsaid
) -> Plan:
    chip = pod.chip
    with stage("count its products"):
        once, again = work(cfg)
    own = {name: getattr(step.state, name) for name in ("params", "opt", "extra")}
    memory = {name: _bytes_each(leaves) for name, leaves in {**own, "batch": step.batch}.items()}
    base: dict[str, Any] = dict(
        shape=dict(step.mesh.shape), batch=cfg.batch, steps=cfg.steps, memory=memory,
        flops=once, again=again, traffic=None, seconds=None, best=None,
        have=pod.memory,
    )  # fmt: skip
    try:
        with stage(f"compile it for {pod.name}"):
            done = step.program.compile(QUICK if quick and chip else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Plan(**base, need=_overflow(str(error), sum(memory.values())))
    text, used = done.as_text() or "", done.memory_analysis()
    assert used is not None
    held = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    memory |= dict(activations=used.temp_size_in_bytes, program=used.generated_code_size_in_bytes)
    moved = hlo.traffic(text)
    base |= dict(traffic=moved)
    if chip:
        products = (once + again) / step.mesh.size / (chip.rate * 1e12)
        links = sum(moved.values()) / (chip.link * 1e9)
        base |= dict(best=max(products, links))
        if not quick:
            code = hlo.seconds(text, chip.clock * 1e9, chip.bandwidth * 1e9)
            base |= dict(seconds=max(products, links, code))
    return Plan(**base, need=held + memory["activations"] + memory["program"])


def _bytes_each(shapes: Any) -> int:
    """Bytes of a tree of shapes on one device."""
    sizes = (
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )
    return sum(sizes)


def _overflow(error: str, held: int) -> int:
    """Bytes that a program would have needed, from the compiler's out-of-memory error, which has
    either the total or only the temporaries, to which `held` bytes are added."""
    found = re.search(r"(Used |temporaries \()([\d.]+)([KMGT])", error)
    if not found:
        return held
    size = int(float(found[2]) * 1024 ** (1 + "KMGT".index(found[3])))
    return size if found[1] == "Used " else size + held


def remedies(cfg: Config, plan: Plan, pod: Pod, stage: Stage = unsaid) -> Iterator[Remedy]:
    """What would make a step fit that does not: stronger remat, then parameters and optimizer state
    over all devices, each compiled with the quick compiler until one fits; and, by arithmetic, a
    smaller batch and more chips."""
    size, now = math.prod(plan.shape.values()), cfg.method.get("remat")
    stronger = REMAT[1 + REMAT.index(now) :] if now in REMAT else REMAT[-1:]
    whole = {**plan.shape, "data": 1, "fsdp": plan.shape["data"] * plan.shape["fsdp"]}
    tries = [({"remat": policy}, plan.shape) for policy in stronger]
    if whole != plan.shape:
        last = {"remat": stronger[-1]} if stronger else {}
        tries += [({}, whole)] if not last else [(last, whole)]
    least = plan
    for method, mesh in tries:
        flags = " ".join(
            [f"--config.method.{k}={v}" for k, v in method.items()]
            + [f"--config.mesh.{k}={n}" for k, n in mesh.items() if n != plan.shape[k]]
        )
        one = cfg._replace(method={**cfg.method, **method}, mesh=dict(mesh))
        with stage(f"try {flags}"):
            try:
                found = make_plan(one, pod, quick=True)
            except UserError:  # a method without remat
                continue
        least = min(least, found, key=lambda p: p.need)
        if found.fits:
            yield Remedy(flags, found.need, compiled=True)
            break
    yield from by_arithmetic(least, size)


def by_arithmetic(plan: Plan, size: int) -> Iterator[Remedy]:
    """The largest batch and the least number of devices, by halves and doubles, with which a step
    would fit: activations follow the rows of a device, and what fsdp splits its number of devices.

    plan: of the step that does not fit, or of the one with the least memory; size: its devices
    """
    if plan.have is None:
        return
    held = sum(plan.memory.get(name, 0) for name in ("params", "opt", "extra", "program"))
    rows = plan.need - held
    for by in (2**k for k in range(1, 12)):
        if plan.batch % (by * plan.shape["data"] * plan.shape["fsdp"]):
            break
        if (need := held + rows // by) <= plan.have:
            yield Remedy(f"--config.batch={plan.batch // by}", need, compiled=False)
            break
    for by in (2**k for k in range(1, 12)):
        if plan.batch % (by * plan.shape["data"] * plan.shape["fsdp"]):
            break
        if (need := (held + rows) // by) <= plan.have:
            flags = f"{size * by} devices with --config.mesh.fsdp={plan.shape['fsdp'] * by}"
            yield Remedy(flags, need, compiled=False)
            break


def candidates(cfg: Config, chips: int) -> Iterator[tuple[dict, list[Config]]]:
    """(mesh and batch, configs from fast to small), one config for each remat policy: once one
    fits, the later ones would only compute more."""
    tensor = [n for n in (1, 2, 4) if chips % n == 0]
    for t, scale in itertools.product(tensor, (1, 2, 0.5)):
        for f in sorted({1, min(8, chips // t), chips // t}):
            batch = int(cfg.batch * scale)
            if (chips // t) % f or batch % (chips // t):
                continue
            mesh = dict(data=chips // t // f, fsdp=f, sequence=1, tensor=t)
            tried = dict(mesh=mesh, batch=batch)
            methods = [{**cfg.method, "remat": policy} for policy in REMAT]
            yield tried, [cfg._replace(**tried, method=method) for method in methods]


def sweep(cfg: Config, pod: Pod, quick: bool) -> Iterator[Tried]:
    """Plans of all candidates, each yielded once it is compiled."""
    for tried, configs in candidates(cfg, len(pod.devices)):
        for one in configs:
            policy = one.method["remat"] or "none"
            try:
                plan = make_plan(one, pod, quick)
            except UserError as error:
                yield Tried(**tried, remat=policy, plan=None, error=str(error))
                break
            yield Tried(**tried, remat=policy, plan=plan)
            if plan.fits:
                break
