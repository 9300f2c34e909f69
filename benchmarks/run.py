"""Times the demo's training step and its data on this machine: `make bench`; see README.md here."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vtp_jax.data import shapes
from vtp_jax.run import metrics, sharding
from vtp_jax.setup import build, cli, config

OUT = Path(__file__).parent / "results" / "run.jsonl"


def seconds(run: Callable[[], Any], times: int) -> float:
    """Mean time of a run, after one that is not counted."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(run())
    return (time.perf_counter() - start) / times


def measure_matmul(n: int = 2048) -> float:
    x = jnp.ones((n, n))
    product = jax.jit(lambda x: x @ x)
    return 2 * n**3 / seconds(lambda: product(x), 10) / 1e9


def measure_step(cfg: config.Config) -> tuple[float, float]:
    """(milliseconds, GFLOP by XLA's count) of a step."""
    data = build.data(cfg.data, batch=cfg.batch, seed=0)
    mesh = build.mesh(cfg)
    parts = build.prepare(cfg, data, mesh)
    with sharding.activate(mesh):
        batch = sharding.put(next(iter(data.batches(0))), mesh)
        state = jax.jit(parts.start)()
        step = jax.jit(parts.step).lower(state, batch).compile()
        took = seconds(lambda: step(state, batch), 10)
    return 1e3 * took, step.cost_analysis()["flops"] / 1e9


def measure_data(cfg: config.Config, batches: int = 40) -> float:
    """Clips a second from mp4 files to numpy batches."""
    data = build.data(cfg.data, batch=cfg.batch, seed=0)
    stream = data.batches(0)
    next(stream)
    start = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return batches * cfg.batch / (time.perf_counter() - start)


def main(_: Any) -> None:
    cfg = config.load("configs/demo.py")
    text = dict(kind="sentencepiece", length=cfg.data["text"]["length"])
    with tempfile.TemporaryDirectory() as folder:
        shapes.write(folder, shapes.Plan(train=500, val=2))
        cfg.data.update(train=dict(root=folder, list=f"{folder}/train.csv"), evals={}, text=text)
        rate = measure_matmul()
        took, work = measure_step(cfg)
        found = dict(
            machine=f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
            jax=version("jax"),
            matmul_gflops=rate,
            step_ms=took,
            step_clips_per_s=1e3 * cfg.batch / took,
            step_of_matmul=1e3 * work / took / rate,
            data_clips_per_s=measure_data(cfg),
        )
    with OUT.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
    metrics.print_table("benchmarks", ("what", "value"), list(found.items()))


if __name__ == "__main__":
    cli.run(main)
