"""Estimates memory, traffic and time of a run on a TPU pod, without the pod.

    vtp plan --config simvtp/pretrain_webvid --topology v6e:16x16
    vtp plan --config simvtp/pretrain_webvid --topology v5e:4x4 --sweep
        [--slices 2] [--quick] [--config.batch=512] [--config.mesh.fsdp=16]

The step that train compiles is compiled for that pod, by the compiler that a pod has (the libtpu
wheel needs no TPU), from shapes alone: no data is read and no parameter is made. `--topology cpu:8`
and `local` plan for the devices at hand. See docs/sharding.md for what each line means.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from vtp_jax.data import outline
from vtp_jax.measure import flops, hlo
from vtp_jax.run import metrics, sharding
from vtp_jax.run.step import jit_step
from vtp_jax.setup import build, cli, config
from vtp_jax.setup.config import Config
from vtp_jax.types import Spec, State, UserError

GIB = 2**30


class Chip(NamedTuple):
    """A kind of TPU, from its maker's documentation.

    memory: GiB; rate: bf16 TFLOP/s; bandwidth: GB/s of its memory; link: GB/s to its neighbours,
    all links together; clock: GHz of the cycles that the compiler counts; cores: of the host, for
    each chip
    """

    memory: int
    rate: float
    bandwidth: float
    link: float
    clock: float
    cores: float


# clock: the rate over the products that the matrix units begin in a cycle. The estimates for a
# large matrix product are 1.14 (v5e), 1.42 (v6e) and 1.11 (v5p) times what the rate says.
CHIPS = dict(
    v5e=Chip(16, 197, 819, 200, 1.5, 28),
    v6e=Chip(32, 918, 1640, 448, 1.75, 22.5),
    v5p=Chip(95, 459, 2765, 600, 1.75, 52),
)
# Clips a second that a core decodes, of 16 frames with stride 4 shown at 224 px: docs/data.md.
DECODED = {"mp4 of 340x256": 15.0, "shards": 150.0}
REMAT = (None, "dots_with_no_batch_dims_saveable", "nothing_saveable")  # from fast to small
# The compiler's own names: it then searches less and takes a third of the time. Its programs need
# up to a tenth more memory and send the same; their products take ten times as long (8 x 785 tokens
# from 768 to 3072 on v5e: 1.87 ms, else 0.22; 0.15 at the chip's rate), so that nothing is said of
# the time of a step.
QUICK: Any = {"exec_time_optimization_effort": -1.0}


class Pod(NamedTuple):
    """Devices, here or not; chip: what is known of them, if anything."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None


class Plan(NamedTuple):
    """What a step needs. Bytes are of one device; FLOPs of all.

    memory:  by what holds it; empty of what is not known because the program does not fit
    need:    bytes in all; have: bytes there are, None where nobody knows
    flops:   of the method's products, forward and backward; again: what remat computes once more
    traffic: bytes by kind of collective; None where it does not fit
    seconds: of a step as estimated, one part after the other; None where nobody knows, or where the
             compiler was quick
    best:    of a step, the longer of its products at the chip's rate and its traffic at that of the
             links; None where nobody knows
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
        """Rows a second, as estimated or else at best; 0 where it does not fit or nobody knows."""
        took = self.seconds or self.best
        return self.batch / took if self.fits and took else 0.0


# The pod.


def find_pod(topology: str, slices: int = 1) -> Pod:
    """The devices of `v5e:4x4` (of a TPU that is not here), of `cpu:8`, or `local` ones."""
    if topology == "local":
        return Pod(topology, jax.devices(), None)
    kind, _, layout = topology.partition(":")
    if kind == "cpu" and layout.isdecimal():
        return Pod(topology, _cpus(int(layout)), None)
    if kind not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", layout):
        raise UserError(
            f"no topology '{topology}'; write CHIP:AxB as in v5e:4x4 with CHIP of "
            f"{', '.join(CHIPS)} (v5p has three numbers), cpu:N, or local"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"planning for {kind} needs the TPU compiler, which runs anywhere: "
            "pip install 'jax[tpu]' (Linux, x86-64)"
        )
    return Pod(topology, _tpus(topology, slices), CHIPS[kind])


def _cpus(count: int) -> Sequence[Any]:
    # Where devices have been asked for before, there are as many as there are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"topology cpu:{count}: this process has {len(devices)} CPU devices")
    return devices[:count]


def _tpus(topology: str, slices: int) -> Sequence[Any]:
    # The library asks its machine what it is, and complains where it is no TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is shared, only a compiler
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    more = {} if slices == 1 else dict(num_slices=slices)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"the TPU compiler knows no {topology} x {slices}: {told}") from None
    return found.devices


# The step.


class Lowered(NamedTuple):
    """The step of a config for a pod, not yet compiled."""

    program: jax.stages.Lowered
    mesh: jax.sharding.Mesh
    state: State  # of shapes with shardings
    batch: Spec


def lower(cfg: Config, pod: Pod) -> Lowered:
    """The step that train would jit. Raises UserError on what does not fit together."""
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
    """FLOPs of a step's products: those of the method, and what remat computes once more."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def count(cfg: Config) -> int:
        spec, parts = prepare(cfg, mesh)
        return flops.macs(parts.step, parts.shapes, spec)

    done = once = count(cfg)
    if cfg.method.get("remat"):
        once = count(cfg._replace(method={**cfg.method, "remat": None}))
    return 2 * once, 2 * (done - once)


def make_plan(cfg: Config, pod: Pod, quick: bool = False) -> Plan:
    """Compiles the step of a config for a pod and says what it needs."""
    return compile_plan(lower(cfg, pod), cfg, pod, quick)


def compile_plan(step: Lowered, cfg: Config, pod: Pod, quick: bool = False) -> Plan:
    chip, (once, again) = pod.chip, work(cfg)
    own = {name: getattr(step.state, name) for name in ("params", "opt", "extra")}
    memory = {name: _bytes_each(leaves) for name, leaves in {**own, "batch": step.batch}.items()}
    base: dict[str, Any] = dict(
        shape=dict(step.mesh.shape), batch=cfg.batch, steps=cfg.steps, memory=memory,
        flops=once, again=again, traffic=None, seconds=None, best=None,
        have=_memory(pod),
    )  # fmt: skip
    try:
        done = step.program.compile(QUICK if quick and chip else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Plan(**base, need=_overflow(str(error), sum(memory.values())))
    text, said = done.as_text() or "", done.memory_analysis()
    assert said is not None
    held = said.argument_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    memory |= dict(activations=said.temp_size_in_bytes, program=said.generated_code_size_in_bytes)
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


def _memory(pod: Pod) -> int | None:
    """Bytes of one device."""
    if pod.chip:
        return pod.chip.memory * GIB
    stats = pod.devices[0].memory_stats() if pod.devices[0].platform != "cpu" else None
    return (stats or {}).get("bytes_limit")


def _overflow(error: str, held: int) -> int:
    """Bytes that a program would have needed, of the compiler's complaint that it does not fit. It
    tells all, or the temporaries alone, beside which `held` bytes are held."""
    found = re.search(r"(Used |temporaries \()([\d.]+)([KMGT])", error)
    if not found:
        return held
    told = int(float(found[2]) * 1024 ** (1 + "KMGT".index(found[3])))
    return told if found[1] == "Used " else told + held


# What is told.


def rows(plan: Plan, pod: Pod, decoded: Mapping[str, float] = DECODED) -> Iterator[tuple[str, str]]:
    """(what, how much) of a plan, for people; decoded: clips a second and core, by source."""
    gib = {name: f"{size / GIB:.3f}" for name, size in plan.memory.items()}
    fits = "yes" if plan.fits else "NO"
    of = "" if plan.have is None else f" of {plan.have / GIB:.1f}"
    yield "fits", f"{fits}, {plan.need / GIB:.2f}{of} GiB a chip"
    yield "memory, GiB a chip", "  ".join(f"{name} {size}" for name, size in gib.items())
    again = f", and {plan.again / 1e12:.1f} again for remat" if plan.again else ""
    yield "work", f"{plan.flops / 1e12:.1f} TFLOP a step{again}"
    if plan.traffic is not None:
        moved = "  ".join(f"{k} {v / GIB:.3f}" for k, v in sorted(plan.traffic.items()))
        yield "traffic, GiB a chip and step", moved or "none"
    if not plan.clips or pod.chip is None or plan.best is None:
        return
    chips = math.prod(plan.shape.values())
    full = plan.flops / chips / (pod.chip.rate * 1e12)

    def told(took: float, most: str) -> str:
        rate, used = plan.batch / took, 100 * full / took
        return f"{took:.4f} s, {rate:.0f} clips/s, MFU {most}{used:.1f} %"

    if plan.seconds is not None:
        yield "step, estimated", told(plan.seconds, "")
    yield "step, at best", told(plan.best, "at most ")
    cores = [f"{plan.clips / n:.0f} cores from {name} at {n:g}" for name, n in decoded.items()]
    yield (
        "decoding",
        f"{', '.join(cores)} clips/s each; the hosts have {chips * pod.chip.cores:.0f}",
    )
    known = [f"{plan.steps * s * chips / 3600:.0f}" for s in (plan.best, plan.seconds) if s]
    least = "" if plan.seconds else "at least "
    yield "the run", f"{plan.steps} steps, {least}{' to '.join(known)} chip-hours"


def title(name: str, plan: Plan, pod: Pod, slices: int = 1) -> str:
    shape = " ".join(f"{k}={v}" for k, v in plan.shape.items())
    several = f" x {slices}" if slices > 1 else ""
    return f"{name} on {pod.name}{several}: {len(pod.devices)} chips, {shape}, batch {plan.batch}"


# Trying what there is.


def candidates(cfg: Config, chips: int) -> Iterator[tuple[dict, list[Config]]]:
    """(what is tried, configs from fast to small): meshes and batches, each with every policy of
    remat. Where one fits, those that follow it only compute more."""
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


def sweep(cfg: Config, pod: Pod, quick: bool) -> list[tuple[str, Plan]]:
    """Plans of all candidates, the most clips a second first; says what it does, line by line."""
    found = []
    for tried, configs in candidates(cfg, len(pod.devices)):
        for one in configs:
            policy = one.method["remat"] or "none"
            try:
                plan = make_plan(one, pod, quick)
            except UserError as error:
                print(f"{tried}: {error}", flush=True)
                break
            fits = "fits" if plan.fits else "does not fit"
            print(
                f"{tried['mesh']}, batch {tried['batch']}, remat {policy}: {fits}, "
                f"{plan.need / GIB:.1f} GiB, {plan.clips:.0f} clips/s",
                flush=True,
            )
            found.append((policy, plan))
            if plan.fits:
                break
    return sorted(found, key=lambda item: (not item[1].fits, -item[1].clips, item[1].need))


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("plan", __doc__)
    parser.add_argument("--config", required=True, help=cli.CONFIG)
    parser.add_argument("--topology", required=True, help="v5e:4x4, v6e:16x16, cpu:8, local, ...")
    parser.add_argument("--slices", type=int, default=1, help="slices of that topology, as one run")
    parser.add_argument("--sweep", action="store_true", help="try meshes, batches, remat policies")
    parser.add_argument(
        "--quick", action="store_true", help="a third of the time; nothing of the step's"
    )
    parser.add_argument("--clips-per-core", type=float, help="decoded, of what you train on")
    args, overrides = cli.parse(parser, argv)
    cfg = config.load(args.config, overrides)
    if args.topology != "local":
        jax.config.update("jax_platforms", "cpu")  # nobody's accelerator is claimed for planning
    pod = find_pod(args.topology, args.slices)
    if args.sweep:
        tried = sweep(cfg, pod, args.quick)
        if not tried:
            raise UserError(f"no mesh of {len(pod.devices)} chips divides batch {cfg.batch}")
        shown = [
            (
                *(str(n) for n in plan.shape.values()),
                str(plan.batch),
                policy,
                "yes" if plan.fits else "no",
                f"{plan.need / GIB:.1f}",
                f"{plan.clips:.0f}",
            )
            for policy, plan in tried
        ]
        rate = "clips/s at best" if args.quick else "clips/s"
        columns = (*sharding.AXES, "batch", "remat", "fits", "GiB", rate)
        metrics.print_table(f"{args.config} on {pod.name}, best first", columns, shown)
        return
    plan = make_plan(cfg, pod, args.quick)
    own = args.clips_per_core
    told = list(rows(plan, pod, {"your clips": own} if own else DECODED))
    metrics.print_table(title(args.config, plan, pod, args.slices), ("what", ""), told)
    if not plan.fits:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
