"""Memory and time of contrast over a global batch, by chunks: forward and backward.

    python -m benchmarks.contrast [--rows 8192] [--width 512] [--devices 8]

The memory is what XLA plans for one device (`memory_analysis`), on fake CPU devices that split the
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from vtp_jax.measure import timing
from vtp_jax.objectives import contrastive
from vtp_jax.run import metrics, sharding
from vtp_jax.setup import cli

OUT = Path(__file__).parent / "results" / "contrast.jsonl"
CHUNKS = (1, 4, 16, 64)


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("contrast", __doc__)
    for name, value in dict(rows=8192, width=512, devices=8).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args, _ = cli.parse(parser, argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)

    mesh, shape = sharding.make_mesh(), (args.rows, args.width)
    a, b = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    given = sharding.put(dict(a=a, b=b, where=jnp.ones(args.rows, bool)), mesh)

    def measure(chunks: int) -> dict[str, float]:
        def loss(a: jax.Array, b: jax.Array) -> jax.Array:
            options = dict(temperature=0.05, chunks=chunks)
            return contrastive.both_ways(a, b, given["where"], **options).value()

        with sharding.activate(mesh):
            run = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(given["a"], given["b"]).compile()
            value = float(run(given["a"], given["b"])[0])
            took = timing.seconds(lambda: run(given["a"], given["b"]))
        held = run.memory_analysis().temp_size_in_bytes / 2**20
        return dict(chunks=chunks, mib_a_device=held, seconds=took, loss=value)

    found = [measure(chunks) for chunks in CHUNKS]
    timing.write(OUT, dict(**vars(args), **timing.machine(), found=found))
    metrics.print_table("contrast", list(found[0]), [list(one.values()) for one in found])


if __name__ == "__main__":
    cli.run(main)
