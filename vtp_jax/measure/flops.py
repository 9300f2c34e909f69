"""Counts the multiplications of a function's matrix products, from its jaxpr: nothing is compiled.

XLA's own count includes the body of a scan once, whatever its length, and differs between backends.
This count follows scans, rematerialised and differentiated parts, and is what papers report as
FLOPs (VideoMAE V2, Table 1: multiply-accumulates of products, no softmax, norm or activation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from vtp_jax.run import sharding
from vtp_jax.types import Method, Params, Spec


def macs(f: Callable[..., Any], *args: Any) -> int:
    """Multiply-accumulates of all products and convolutions that `f(*args)` computes.

    args: arrays or ShapeDtypeStructs. FLOPs are twice this number. A `cond` counts as its most
    expensive branch; a `while`, whose length is unknown, as one run of its body.
    """
    return _count(jax.make_jaxpr(f)(*args).jaxpr)


def forward(method: Method, params: Params, extra: Any, spec: Spec) -> int:
    """FLOPs of the products in the forward pass of a loss, counted from its program for one CPU,
    because fused kernels of other platforms hide their products. params, extra: arrays or
    ShapeDtypeStructs."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, extra))
    with sharding.activate(sharding.make_mesh(devices=jax.devices("cpu")[:1])):
        key = jax.eval_shape(lambda: jax.random.key(0))
        step = jax.ShapeDtypeStruct((), jnp.int32)
        return 2 * macs(method.loss, *shapes, dict(spec), key, step)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_of(eqn) for eqn in jaxpr.eqns)


def _of(eqn: core.JaxprEqn) -> int:
    name, out = eqn.primitive.name, _shape(eqn.outvars[0]) if eqn.outvars else ()
    if name == "dot_general":
        (summed, _), _ = eqn.params["dimension_numbers"]
        left = _shape(eqn.invars[0])
        return math.prod(out) * math.prod(left[i] for i in summed)
    if name == "conv_general_dilated":
        kernel, numbers = _shape(eqn.invars[1]), eqn.params["dimension_numbers"]
        return math.prod(out) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    inner = [_count(j) for j in _jaxprs(eqn.params)]
    if name == "cond":
        return max(inner)
    return eqn.params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The jaxprs that an equation calls; of a custom derivative, only the function itself."""
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, core.ClosedJaxpr):
                yield x.jaxpr
            elif isinstance(x, core.Jaxpr):
                yield x


def _shape(x: Any) -> tuple[int, ...]:
    return getattr(x.aval, "shape", ())
