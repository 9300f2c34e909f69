"""File formats: the tensors of a net of each, the proof of a conversion, and the comparison of a
training step with the official code.

A conversion is proved by running both sides on the same inputs in fp64: this implementation's net
on the converted parameters, and `reference`, which shares no code with it, on the published
tensors. A training step returns outputs, losses and gradients under the official names, for
comparison with those of the official code on the same weights and inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from jaxtyping import Num

from vtp_jax import tree
from vtp_jax.convert import nets, rules
from vtp_jax.convert.nets import Arrays, Heads, Net
from vtp_jax.nn import sizes
from vtp_jax.types import Params, UserError

Tensors = Mapping[str, Num[np.ndarray, "..."]]

KNOWN = {s.width: s.heads for table in (sizes.ENCODERS, sizes.DECODERS) for s in table.values()}
HEAD = 64  # width of a head, unless a published size of that width has another


# What a net is called in what was trained with it.
WRAPS = re.compile(r"((model|module|net|network|backbone|student|ema|model_ema|_orig_mod)\.)*")


class Proof(NamedTuple):
    """The proof of an import.

    draw:      (tensors, random generator) -> inputs of the reference
    reference: (tensors, inputs, heads) -> outputs under the names of `Net.run`
    tolerance: of a difference, in units of the output's root mean square
    """

    draw: nets.Draw
    reference: Callable[[Tensors, Arrays, Heads], Mapping[str, Any]]
    tolerance: float = 1e-9


class Step(NamedTuple):
    """A training step of the official code.

    source: the repository and commit
    inputs: the names of the required input arrays
    about:  a description of the inputs and outputs
    frozen: regex of official names that get no gradient
    idle:   regex of official parameters that no output depends on: their gradients are zeros
    """

    source: str
    inputs: Sequence[str]
    about: str
    frozen: str = ""
    idle: str = ""


class Format(NamedTuple):
    """One set of published names.

    about:    a description
    stacks:   for each stack of blocks, the name of its number of heads -> the name of a norm's
              weight that is as wide as the stack
    rules:    numbers of heads, one for each stack -> names and layouts
    net:      (parameters in fp64, inputs, heads) -> this implementation's net at their sizes
    unused:   regexes of tensors that files may contain but no net uses
    optional: prefixes of parameters that a net may lack; those of a prefix occur together
    tidy:     the tensors under the single set of names that `rules` and the reference use
    untidy:   the tensors as they are written, under every name that readers expect
    proof:    None without a reference; files of such a format cannot be imported
    step:     None if no method in this project trains such a net
    """

    about: str
    stacks: Mapping[str, str]
    rules: Callable[..., list[rules.Rule]]
    net: Callable[[Any, Arrays, Heads], Net]
    unused: Sequence[str] = ()
    optional: tuple[str, ...] = ()
    tidy: Callable[[Tensors], Tensors] = dict
    untidy: Callable[[Tensors], Tensors] = dict
    proof: Proof | None = None
    step: Step | None = None


def published_heads(stack: str, width: int) -> int:
    """The number of heads of the published net of that width, 0 if there is none. CLIP's text
    towers have heads of width 64 at any width."""
    return width // HEAD if stack == "text-heads" else KNOWN.get(width, 0)


def heads_of_64(stack: str, width: int) -> int:
    """Heads of width 64, as in every published size of SimVTP, and of VideoMAE up to L; 0 if 64
    does not divide the width."""
    return 0 if width % HEAD else width // HEAD


def heads_of(
    form: Format,
    tensors: Tensors,
    given: Mapping[str, int | None],
    usual: Callable[[str, int], int] = published_heads,
) -> dict[str, int]:
    """The number of heads of each stack, which tensors do not show: as given, or else from `usual`.

    Raises UserError if a stack is missing, or if the heads do not divide its width.
    """
    found = {}
    for name, norm in form.stacks.items():
        if norm not in tensors:
            raise UserError(f"the tensor '{norm}' is missing: the file is of another format")
        width = tensors[norm].size
        heads = given.get(name) or usual(name, width)
        if not heads or width % heads:
            raise UserError(
                f"'{norm}' is {width} wide: no published net has that width with {heads} heads; "
                f"use --{name} N"
            )
        found[name] = heads
    return found


def table(form: Format, heads: Heads, present: Set[str]) -> list[rules.Rule]:
    """The rules of a net with these heads. Those of an optional part are included if `present` has
    any of its tensors or parameters, so that an incomplete part is an error."""
    every = form.rules(*heads.values())
    lacking = tuple(
        prefix
        for prefix in form.optional
        if not any(
            present & {rule.param, *rule.names()} for rule in every if rule.param.startswith(prefix)
        )
    )
    return [rule for rule in every if not rule.param.startswith(lacking)]


def below(form: Format, tensors: Tensors, prefix: str | None = None) -> tuple[Tensors, str]:
    """The tensors of a net that is a part of what the file holds, such as Lightning's `model.`,
    without their prefix, and the prefix: "" if the net is not a part.

    Wrappers of parts of a net (DistributedDataParallel's `module`, torch.compile's `_orig_mod`) are
    removed first. prefix: as given by the user; by default, the one below which the net's norms
    are. Raises UserError if there are several, or none with the given prefix.
    """
    plain = {re.sub(r"(?<=\.)(module|_orig_mod)\.", "", n): n for n in tensors}
    tensors = (
        {name: tensors[n] for name, n in plain.items()} if len(plain) == len(tensors) else tensors
    )
    norm = next(iter(form.stacks.values()), None)
    if prefix is None:
        ends = [n.removesuffix(norm) for n in tensors if n.endswith(norm)] if norm else []
        found = [one for one in ends if WRAPS.fullmatch(one)]
        if len(found) > 1 and "" not in found:
            shown = ", ".join(f"'{one}'" for one in found)
            raise UserError(
                f"the file holds {len(found)} such nets, below {shown}; choose: --prefix"
            )
        prefix = "" if not found or "" in found else found[0]
    part = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    if not part:
        raise UserError(f"no name begins with '{prefix}'; the first is '{next(iter(tensors), '')}'")
    return part, prefix


def sort_out(form: Format, tensors: Tensors) -> tuple[dict[str, Any], list[str]]:
    """The net's tensors under the names that `rules` use, and the names of all others."""
    tidy = form.tidy(tensors)
    kept = {n: x for n, x in tidy.items() if not any(re.fullmatch(u, n) for u in form.unused)}
    used, known = {id(x) for x in kept.values()}, form.untidy(kept)
    return kept, [n for n, x in tensors.items() if id(x) not in used and n not in known]


def fit(form: Format, params: Params, inputs: Arrays, heads: Heads) -> Net:
    """The net of parameters in fp64.

    Raises UserError, with all of their names, if shapes of tensors are inconsistent.
    """
    try:
        net = form.net(params, inputs, heads)
        wanted = tree.flatten(jax.eval_shape(net.init, jax.random.key(0)))
    except UserError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, FlaxError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"the tensors do not form a net: {text}") from error
    given = tree.flatten(params)
    wrong = [n for n, x in given.items() if n in wanted and wanted[n].shape != x.shape]
    if wrong:
        text = (f"{n} is {given[n].shape}, not {wanted[n].shape}" for n in wrong)
        raise UserError(f"wrong shapes ({len(wrong)}): {'; '.join(text)}")
    return net


def check(form: Format, params: Params, tensors: Tensors, heads: Heads) -> dict[str, float]:
    """{output: largest difference between the net and the reference, in units of its RMS}, fp64.

    Raises UserError as `fit` does.
    """
    assert form.proof is not None, "a format without a reference"
    inputs = form.proof.draw(tensors, np.random.default_rng(0))
    with jax.enable_x64(True):
        wide = fp64(params)
        found = jax.device_get(jax.jit(fit(form, wide, inputs, heads).run)(wide))
    expected = form.proof.reference(tensors, inputs, heads)
    return {name: difference(x, expected[name]) for name, x in found.items()}


def difference(found: Num[np.ndarray, "..."], expected: Num[np.ndarray, "..."]) -> float:
    """The largest difference in units of the expected array's root mean square; inf if there is a
    NaN or if shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    if not found.size:
        return 0.0
    scale = float(np.sqrt(np.mean(np.float64(expected) ** 2))) or 1.0
    worst = float(np.max(np.abs(found - expected))) / scale
    return worst if math.isfinite(worst) else math.inf


def fp64(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), dict(params))


# A step of training.


class Case(NamedTuple):
    """Official weights and inputs after conversion: the net, its parameters and their rules."""

    net: Net
    params: Params
    rules: list[rules.Rule]


def prepare(
    form: Format, tensors: Tensors, inputs: Arrays, heads: Mapping[str, int | None]
) -> Case:
    """The case of official tensors and inputs. Raises UserError if they do not fit together. Call
    under `enable_x64`."""
    assert form.step is not None, "a format without a step"
    nets.need(inputs, form.step.inputs)
    kept, _ = sort_out(form, tensors)
    found = heads_of(form, kept, heads, heads_of_64)
    names = table(form, found, kept.keys())
    params = fp64(rules.to_params(names, kept))
    return Case(fit(form, params, inputs, found), params, names)


def differentiate(net: Net, params: Params) -> tuple[Any, Mapping[str, Any], Params]:
    """The loss, the outputs, and the gradient of all parameters, compiled as one program."""
    assert net.step is not None
    (loss, found), gradient = jax.jit(jax.value_and_grad(net.step, has_aux=True))(params)
    return loss, found, jax.device_get(gradient)


def official(form: Format, names: list[rules.Rule], gradient: Params) -> dict[str, Any]:
    """A gradient under official names, without the parameters that the official code does not
    train."""
    frozen = form.step.frozen if form.step else ""
    found = form.untidy(rules.to_tensors(names, gradient))
    return {name: x for name, x in found.items() if not re.fullmatch(frozen, name)}


def run_step(
    form: Format,
    tensors: Tensors,
    inputs: Arrays,
    *,
    heads: Mapping[str, int | None] | None = None,
    grads: bool = False,
) -> dict[str, np.ndarray]:
    """One training step as in the official code, in fp64: its outputs, `loss` and its terms, and
    with `grads` grad/<official name>. heads: by stack, where heads are not 64 wide.

    Raises UserError if tensors and inputs do not fit together.
    """
    with jax.enable_x64(True):
        net, params, names = prepare(form, tensors, inputs, heads or {})
        assert net.step is not None and form.step is not None
        gradient: dict[str, Any] = {}
        if grads:
            loss, found, raw = differentiate(net, params)
            idle = {n: np.zeros(x.shape) for n, x in tensors.items() if idles(form.step, n)}
            gradient = {f"grad/{n}": x for n, x in {**official(form, names, raw), **idle}.items()}
        else:
            loss, found = jax.jit(net.step)(params)
        found = dict(found)
        if after := jax.device_get(found.pop("after", None)):
            present = tree.flatten(after).keys()
            moved = rules.to_tensors([r for r in names if r.param in present], after)
            found.update({f"after/{n}": x for n, x in moved.items()})
        return {n: np.asarray(x) for n, x in {**found, "loss": loss, **gradient}.items()}


def idles(step: Step, name: str) -> bool:
    return re.fullmatch(step.idle, name) is not None
