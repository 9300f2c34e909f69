"""How far our nets are from others': `python -m benchmarks.parity` measures it and mends the table
in docs/parity.md. Needs the repository's tests, whose goldens and rules it reads.

Two kinds of rows. Against a release: numbers recorded once from the authors' code, on weights and
inputs that a rule makes; losses and every gradient's norm and product with a fixed draw. Against
the reference of `vtp_jax.convert`: outputs of small nets, one for each file format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.convert import test_convert
from tests.methods import test_simvtp_golden, test_videomae_golden
from tests.parity import GOLDEN, make_tensor
from tests.tasks import test_retrieve_golden
from vtp_jax import parity
from vtp_jax.convert import formats, rules
from vtp_jax.methods import videomae
from vtp_jax.objectives import reconstruction
from vtp_jax.run import metrics
from vtp_jax.setup import cli

PAGE = Path(__file__).parents[1] / "docs" / "parity.md"
BEGIN, END = "<!-- table: python -m benchmarks.parity -->", "<!-- end of the table -->"
Pairs = Iterator[tuple[float, float, float]]  # ours, theirs, the scale of the latter


class Row(NamedTuple):
    net: str
    reference: str
    what: str
    difference: float
    tolerance: float


def relative(pairs: Pairs) -> float:
    return max(abs(a - b) / max(abs(b), scale, 1e-300) for a, b, scale in pairs)


def gradients(grads: dict[str, np.ndarray], golden: dict[str, Any]) -> Pairs:
    for name, norm in golden["grad_norms"].items():
        x = np.array(grads[name], np.float64)
        if "word_embeddings" in name:  # the release's [PAD] row has none
            x[0] = 0
        # What is 0 there (a bias of k, say) is 0 here to rounding of the whole gradient.
        yield float(np.linalg.norm(x)), norm, 1e-3 * golden["global_grad_norm"]
        if probe := golden.get("grad_probes", {}).get(name):
            drawn = np.random.RandomState(4).standard_normal(x.size)
            yield float(x.ravel() @ drawn), probe, norm


def from_parity(method: str, weights: Any, inputs: Any, golden: dict[str, Any]) -> list[float]:
    """Largest relative differences of losses and of gradients."""
    out = parity.METHODS[method](weights, inputs, True)
    out = {name: np.asarray(x) for name, x in out.items()}
    losses = relative((float(out[n]), golden[n], 0.0) for n in out if n.startswith("loss"))
    grads = {n.removeprefix("grad/"): x for n, x in out.items() if n.startswith("grad/")}
    return [losses, relative(gradients(grads, golden))]


def simvtp(name: str) -> list[float]:
    (golden,) = json.loads((GOLDEN / f"{name}.json").read_text()).values()
    case = test_simvtp_golden.describe(golden)
    shapes = test_simvtp_golden.name_tensors(case)
    weights = {n: make_tensor(n, shape) for n, shape in shapes.items()}
    return from_parity("simvtp", weights, test_simvtp_golden.make_inputs(case), golden)


def simvtp_finetune(name: str) -> list[float]:
    case = test_retrieve_golden.CASES[name]
    weights = test_retrieve_golden.make_weights(case)
    return from_parity("simvtp_finetune", weights, test_retrieve_golden.make_inputs(case), case)


def videomae_step(name: str) -> list[float]:
    golden = test_videomae_golden.load(name, "pretrain")
    method, batch = test_videomae_golden.build(golden)
    net = method.loss.args[0]
    table = rules.videomae(golden["encoder"]["heads"], golden["decoder"]["heads"])
    params = test_videomae_golden.weights(table, method, batch)
    draws = test_videomae_golden.draws_of(golden, net)

    def loss(params: Any) -> Any:
        predicted, target = videomae.forward(net, params, batch, draws)
        return reconstruction.squared_error(predicted, target, draws.scored).value()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    theirs = rules.to_theirs(table, jax.device_get(grads))
    return [
        relative(iter([(float(value), golden["loss"], 0.0)])),
        relative(gradients(theirs, golden)),
    ]


RELEASES = [
    ("SimVTP, released widths", "wufeim/SimVTP @558d24e", simvtp, "simvtp_tiny"),
    ("SimVTP, other sizes", "wufeim/SimVTP @558d24e", simvtp, "simvtp_small"),
    ("SimVTP fine-tuned", "wufeim/SimVTP @558d24e", simvtp_finetune, "small"),
    ("VideoMAE", "MCG-NJU/VideoMAE @14ef8d8", videomae_step, "videomae"),
    ("VideoMAE V2", "OpenGVLab/VideoMAEv2 @29eab1e", videomae_step, "videomae_v2"),
]


def measure() -> Iterator[Row]:
    with jax.enable_x64(True):
        for net, reference, compare, name in RELEASES:
            for what, value in zip(("losses", "gradients"), compare(name), strict=True):
                yield Row(net, reference, what, value, 1e-9 if what == "losses" else 1e-7)
    for name, form in formats.FORMATS.items():
        tensors, params, heads = test_convert.tensors_of(name)
        worst = formats.check(form, jax.tree.map(jnp.asarray, params), tensors, heads)
        output = max(worst, key=lambda n: worst[n])
        net = f"`{name}`: {form.about}"
        yield Row(net, "convert/reference.py", f"outputs ({output})", worst[output], form.tolerance)


def markdown(rows: Sequence[Row]) -> str:
    head = "| net | held against | what | largest difference | tolerance |\n|---|---|---|---|---|"
    lines = (
        f"| {r.net} | {r.reference} | {r.what} | {r.difference:.1e} | {r.tolerance:.0e} |"
        for r in rows
    )
    return "\n".join([head, *lines])


def main(_: Sequence[str]) -> None:
    rows = []
    for row in measure():
        print(f"{row.net}, {row.what}: {row.difference:.1e}", flush=True)
        rows.append(row)
    page = PAGE.read_text(encoding="utf-8")
    new = f"{BEGIN}\n\n{markdown(rows)}\n\n{END}"
    PAGE.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: new, page, flags=re.S), encoding="utf-8")
    cells = [
        (r.net, r.reference, r.what, f"{r.difference:.1e}", f"{r.tolerance:.0e}") for r in rows
    ]
    metrics.print_table("parity", ("net", "held against", "what", "difference", "limit"), cells)
    if bad := [r.net for r in rows if not r.difference <= r.tolerance]:
        raise SystemExit(f"above its tolerance: {', '.join(bad)}")


if __name__ == "__main__":
    cli.run(main)
