"""Estimates memory, traffic and time of a run on a TPU pod, without the pod.

    vtp plan --config simvtp/pretrain_webvid --topology v6e:16x16
    vtp plan --config simvtp/pretrain_webvid --topology v5e:4x4 --sweep
        [--slices 2] [--quick] [--config.batch=512] [--config.mesh.fsdp=16]

The step that train compiles is compiled for that pod, by the compiler that a pod has (the libtpu
wheel needs no TPU), from shapes alone: no data is read and no parameter is made. `--topology cpu:8`
and `local` plan for the devices at hand. A plan that does not fit ends with what would.
docs/sharding.md explains each line.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
from rich.console import Console

from vtp_jax.measure import forecast
from vtp_jax.measure.forecast import Plan, Remedy, Tried
from vtp_jax.measure.pods import GIB, Pod, find_pod
from vtp_jax.run import metrics, sharding
from vtp_jax.setup import cli, config
from vtp_jax.types import UserError

# Clips a second that a core decodes, of 16 frames with stride 4 shown at 224 px: docs/data.md.
DECODED = {"mp4 of 340x256": 15.0, "shards": 150.0}


def rows(plan: Plan, pod: Pod, decoded: Mapping[str, float] = DECODED) -> Iterator[tuple[str, str]]:
    """(name, value) of each line of a plan. decoded: clips per second and core, by source."""
    gib = {name: f"{size / GIB:.3f}" for name, size in plan.memory.items()}
    fits = "yes" if plan.fits else "NO"
    of = "" if plan.have is None else f" of {plan.have / GIB:.1f}"
    unit = pod.chip.unit if pod.chip else "chip"
    yield "fits", f"{fits}, {plan.need / GIB:.2f}{of} GiB a {unit}"
    yield f"memory, GiB a {unit}", "  ".join(f"{name} {size}" for name, size in gib.items())
    again = f", and {plan.again / 1e12:.1f} again for remat" if plan.again else ""
    yield "work", f"{plan.flops / 1e12:.1f} TFLOP a step{again}"
    if plan.traffic is not None:
        moved = "  ".join(f"{k} {v / GIB:.3f}" for k, v in sorted(plan.traffic.items()))
        yield f"traffic, GiB a {unit} and step", moved or "none"
    if not plan.clips or pod.chip is None or plan.best is None:
        return
    devices = math.prod(plan.shape.values())
    full = plan.flops / devices / (pod.chip.rate * 1e12)

    def timed(took: float, most: str) -> str:
        rate, used = plan.batch / took, 100 * full / took
        return f"{took:.4f} s, {rate:.0f} clips/s, MFU {most}{used:.1f} %"

    if plan.seconds is not None:
        yield "step, estimated", timed(plan.seconds, "")
    yield "step, at best", timed(plan.best, "at most ")
    cores = [f"{plan.clips / n:.0f} cores from {name} at {n:g}" for name, n in decoded.items()]
    yield (
        "decoding",
        f"{', '.join(cores)} clips/s each; the hosts have {devices * pod.chip.cores:.0f}",
    )
    chips = devices / pod.chip.devices
    known = [f"{plan.steps * s * chips / 3600:.0f}" for s in (plan.best, plan.seconds) if s]
    least = "" if plan.seconds else "at least "
    yield "the run", f"{plan.steps} steps, {least}{' to '.join(known)} chip-hours"


def title(name: str, plan: Plan, pod: Pod, slices: int = 1) -> str:
    shape = " ".join(f"{k}={v}" for k, v in plan.shape.items())
    several = f" x {slices}" if slices > 1 else ""
    count = f"{len(pod.devices)} chips"
    if pod.chip and pod.chip.devices > 1:
        count = f"{len(pod.devices) // pod.chip.devices} chips, {len(pod.devices)} devices"
    return f"{name} on {pod.name}{several}: {count}, {shape}, batch {plan.batch}"


@contextlib.contextmanager
def stage(text: str) -> Iterator[None]:
    """Says on stderr what is being done and how long it took; a terminal shows that it goes on."""
    start, console = time.monotonic(), Console(stderr=True)
    if console.is_terminal:
        with console.status(f"{text} ...", spinner_style="none"):
            yield
    else:
        sys.stderr.write(f"{text} ...\n")
        sys.stderr.flush()
        yield
    sys.stderr.write(f"{text}: {time.monotonic() - start:.0f} s\n")


def advice(found: Iterable[Remedy], pod: Pod) -> Iterator[tuple[str, str]]:
    """(how it is known, what would fit) for the table of a plan that does not fit."""
    unit = pod.chip.unit if pod.chip else "chip"
    for one in found:
        how = "would fit, compiled" if one.compiled else "would fit, about"
        yield how, f"{one.flags}: {one.need / GIB:.2f} GiB a {unit}"


def try_line(one: Tried) -> str:
    """A candidate of a sweep as one line."""
    if one.plan is None:
        return f"{dict(mesh=one.mesh, batch=one.batch)}: {one.error}"
    fits = "fits" if one.plan.fits else "does not fit"
    return (
        f"{one.mesh}, batch {one.batch}, remat {one.remat}: {fits}, "
        f"{one.plan.need / GIB:.1f} GiB, {one.plan.clips:.0f} clips/s"
    )


def sweep(cfg: config.Config, pod: Pod, quick: bool) -> Iterator[tuple[str, ...]]:
    """The cells of a table of all candidates, the most clips a second first. Prints a line for each
    as it is compiled. Raises UserError if there are none."""
    found: list[tuple[str, Plan]] = []
    for one in forecast.sweep(cfg, pod, quick):
        print(try_line(one), flush=True)
        if one.plan is not None:
            found.append((one.remat, one.plan))
    if not found:
        raise UserError(f"no mesh of {len(pod.devices)} chips divides batch {cfg.batch}")
    found.sort(key=lambda item: (not item[1].fits, -item[1].clips, item[1].need))
    for remat, plan in found:
        sizes = (str(n) for n in (*plan.shape.values(), plan.batch))
        fits = "yes" if plan.fits else "no"
        yield *sizes, remat, fits, f"{plan.need / GIB:.1f}", f"{plan.clips:.0f}"


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("plan", __doc__)
    parser.add_argument("--config", required=True, help=cli.CONFIG)
    parser.add_argument(
        "--topology", required=True, help="v5e:4x4, v6e:16x16, tpu7x:4x4x4, cpu:8, local"
    )
    parser.add_argument("--slices", type=int, default=1, help="slices of that topology, as one run")
    parser.add_argument("--sweep", action="store_true", help="try meshes, batches, remat policies")
    parser.add_argument(
        "--quick", action="store_true", help="compile in a third of the time, without a step's time"
    )
    parser.add_argument("--clips-per-core", type=float, help="clips a second that a core decodes")
    args, overrides = cli.parse(parser, argv)
    cfg = config.load(args.config, overrides)
    if args.topology != "local":
        jax.config.update("jax_platforms", "cpu")  # planning claims no accelerator
    pod = find_pod(args.topology, args.slices)
    if args.sweep:
        rate = "clips/s at best" if args.quick else "clips/s"
        columns = (*sharding.AXES, "batch", "remat", "fits", "GiB", rate)
        cells = list(sweep(cfg, pod, args.quick))
        return metrics.print_table(f"{args.config} on {pod.name}, best first", columns, cells)
    plan = forecast.make_plan(cfg, pod, args.quick, stage)
    own = args.clips_per_core
    shown = list(rows(plan, pod, {"your clips": own} if own else DECODED))
    if not plan.fits:
        metrics.print_table(title(args.config, plan, pod, args.slices), ("what", ""), shown)
        shown = list(advice(forecast.remedies(cfg, plan, pod, stage), pod))
        nothing = [("nothing found", "vtp plan --sweep tries meshes, batches and remat together")]
        metrics.print_table("what would fit", ("", "change"), shown or nothing)
        sys.exit(1)
    metrics.print_table(title(args.config, plan, pod, args.slices), ("what", ""), shown)


if __name__ == "__main__":
    cli.run(main)
