"""A training step of SimVTP on a GPU: this project against PyTorch, by size and batch.

    python -m benchmarks.gpu [--sizes B L] [--batches 16 32 64 128] [--rounds 10] [--check]

Both sides compute the same maths, in bf16 with fp32 parameters, moments and statistics: 16 frames
of 224 px, 32 words, four losses, AdamW. The PyTorch side is written to be fast: SDPA,
torch.compile, fused AdamW, cubes cut and gathered before they are embedded, passes of one length in
one batch. Each measurement runs in its own process, so that neither side's memory is in the other's
way; the sides alternate. MFU is 3 x the products that the method must compute
(benchmarks.step_cpu), over the rate of square bf16 products on the same side. --check compares the
two losses on one batch, in fp32. Needs JAX and PyTorch, but neither TensorFlow nor a network.
--small runs on a CPU.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.step_cpu import CUBE, DATA, must_compute
from vtp_jax.data import outline
from vtp_jax.measure import synthetic, timing
from vtp_jax.nn import sizes
from vtp_jax.run import metrics
from vtp_jax.run.step import make_step
from vtp_jax.setup import cli

OUT = Path(__file__).parent / "results" / "gpu.jsonl"
SIDES = ("jax", "torch")
SMALL = dict(
    data=dict(DATA, video=dict(frames=4, stride=1, size=32)), size="tiny", rounds=2, dtype="float32"
)
RATE, DECAY, TEMPERATURE = 1e-4, 0.05, 0.05


def setting(size: str, batch: int, small: bool) -> tuple[Mapping[str, Any], Any, dict[str, Any]]:
    """(batch, spec, facts) of noise, the same on both sides."""
    spec, facts = outline.describe(SMALL["data"] if small else DATA, batch)
    return (
        synthetic.fill(spec, facts),
        spec,
        {k: facts[k] for k in ("vocab_size", "pad_id", "mask_id")},
    )


# JAX.


def jax_step(
    size: str, batch: int, small: bool
) -> tuple[Callable[[], Any], Callable[[], Any], float]:
    """(a training step, a run of products, FLOPs of the run)"""
    import jax

    from vtp_jax.methods import simvtp
    from vtp_jax.run import optim
    from vtp_jax.types import State

    given, spec, facts = setting(size, batch, small)
    dtype = SMALL["dtype"] if small else "bfloat16"
    method = simvtp.make(size=size, dtype=dtype, **facts)
    params = jax.jit(lambda: method.init(jax.random.key(0), spec))()
    rules = (((".*"), dict(wd=1.0)),)
    optimizer = optim.make(
        jax.eval_shape(lambda: params), lr=lambda step: RATE, weight_decay=DECAY, rules=rules
    )
    step = jax.jit(make_step(method, optimizer, 0), donate_argnums=0)
    opt = jax.jit(lambda p: optimizer.init(optimizer.split(p)[0]))(params)
    held, batch_there = (
        [State(jax.numpy.zeros((), "int32"), params, opt, {})],
        jax.device_put(dict(given)),
    )

    def run() -> Any:
        held[0], numbers = step(held[0], batch_there)
        return jax.block_until_ready(numbers["loss"].total)

    multiply, flops = timing.products(dtype)
    return run, lambda: jax.block_until_ready(multiply()), flops


# PyTorch.


def torch_net(size: str, facts: Mapping[str, Any], video: tuple[int, ...]) -> Any:
    """The net of the exported module, with the losses that SimVTP is trained with."""
    import torch
    from torch.nn import functional as F

    from vtp_jax.convert.pytorch import simvtp

    names = ("width", "depth", "heads", "mlp")
    tables = (sizes.pick(t, size, "--sizes") for t in (sizes.ENCODERS, sizes.DECODERS))
    encoder, decoder = (dict(zip(names, one, strict=True)) for one in tables)
    config = dict(
        encoder=encoder, decoder=decoder, cube=CUBE, video=video, dropout=0.1, text_length=512,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), pool_padding=False,
        vocab_size=facts["vocab_size"], pad_id=facts["pad_id"],
    )  # fmt: skip

    class Trained(simvtp.SimVTP):
        def cut(self, frames: torch.Tensor) -> torch.Tensor:
            """(B, T, H, W, 3) uint8 -> (B, N, c t h w) uint8, as the convolution's kernel."""
            b, t, h, w, c = frames.shape
            p, q, r = CUBE
            x = frames.view(b, t // p, p, h // q, q, w // r, r, c)
            return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, -1, c * p * q * r)

        def target(self, cubes: torch.Tensor) -> torch.Tensor:
            x = cubes.float().unflatten(-1, (3, -1)) / 255
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True).sqrt() + 1e-6)
            # The order in which the head was trained: colours vary fastest.
            return x.transpose(-1, -2).flatten(-2)

        def forward(self, frames, ids, masked, hidden, text_mask, keep, drop, negative):
            cubes = self.cut(frames)
            rows = torch.arange(len(frames), device=frames.device)[:, None]
            embed = self.encoder.patch_embed
            x = cubes[rows, keep].float().unflatten(-1, (3, -1)) / 255
            mean, std = (x.new_tensor(v)[:, None] for v in (embed.mean, embed.std))
            x = ((x - mean) / std).flatten(-2)
            video = F.linear(x, embed.proj.weight.flatten(1), embed.proj.bias) + embed.place[keep]
            clean, masked = self.text_embeddings(ids), self.text_embeddings(masked)
            k = keep.shape[1]

            passes = ((video, masked), (video, clean), (video[negative], clean))
            tokens = torch.cat([torch.cat(pair, 1) for pair in passes])
            mask = simvtp.joint(video, text_mask)
            pairs, right, wrong = self.encode(tokens, mask.repeat(3, 1)).chunk(3)
            a = simvtp.mean(self.encode(clean, text_mask), text_mask).float()
            b = self.encode(video).mean(1).float()

            seen = self.encoder_to_decoder(pairs[:, :k]) + self.place[keep]
            x = torch.cat([seen, self.mask_token + self.place[drop]], 1)
            x = self.decoder.head(self.decoder.norm(self.decoder.blocks(x)[:, k:]))
            loss = F.mse_loss(x.float(), self.target(cubes[rows, drop]))

            words = self.text_cls(pairs[:, k:]).float()
            loss = loss + F.cross_entropy(
                words.flatten(0, 1), ids.masked_fill(~hidden, -100).flatten()
            )

            logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / TEMPERATURE
            place = torch.arange(len(a), device=a.device)
            loss = loss + (F.cross_entropy(logits, place) + F.cross_entropy(logits.T, place)) / 2

            pooled = simvtp.mean(torch.cat([right, wrong]), mask.repeat(2, 1))
            label = (torch.arange(2 * len(a), device=a.device) < len(a)).long()
            return loss + F.cross_entropy(self.vtm_head(pooled).float(), label)

    return Trained(config)


def draw(given: Mapping[str, Any], video: tuple[int, ...], seed: int) -> dict[str, Any]:
    """The random draws of the loss, made on the host: keep, drop, hidden, negative."""
    rng = np.random.default_rng(seed)
    t, h, w = (side // cube for side, cube in zip(video, CUBE, strict=True))
    b, hide = len(given["valid"]), int(0.9 * h * w)
    order = rng.random((b, h * w)).argsort(1)
    start = (np.arange(t) * h * w)[None, :, None]
    drop, keep = (
        (start + np.sort(part, 1)[:, None]).reshape(b, -1)
        for part in (order[:, :hide], order[:, hide:])
    )
    hidden = (rng.random(given["text"].shape) < 0.75) & given["maskable"]
    negative = (np.arange(b) + rng.integers(1, b, b)) % b
    return dict(keep=keep, drop=drop, hidden=hidden, negative=negative)


def torch_arguments(
    given: Mapping[str, Any], draws: Mapping[str, Any], mask_id: int
) -> list[np.ndarray]:
    ids, hidden = given["text"].astype(np.int64), draws["hidden"]
    masked = np.where(hidden, mask_id, ids)
    found = (
        given["video"],
        ids,
        masked,
        hidden,
        given["text_mask"],
        *(draws[k] for k in ("keep", "drop", "negative")),
    )
    return list(found)


def torch_step(
    size: str, batch: int, small: bool
) -> tuple[Callable[[], Any], Callable[[], Any], float]:
    """As `jax_step`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if small else torch.bfloat16
    torch.backends.cuda.matmul.allow_tf32 = True
    given, spec, facts = setting(size, batch, small)
    video = spec["video"].shape[1:4]
    torch.manual_seed(0)
    net = torch_net(size, facts, video).to(device).train()
    adam = torch.optim.AdamW(
        net.parameters(), RATE, (0.9, 0.95), weight_decay=DECAY, fused=device == "cuda"
    )
    arguments = torch_arguments(given, draw(given, video, 0), facts["mask_id"])
    there = [torch.from_numpy(x).to(device) for x in arguments]
    loss = torch.compile(net)

    def run() -> Any:
        with torch.autocast(device, dtype, enabled=not small):
            value = loss(*there)
        adam.zero_grad(set_to_none=True)
        value.backward()
        adam.step()
        return value.item()

    n, times = (256, 2) if small else (8192, 8)
    x = torch.randn(n, n, device=device, dtype=dtype) / n**0.5

    def multiply() -> Any:
        y = x
        for _ in range(times):
            y = y @ x
        return y.flatten()[0].item()

    return run, multiply, 2.0 * n**3 * times


# Both.


def measure(side: str, size: str, batch: int, rounds: int, small: bool) -> dict[str, Any]:
    step, multiply, flops = dict(jax=jax_step, torch=torch_step)[side](size, batch, small)
    began = time.perf_counter()
    step()
    compiling = time.perf_counter() - began
    took = {
        k: statistics.median(v)
        for k, v in timing.in_turns(dict(step=step, products=multiply), rounds).items()
    }
    found = dict(side=side, size=size, batch=batch, step_ms=1e3 * took["step"])
    found |= dict(clips_per_s=batch / took["step"], products_tflops=flops / took["products"] / 1e12)
    if not small:
        encoder, decoder = sizes.ENCODERS[size], sizes.DECODERS[size]
        work = 3e9 * batch * sum(must_compute(encoder, decoder).values())
        found["mfu"] = work / took["step"] / (flops / took["products"])
    return found | dict(compile_s=compiling, memory_gib=peak(side), **machine(side))


def peak(side: str) -> float | None:
    """Peak memory of the device in GiB; None if the device does not report it."""
    if side == "torch":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    import jax

    held = jax.devices()[0].memory_stats()
    return held["peak_bytes_in_use"] / 2**30 if held else None


def machine(side: str) -> dict[str, Any]:
    if side == "jax":
        return timing.machine()
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return dict(machine=name, python=sys.version.split()[0], torch=torch.__version__)


def check() -> float:
    """Relative difference of the two sides' losses on one small batch, fp32, no dropout."""
    import jax
    import jax.numpy as jnp
    import torch

    from vtp_jax import masking
    from vtp_jax.convert import rules
    from vtp_jax.convert.families import simvtp as published
    from vtp_jax.methods import simvtp
    from vtp_jax.objectives import terms

    given, spec, facts = setting("tiny", 4, True)
    method = simvtp.make(size="tiny", dtype="float32", dropout=0.0, **facts)
    net, recipe = simvtp.build(size="tiny", dtype="float32", dropout=0.0, **facts)
    params = method.init(jax.random.key(0), spec)
    t, h, w = video = spec["video"].shape[1:4]
    draws = draw(given, video, 0)
    dropped = np.zeros((4, t * h * w // np.prod(CUBE)), bool)
    np.put_along_axis(dropped, draws["drop"], True, 1)
    masked = np.where(draws["hidden"], facts["mask_id"], given["text"])
    drawn = simvtp.Draws(
        masking.of_dropped(jnp.asarray(dropped), draws["drop"].shape[1]),
        jnp.asarray(draws["hidden"]),
        jnp.asarray(masked),
        jnp.asarray(draws["negative"], jnp.int32),
    )
    batch = {k: jnp.asarray(v) for k, v in given.items()}
    out = simvtp.forward(net, recipe, params, batch, drawn)
    value = float(terms.total(simvtp.compare(recipe, out, batch, drawn), recipe.weights))

    other_net = torch_net("tiny", facts, video).eval()
    table = published.pretrain_rules(sizes.ENCODERS["tiny"].heads, sizes.DECODERS["tiny"].heads)
    tensors = rules.to_tensors(table, params)
    other_net.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in tensors.items()})
    with torch.no_grad():
        arguments = torch_arguments(given, draws, facts["mask_id"])
        other = float(other_net(*(torch.from_numpy(x) for x in arguments)))
    return abs(value - other) / abs(other)


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("gpu", __doc__)
    parser.add_argument("--sizes", nargs="+", default=["B", "L"])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 32, 64, 128])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="one tiny size, to test the script")
    parser.add_argument("--check", action="store_true", help="only compare the two losses")
    parser.add_argument(
        "--only", nargs=3, metavar=("SIDE", "SIZE", "BATCH"), help="in this process"
    )
    args, _ = cli.parse(parser, argv)
    if args.check:
        print(f"the two losses differ by {check():.1e}")
        return
    if args.only:
        side, size, batch = args.only
        print(json.dumps(measure(side, size, int(batch), args.rounds, args.small)))
        return
    if args.small:
        args.sizes, args.batches, args.rounds = [SMALL["size"]], [4], SMALL["rounds"]
    found = []
    for size in args.sizes:
        for batch in args.batches:
            for side in SIDES:
                found.append(apart(side, size, batch, args.rounds, args.small))
                timing.write(OUT, found[-1])
    names = ("side", "size", "batch", "step_ms", "clips_per_s", "mfu", "memory_gib", "failed")
    rows = [
        [one.get(name) if one.get(name) is not None else "-" for name in names] for one in found
    ]
    metrics.print_table("SimVTP", names, rows)


def apart(side: str, size: str, batch: int, rounds: int, small: bool) -> dict[str, Any]:
    """`measure` in its own process. Returns the last line of the error if it fails, for instance
    when it runs out of memory."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", side, size, str(batch)]
    command += ["--rounds", str(rounds), *(["--small"] if small else [])]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return dict(side=side, size=size, batch=batch, failed=last[:200])
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    cli.run(main)
