"""SimVTP ViT-B on this CPU: the loss and its gradients, relative to the machine's matrix products.

    python -m benchmarks.step_cpu [--rounds 5] [--batch 4] [--unroll 12] [--profile DIR]

fp32, 16 frames of 224 px, 32 words, four losses. The parts alternate, so that other load on the
machine affects all of them equally, and the median of each is taken. The products run twice in a
turn and count once: whatever runs first after a step is slowed by the kernel still reclaiming its
gigabytes. FLOPs are 3 x those of the forward products that the method must compute
(`must_compute`), whatever else the program computes.

Unless --malloc plain is given, the process restarts itself with an allocator that keeps its memory,
as launch.local does (launch.common.keep_memory; apt install libjemalloc2): the temporaries of a
step are gigabytes, which glibc takes from the kernel and returns every time.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from launch.common import keep_memory
from vtp_jax.data import outline
from vtp_jax.measure import synthetic, timing
from vtp_jax.methods import simvtp
from vtp_jax.nn import sizes
from vtp_jax.nn.sizes import Size
from vtp_jax.run import metrics
from vtp_jax.setup import cli

OUT = Path(__file__).parent / "results" / "step_cpu.jsonl"
DATA = dict(
    kind="files",
    train={},
    video=dict(frames=16, stride=4, size=224),
    text=dict(kind="wordpiece", length=32, path="vocab.txt"),
)
CUBE, PLACES, FRAMES, WORDS, VOCABULARY = (2, 16, 16), 196, 8, 32, 30522


def block(size: Size, n: int, asked: int | None = None) -> int:
    """Multiply-accumulates of a block over n tokens; only the last `asked` have an output."""
    d, r = size.width, n if asked is None else asked
    return 2 * n * d * d + 2 * r * d * d + 2 * r * d * size.mlp + 2 * r * n * d


def must_compute(encoder: Size, decoder: Size) -> dict[str, float]:
    """Forward GFLOP a clip, by part, of SimVTP's recipe: three passes over video and words (masked,
    right and wrong pairs), each alone, the decoder over all positions, four heads."""
    seen, n = (PLACES - int(0.9 * PLACES)) * FRAMES, PLACES * FRAMES
    hidden, pixels = n - seen, math.prod(CUBE) * 3
    d, e = encoder.width, decoder.width
    found = dict(
        pairs=3 * encoder.depth * block(encoder, seen + WORDS),
        alone=encoder.depth * (block(encoder, seen) + block(encoder, WORDS)),
        decoder=(decoder.depth - 1) * block(decoder, n) + block(decoder, n, hidden),
        heads=seen * d * e + hidden * e * pixels + WORDS * d * VOCABULARY + 2 * d * 2,
        embedding=seen * pixels * d,
    )
    return {name: 2 * count / 1e9 for name, count in found.items()}


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("step_cpu", __doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", default="B")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--unroll", type=int, default=1)
    parser.add_argument("--malloc", choices=("keep", "plain"), default="keep")
    parser.add_argument("--profile", metavar="DIR")
    args, _ = cli.parse(parser, argv)
    keep = keep_memory() if args.malloc == "keep" else {}
    if not keep.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **keep})
    spec, facts = outline.describe(DATA, args.batch)
    words = {k: facts[k] for k in ("vocab_size", "pad_id", "mask_id")}
    method = simvtp.make(
        size=args.size, dtype="float32", attention=args.attention, unroll=args.unroll, **words
    )
    given = jax.device_put(synthetic.fill(spec, facts))
    params = jax.jit(lambda: method.init(jax.random.key(0), spec))()

    def loss(params: Any, batch: Any) -> Any:
        return method.loss(params, {}, batch, jax.random.key(1), jnp.zeros((), jnp.int32))[0]

    forward, both = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
    multiply, flops = timing.products("float32")
    runs = dict(
        after_a_step=multiply,
        products=multiply,
        forward=lambda: forward(params, given),
        step=lambda: both(params, given),
    )
    took = {k: statistics.median(v) for k, v in timing.in_turns(runs, args.rounds).items()}
    if args.profile:
        with jax.profiler.trace(args.profile):
            jax.block_until_ready(runs["step"]())
    parts = must_compute(
        sizes.pick(sizes.ENCODERS, args.size, "--size"),
        sizes.pick(sizes.DECODERS, args.size, "--size"),
    )
    rate, work = flops / took["products"] / 1e9, args.batch * sum(parts.values())
    found = dict(
        batch=args.batch,
        unroll=args.unroll,
        malloc=keep,
        rss_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        gflop_forward_a_clip=parts,
        products_gflops=rate,
        step_s_a_clip=took["step"] / args.batch,
        forward_of_products=work / took["forward"] / rate,
        step_of_products=3 * work / took["step"] / rate,
        cores=len(os.sched_getaffinity(0)),
        **timing.machine(),
    )
    timing.write(OUT, found)
    metrics.print_table(
        "SimVTP on this CPU", ("what", "value"), [(k, str(v)) for k, v in found.items()]
    )


if __name__ == "__main__":
    cli.run(main)
