"""AdamW with rates, decay and freezing by rules on parameter names.

The update is torch.optim.AdamW's, in fp32: decoupled decay (Loshchilov and Hutter 2019, arXiv
1711.05101) scaled by the leaf's rate, eps outside the square root, bias correction of both moments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from vtp_jax import tree
from vtp_jax.types import Params, UserError, wide

T = TypeVar("T")
Rules = Sequence[Sequence[Any]]  # [(regex, dict(lr=, wd=, frozen=))], lists where JSON made them


@dataclasses.dataclass(frozen=True)
class Setting:
    """How one parameter is trained.

    lr: factor on the rate; a list has one per layer of stacked blocks (axis 0)
    wd: factor on the weight decay
    frozen: never changes; no gradient is computed, no moments are kept, and no norm includes it. A
        list has one per layer of stacked blocks; norms exclude its frozen layers too, but the loop
        over all layers computes their gradients, and their moments are kept as zeros
    """

    lr: float | Sequence[float] = 1.0
    wd: float = 1.0
    frozen: bool | Sequence[bool] = False

    @property
    def whole(self) -> bool:
        """Whether the whole parameter is frozen."""
        return bool(np.all(self.frozen))


class Updated(NamedTuple):
    """params: the new trainable ones; info: fp32 scalars lr, grad_norm, update_norm, param_norm."""

    params: Params
    opt: PyTree
    info: Mapping[str, Float[Array, ""]]


class Optim(NamedTuple):
    """split:  params -> (trainable, frozen); tree.merge undoes it
    init:   trainable -> opt
    update: (grads, opt, trainable, step) -> Updated
    """

    split: Callable[[Params], tuple[Params, Params]]
    init: Callable[[Params], PyTree]
    update: Callable[[Params, PyTree, Params, Int[Array, ""]], Updated]


def settings(rules: Rules, shapes: Any) -> Any:
    """The tree with the `Setting` of each parameter, by the rules `(regex, dict(lr=, wd=,
    frozen=))`. Raises UserError on unknown keys, on a list that does not fit axis 0, and, as
    tree.match does, on uncovered parameters and idle rules."""
    known = [f.name for f in dataclasses.fields(Setting)]
    for regex, values in rules:
        if unknown := sorted(set(values) - set(known)):
            raise UserError(
                f"optim rule '{regex}': unknown key '{unknown[0]}'; known: {', '.join(known)}"
            )
    chosen = tree.match([(r, Setting(**v)) for r, v in rules], shapes, "optim rules")
    for name, setting in tree.flatten(chosen).items():
        shape = tree.flatten(shapes)[name].shape
        for what, values in (("rates", setting.lr), ("frozen", setting.frozen)):
            if np.ndim(values) and shape[:1] != np.shape(values):
                raise UserError(
                    f"optim rules: {len(values)} {what} for '{name}' {shape}; "
                    f"a list of {what} needs one per layer along axis 0"
                )
    return chosen


def make(
    shapes: Any,
    *,
    rules: Rules,
    lr: Callable[[Int[Array, ""]], Float[Array, ""]],
    weight_decay: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    clip: float | None = None,
) -> Optim:
    """AdamW for parameters of these shapes.

    `lr` is a schedule, evaluated at the step given to `update`, so that a skipped step does not
    shift it; the moments count their own updates. `clip` bounds the global norm of the gradients as
    torch.nn.utils.clip_grad_norm_ does. Moments have the parameters' dtype, at least fp32.
    """
    flat = tree.flatten(settings(rules, shapes))
    if all(s.whole for s in flat.values()):
        raise UserError("optim rules: every parameter is frozen, there is nothing to train")
    adam = optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps)

    def split(params: Params) -> tuple[Params, Params]:
        return tree.split(params, lambda name: not flat[name].whole)

    def live(name: str, p: Array) -> Any:
        """1 for layers that are trained, 0 for those that are frozen."""
        return 1.0 - _per_layer(flat[name].frozen, p)

    def thaw(name: str, x: Array) -> Array:
        """x with zeros in its frozen layers."""
        return jnp.where(live(name, x) > 0, x, 0) if np.any(flat[name].frozen) else x

    def init(params: Params) -> PyTree:
        return adam.init(_wide(params))

    def update(grads: Params, opt: PyTree, params: Params, step: Int[Array, ""]) -> Updated:
        grads, rate = tree.map_named(thaw, _wide(grads)), lr(step)
        grad_norm = norm(grads)
        if clip is not None:
            scale = jnp.minimum(1.0, clip / (grad_norm + 1e-6))
            grads = jax.tree.map(lambda g: g * scale, grads)
        directions, opt = adam.update(grads, opt)

        def change(name: str, p: Array, d: Array) -> Array:
            setting = flat[name]
            factor = jnp.asarray(_per_layer(setting.lr, p) * live(name, p), d.dtype)
            return -rate * factor * (d + weight_decay * setting.wd * p)

        changes = tree.map_named(change, _wide(params), directions)
        info = dict(
            lr=rate,
            grad_norm=grad_norm,
            update_norm=norm(changes),
            param_norm=norm(tree.map_named(thaw, params)),
        )
        new = jax.tree.map(lambda p, c: (p + c).astype(p.dtype), params, changes)
        return Updated(new, opt, {k: jnp.asarray(v, jnp.float32) for k, v in info.items()})

    return Optim(split, init, update)


def norm(values: PyTree) -> Float[Array, ""]:
    """The Euclidean norm over all leaves of a tree, in fp32 or wider."""
    return optax.tree.norm(_wide(values))


def finite(*numbers: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether all are finite. A step is taken only if finite(loss, grad_norm)."""
    return jnp.isfinite(jnp.stack([n.astype(jnp.float32) for n in numbers])).all()


def keep(good: Bool[Array, ""], new: T, old: T) -> T:
    """`new` where the step was good, else `old`, leaf by leaf."""
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)


def _per_layer(values: bool | float | Sequence[bool] | Sequence[float], p: Array) -> np.ndarray:
    """A number, or one for each layer, in a shape that broadcasts against a parameter."""
    array = np.asarray(values, np.float64)
    return array.reshape(array.shape + (1,) * (p.ndim - array.ndim))


def _wide(values: Any) -> Any:
    return jax.tree.map(wide, values)
