"""Measures a config on this machine: its step, on synthetic input, or its data.

    vtp bench step --config demo [--steps 20] [--profile runs/profile]
    vtp bench data --config demo:tiny [--clips 200]

MFU: 3 x the multiplications of the loss's products forward (backward has twice as many; what remat
computes again is not counted), over the machine's own rate in the same dtype, measured in between.
One line of JSON is appended to --out. The profile is for TensorBoard, XProf or Perfetto.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vtp_jax.data import outline
from vtp_jax.measure import data as measure_data
from vtp_jax.measure import flops, synthetic
from vtp_jax.run import metrics, sharding
from vtp_jax.run.step import jit_step
from vtp_jax.setup import build, cli, config
from vtp_jax.types import Method, Params, Spec, UserError

TRACED = 3  # steps in a profile
# Side of the square matrices that a platform's rate is measured with, and how many products.
SQUARE = dict(cpu=(2048, 4), gpu=(8192, 8), tpu=(8192, 8))


def seconds(run: Callable[[], Any]) -> float:
    """How long run() takes, until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def in_turns(runs: Mapping[str, Callable[[], Any]], times: int) -> dict[str, list[float]]:
    """Seconds of each run, one after the other, again and again, so that what disturbs the machine
    disturbs all. The first round does not count."""
    found = [{name: seconds(run) for name, run in runs.items()} for _ in range(times + 1)]
    return {name: [one[name] for one in found[1:]] for name in runs}


def products(dtype: Any) -> tuple[Callable[[], Any], float]:
    """(a run of square matrix products on one device, its FLOPs): what a machine can do."""
    n, times = SQUARE[jax.default_backend()]
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype)) / n**0.5

    @jax.jit
    def chain(x: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, y: y @ x, x)

    return lambda: chain(x), 2.0 * n**3 * times


def forward_flops(method: Method, params: Params, extra: Any, spec: Spec) -> int:
    """FLOPs of the products of a loss, forward, counted from its program for one CPU: fused
    kernels of other platforms would hide theirs."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, extra))
    with sharding.activate(sharding.make_mesh(devices=jax.devices("cpu")[:1])):
        key = jax.eval_shape(lambda: jax.random.key(0))
        step = jax.ShapeDtypeStruct((), jnp.int32)
        return 2 * flops.macs(method.loss, *shapes, dict(spec), key, step)


def memory(compiled: Any) -> float:
    """The most bytes that a device has held; where it does not say, what the program asks for."""
    held = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if held:
        return float(held)
    asked = compiled.memory_analysis()
    return float(
        asked.temp_size_in_bytes
        + asked.argument_size_in_bytes
        + asked.output_size_in_bytes
        - asked.alias_size_in_bytes
    )


def machine() -> dict[str, Any]:
    """What absolute numbers belong to."""
    device = jax.devices()[0]
    return dict(
        machine=f"{platform.machine()}, {jax.device_count()} x {device.device_kind}",
        python=platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax")},
    )


def measure_step(
    cfg: config.Config, steps: int, batch: int | None = None, profile: str | None = None
) -> dict[str, Any]:
    """The numbers of a whole training step of a config, as `train` takes it."""
    rows, mesh = batch or cfg.batch, build.mesh(cfg)
    found = outline.describe(cfg.data, rows)
    parts = build.prepare(cfg, found, mesh)
    dtype = cfg.method.get("dtype", "bfloat16")
    shapes = parts.shapes
    model = 3 * forward_flops(parts.method, shapes.params, shapes.extra, found.spec)
    multiply, product_flops = products(dtype)
    with sharding.activate(mesh):
        given = sharding.put(synthetic.fill(*found), mesh)
        state = jax.jit(parts.start, out_shardings=parts.placed)()
        began = time.perf_counter()
        compiled = jit_step(parts.step, parts.placed, mesh).lower(state, given).compile()
        compiling = time.perf_counter() - began
        held = [state]

        def step() -> Any:
            held[0], numbers = compiled(held[0], given)
            return numbers

        took = in_turns(dict(step=step, products=multiply), steps)
        if profile:
            with jax.profiler.trace(profile):
                for _ in range(TRACED):
                    jax.block_until_ready(step())
    second = statistics.median(took["step"])
    rate = product_flops / statistics.median(took["products"])
    return dict(
        batch=rows,
        dtype=str(dtype),
        step_ms=1e3 * second,
        clips_per_s=rows / second,
        model_tflop=model / 1e12,
        products_tflops=rate / 1e12,
        mfu=model / second / (rate * mesh.size),
        memory_gib=memory(compiled) / 2**30,
        compile_s=compiling,
        **machine(),
    )


def step(args: argparse.Namespace) -> None:
    """`bench step`"""
    if args.steps < 1:
        raise UserError(f"--steps={args.steps}: at least 1")
    cfg = config.load(args.config, args.overrides)
    found = dict(config=args.config, overrides=args.overrides)
    found |= measure_step(cfg, args.steps, args.batch, args.profile)
    write(Path(args.out), found)
    rows = [(name, value) for name, value in found.items() if not isinstance(value, list)]
    metrics.print_table("step", ("what", "value"), rows)


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Adds a line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


def data(args: argparse.Namespace) -> None:
    """`bench data`, which needs TensorFlow as `step` does not."""
    if args.clips < 1:
        raise UserError(f"--clips={args.clips}: at least 1")
    found = measure_data.measure(config.load(args.config, args.overrides), args.clips)
    measure_data.tell(found)
    if args.out:
        write(Path(args.out), found)


def main(argv: Sequence[str]) -> None:
    commands = cli.Commands("bench", __doc__)
    command = commands.add("step", step, "time a training step on synthetic input")
    command.add_argument("--config", required=True, help=cli.CONFIG)
    command.add_argument("--steps", type=int, default=10, help="number of timed steps")
    command.add_argument("--batch", type=int, help="rows, instead of the config's")
    command.add_argument("--profile", metavar="DIR", help=f"also trace {TRACED} steps into DIR")
    command.add_argument("--out", default="benchmarks/results/step.jsonl", help="append to it")

    command = commands.add("data", data, "time the input pipeline, part by part and together")
    command.add_argument("--config", required=True, help=cli.CONFIG)
    command.add_argument("--clips", type=int, default=100, help="number of clips for each part")
    command.add_argument("--out", help="append a line of JSON to this file")
    commands.run(argv)


if __name__ == "__main__":
    cli.run(main)
