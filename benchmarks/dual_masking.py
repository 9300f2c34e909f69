"""The savings of VideoMAE V2's decoder mask: a step of ViT-B with and without it, alternating.

    python -m benchmarks.dual_masking [--rounds 3] [--batch 2] [--size B]

16 frames of 224 px, fp32 on a CPU, bf16 elsewhere; forward and backward. The paper (arXiv
2303.16727, table 2, ViT-B): FLOPs 35.48 -> 25.87 G a clip (1.37), feature maps 631 -> 328 MB
(1.92), hours of 800 epochs on 64 GPUs 28.4 -> 15.9 (1.79, data included).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vtp_jax.data import outline
from vtp_jax.measure import flops, synthetic, timing
from vtp_jax.methods import videomae
from vtp_jax.run import metrics
from vtp_jax.setup import cli

OUT = Path(__file__).parent / "results" / "dual_masking.jsonl"
DATA = dict(kind="files", train={}, video=dict(frames=16, stride=4, size=224))
RATIOS = {"encoder alone": 0.0, "dual": 0.5}


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("dual_masking", __doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", default="B")
    parser.add_argument("--attention", default="auto", help="a kernel; auto: by length")
    args, _ = cli.parse(parser, argv)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    spec, facts = outline.describe(DATA, args.batch)
    given = jax.device_put(synthetic.fill(spec, facts))
    runs, found = {}, {}
    for name, ratio in RATIOS.items():
        method = videomae.make(
            size=args.size, decoder_ratio=ratio, dtype=dtype, attention=args.attention
        )
        params = jax.jit(partial(method.init, spec=spec))(jax.random.key(0))

        def loss(params: Any, batch: Any, method: Any = method) -> Any:
            step = jnp.zeros((), jnp.int32)
            return method.loss(params, {}, batch, jax.random.key(1), step)[0]

        run = jax.jit(jax.value_and_grad(loss)).lower(params, given).compile()
        runs[name] = partial(run, params, given)
        once = flops.forward(method, params, {}, spec) / args.batch
        held = run.memory_analysis().temp_size_in_bytes / args.batch
        found[name] = dict(gmac_a_clip=once / 2e9, mib_a_clip=held / 2**20)
    for name, took in timing.in_turns(runs, args.rounds).items():
        found[name]["s_a_clip"] = statistics.median(took) / args.batch
    saved = {key: found["encoder alone"][key] / found["dual"][key] for key in found["dual"]}
    timing.write(OUT, dict(**vars(args), dtype=dtype, **timing.machine(), found=found, saved=saved))
    table = [(name, *one.values()) for name, one in dict(**found, saved=saved).items()]
    metrics.print_table("dual masking", ("mask", *saved), table)


if __name__ == "__main__":
    cli.run(main)
