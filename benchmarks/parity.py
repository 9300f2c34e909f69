"""Measures how far every net is from its reference, in some minutes.

    python -m benchmarks.parity                  every net and format
    python -m benchmarks.parity CoCa open_clip   these

Two kinds of rows. Against official code: numbers that it gave once, on weights and inputs that a
rule makes (tests/goldens.py): the losses, and every gradient's norm and product with a fixed draw.
Against the references of `vtp_jax.convert`: the outputs of a small net of each file format. Figures
go to benchmarks/results/parity.json, from which tests/tables.py makes the table of docs/parity.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tests import goldens
from tests.goldens import GOLDENS, Golden
from vtp_jax.convert import formats
from vtp_jax.convert.families import FORMATS, STEPS, videomae
from vtp_jax.setup import cli
from vtp_jax.types import UserError

RESULTS = Path(__file__).parent / "results" / "parity.json"
REFERENCE = "vtp_jax/convert/reference"


class Row(NamedTuple):
    """A comparison: what is compared with what, and the largest difference that passes."""

    net: str
    reference: str
    what: str
    tolerance: float

    @property
    def key(self) -> str:
        return f"{self.net}: {self.what}"


def rows() -> Iterator[Row]:
    """Every comparison, without running any."""
    for net, (name, _) in GOLDENS.items():
        step = STEPS[name].step
        assert step is not None
        source = SOURCES.get(net, step.source)
        yield Row(net, source, "losses", 1e-9)
        if net not in FORWARD:
            yield Row(net, source, "gradients", 1e-7)
    for name, form in FORMATS.items():
        assert form.proof is not None
        yield Row(f"`{name}`: {form.about}", REFERENCE, "outputs", form.proof.tolerance)


SOURCES = {"VideoMAE V2, classifier": videomae.SOURCE_V2}  # one format, two repositories
FORWARD = ("TVTSv2, one text", "TVTSv2, H/14")  # goldens without gradients


def relative(pairs: Iterable[tuple[float, float, float]]) -> float:
    """The largest difference of (found, expected, scale), relative to the larger of the latter."""
    return max(abs(a - b) / max(abs(b), scale, 1e-300) for a, b, scale in pairs)


def compare(golden: Golden) -> Iterator[tuple[str, float]]:
    """(what, the largest relative difference) of a golden's numbers."""
    out = golden.run(grads=bool(golden.norms))
    yield "losses", relative((float(out[n]), x, 0.0) for n, x in golden.losses.items())
    if golden.norms:
        # A gradient that is 0 there (of a bias of k, say) is rounding of the whole gradient here.
        whole = golden.case.get("global_grad_norm") or max(golden.norms.values())
        found = goldens.gradients(golden, out)
        yield "gradients", relative((a, b, max(scale, 1e-3 * whole)) for _, a, b, scale in found)


def measure(names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """(key of a row, its difference) of these nets and formats."""
    from tests.convert import small

    for net, (_, make) in GOLDENS.items():
        if net in names:
            for what, value in compare(make()):
                yield f"{net}: {what}", value
    for name, form in FORMATS.items():
        if name in names:
            tensors, params, heads = small.tensors_of(name)
            worst = formats.check(form, jax.tree.map(jnp.asarray, params), tensors, heads)
            yield f"`{name}`: {form.about}: outputs", max(worst.values())


def results() -> Mapping[str, float]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def table() -> Iterator[str]:
    """The table of docs/parity.md: the rows of the code, with the figures of the last run."""
    found = results()
    yield "| net | compared with | what | largest difference | tolerance |"
    yield "|---|---|---|---|---|"
    for row in rows():
        value = f"{found[row.key]:.1e}" if row.key in found else "not measured yet"
        yield f"| {row.net} | {row.reference} | {row.what} | {value} | {row.tolerance:.0e} |"


def steps() -> Iterator[str]:
    """The table of what `python -m vtp_jax.parity` takes and gives."""
    yield "| method | official code | inputs, and outputs |"
    yield "|---|---|---|"
    for name, form in STEPS.items():
        assert form.step is not None
        yield f"| `{name}` | {form.step.source} | {form.step.about} |"


def main(argv: Sequence[str]) -> None:
    from tests import tables

    names = [*GOLDENS, *FORMATS]
    if unknown := [name for name in argv if name not in names]:
        raise UserError(f"no net or format '{unknown[0]}'; known: {', '.join(names)}")
    found = dict(results())
    for key, value in measure(argv or names):
        print(f"{key}: {value:.1e}", flush=True)
        found[key] = float(f"{value:.2e}")
    kept = {row.key: found[row.key] for row in rows() if row.key in found}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    tables.main()
    if bad := [r.key for r in rows() if not kept.get(r.key, 0.0) <= r.tolerance]:
        raise SystemExit(f"above its tolerance: {', '.join(bad)}")


if __name__ == "__main__":
    cli.run(main)
