"""Runs one training step of a method on published weights, to compare it with the official code.

    vtp parity simvtp --weights W.npz --inputs I.npz --out O.npz [--grads]

Weights have the official tensor names; every size is read off the arrays, except the numbers of
heads, which are 64 wide unless --heads, --decoder-heads or --text-heads differ. All that is random
in training is an input, dropout is off, and the official code's quirks are on. O.npz holds the
outputs, the terms of the loss, `loss`, and with --grads grad/<official name>; all in fp64.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vtp_jax.convert import formats
from vtp_jax.convert.families import STEPS
from vtp_jax.setup import cli
from vtp_jax.types import UserError


def read(path: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Raises UserError on pickled objects."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} as .npz: {error}") from None


def describe() -> str:
    """The inputs and outputs of every method."""
    lines = ["Inputs -> outputs of each method:"]
    for name, form in STEPS.items():
        assert form.step is not None
        lines.append(f"  {name} ({form.step.source}): {form.step.about}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("parity", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = describe()
    parser.add_argument("method", choices=STEPS)
    parser.add_argument("--weights", required=True, help=".npz, official tensor names")
    parser.add_argument("--inputs", required=True, help=".npz")
    parser.add_argument("--out", required=True, help=".npz to write")
    parser.add_argument("--grads", action="store_true", help="gradients of the loss too")
    stacks = ("heads", "decoder-heads", "text-heads")
    for name in stacks:
        parser.add_argument(f"--{name}", type=int, help="if heads are not 64 wide")
    args = cli.parse_alone(parser, argv)
    result = formats.run_step(
        STEPS[args.method],
        read(args.weights),
        read(args.inputs),
        heads={name: getattr(args, name.replace("-", "_")) for name in stacks},
        grads=args.grads,
    )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.out, **result)  # pyright: ignore[reportArgumentType]
    for name in (n for n in result if n.startswith("loss")):
        print(f"{name:9s} {float(result[name]):.12f}")


if __name__ == "__main__":
    cli.run(main)
