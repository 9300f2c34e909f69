"""Times a training step on this machine, on synthetic input, relative to its matrix products."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vtp_jax.data import outline
from vtp_jax.measure import flops, synthetic
from vtp_jax.run import sharding
from vtp_jax.run.step import jit_step
from vtp_jax.setup import build
from vtp_jax.setup.config import Config

TRACED = 3  # steps in a profile
# Side of the square matrices that measure a platform's rate, and the number of products.
SQUARE = dict(cpu=(2048, 4), gpu=(8192, 8), tpu=(8192, 8))


def seconds(run: Callable[[], Any]) -> float:
    """Seconds that run() takes until its result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def in_turns(runs: Mapping[str, Callable[[], Any]], times: int) -> dict[str, list[float]]:
    """Seconds of each run, `times` each. The runs alternate, so that disturbances of the machine
    affect all of them alike; the first round is a warm-up and does not count."""
    found = [{name: seconds(run) for name, run in runs.items()} for _ in range(times + 1)]
    return {name: [one[name] for one in found[1:]] for name in runs}


def products(dtype: Any) -> tuple[Callable[[], Any], float]:
    """(a run of square matrix products on one device, its FLOPs), to measure the machine's rate."""
    n, times = SQUARE[jax.default_backend()]
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype)) / n**0.5

    @jax.jit
    def chain(x: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, y: y @ x, x)

    return lambda: chain(x), 2.0 * n**3 * times


def peak_memory(compiled: Any) -> float:
    """Peak bytes in use on a device; the program's own figure if the device reports none."""
    held = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if held:
        return float(held)
    used = compiled.memory_analysis()
    return float(
        used.temp_size_in_bytes
        + used.argument_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes
    )


def machine() -> dict[str, Any]:
    """The machine and the versions that absolute numbers depend on."""
    device = jax.devices()[0]
    return dict(
        machine=f"{platform.machine()}, {jax.device_count()} x {device.device_kind}",
        python=platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax")},
    )


def measure_step(
    cfg: Config, steps: int, batch: int | None = None, profile: str | None = None
) -> dict[str, Any]:
    """The speed and memory of a config's training step, jitted as in `train`.

    steps: number of timed steps; batch: rows, instead of the config's; profile: a folder to trace
    TRACED further steps into.
    """
    rows, mesh = batch or cfg.batch, build.mesh(cfg)
    found = outline.describe(cfg.data, rows)
    parts = build.prepare(cfg, found, mesh)
    dtype = cfg.method.get("dtype", "bfloat16")
    shapes = parts.shapes
    model = 3 * flops.forward(parts.method, shapes.params, shapes.extra, found.spec)
    multiply, product_flops = products(dtype)
    with sharding.activate(mesh):
        given = sharding.put(synthetic.fill(*found), mesh)
        held = [jax.jit(parts.start, out_shardings=parts.placed)()]
        began = time.perf_counter()
        compiled = jit_step(parts.step, parts.placed, mesh).lower(held[0], given).compile()
        compiling = time.perf_counter() - began

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
        memory_gib=peak_memory(compiled) / 2**30,
        compile_s=compiling,
        **machine(),
    )


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Appends a line of JSON to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
