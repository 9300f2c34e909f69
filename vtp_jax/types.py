"""The contract of the project: plain data and functions. See docs/architecture.md.

The types that the folders share: the pipeline produces a `Batch`, a method is a `Method` (a bundle
of pure functions), a loss in `objectives` returns a `Mean`, an evaluator is an `Evaluator`. Nothing
here depends on a model, a mesh or a file.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import UnionType
from typing import (
    Any,
    NamedTuple,
    ParamSpec,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, PyTree

P = ParamSpec("P")


class UserError(ValueError):
    """A user's mistake. The message is one line: what is wrong, where, and what to do.

    Entries print it without a traceback and exit with status 2 (`cli.run`).
    """


class Key(NamedTuple):
    """One entry of `KEYS`: dtype and axes of a batch key; axes in brackets may be absent."""

    dtype: str
    axes: str
    about: str


KEYS: Mapping[str, Key] = {
    "valid": Key("bool", "b", "False: the row is padding or its video could not be read"),
    "video": Key("uint8", "b [v] t h w c", "RGB frames; v: several views of one video"),
    "text": Key("int32", "b [k] l", "token ids; k: several captions of one video"),
    "text_mask": Key("bool", "b [k] l", "True where `text` is a real token"),
    "maskable": Key("bool", "b [k] l", "True where word masking may hide a token"),
    "label": Key("int32", "b", "class"),
    "id": Key("int32", "b", "position in the source's list; evaluators join on it"),
}

Batch = Mapping[str, Any]  # arrays; rows `b` lead each; keys as in KEYS
Spec = Mapping[str, jax.ShapeDtypeStruct]  # shapes and dtypes of a global training batch
Encoded = Mapping[str, Any]  # arrays or trees of them; rows `b` lead every leaf
Params = Mapping[str, Any]
Extra = Mapping[str, Any]


def wide(x: Num[Array, "*s"]) -> Float[Array, "*s"]:
    """x in fp32, or in its own dtype if that is wider. Statistics, losses and averages are computed
    in this precision, whatever the dtype of activations."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class TokenMask(NamedTuple):
    """The tokens that a network sees. Counts are static: k kept, d dropped, k + d = n."""

    keep: Int[Array, "b k"]  # ascending indices of visible tokens
    drop: Int[Array, "b d"]  # ascending indices of hidden tokens
    dropped: Bool[Array, "b n"]


class Mean(NamedTuple):
    """A mean kept as total and count: `+` merges two, `.value()` divides.

    Both fields are fp32 (or wider) scalars, or share a leading shape.
    """

    total: Float[Array, "*s"]
    count: Float[Array, "*s"]

    @classmethod
    def of(cls, values: Float[Array, "*n"], where: Bool[Array, "*n"] | None = None) -> Mean:
        """The mean of `values` over the entries where `where` is True; the others do not count,
        whatever they contain."""
        values = wide(values)
        if where is None:
            where = jnp.ones(values.shape, bool)
        return cls(jnp.sum(jnp.where(where, values, 0)), jnp.sum(where, dtype=values.dtype))

    def __add__(self, other: Any) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> Float[Array, "*s"]:
        """total / count; 0 where the count is 0."""
        return self.total / jnp.maximum(self.count, 1)


class Out(NamedTuple):
    """The auxiliary outputs of a loss: metrics, and the method's new `extra`."""

    metrics: Mapping[str, Mean]
    extra: Extra


class State(NamedTuple):
    """The state of training, carried from step to step and saved in checkpoints."""

    step: Int[Array, ""]
    params: Params
    opt: PyTree
    extra: Extra


def is_teacher(name: str) -> bool:
    """Whether a leaf of the state with this name (`tree.flatten`) belongs to a teacher, that is, is
    below a key `teacher` of `extra`. No step changes teachers, and if a warm start loaded a
    teacher, checkpoints hold only the path and the hash of its source."""
    field, *keys = name.split("/")[:-1] or [""]
    return field == "extra" and "teacher" in keys


class Loss(Protocol):
    def __call__(
        self, params: Params, extra: Extra, batch: Batch, rng: Array, step: Array
    ) -> tuple[Array, Out]: ...


class Encode(Protocol):
    def __call__(
        self, params: Params, extra: Extra, batch: Batch, rng: Array | None = None
    ) -> Encoded: ...


def no_extra(rng: Array, spec: Spec, params: Params) -> Extra:
    """`Method.start` of a method without state beyond its parameters."""
    return {}


def unchanged(params: Params, extra: Extra, step: Array) -> tuple[Params, Extra]:
    """`Method.after_update` of a method that changes nothing after an update."""
    return params, extra


class Method(NamedTuple):
    """A published method as pure functions: the only interface between methods and the loop.

    init:         (rng, spec) -> params: all parameters, of all verbs
    loss:         (params, extra, batch, rng, step) -> (scalar, Out)
    encode:       name -> (params, extra, batch, rng=None) -> Encoded. `video` and `text` return
                  `embedding` f32 "b d" (not normalised), `tokens` "b n d" with `mask` "b n",
                  `raw` "b n d" (the last block's output, before the backbone's last norm) and
                  `memory` (for other functions of this method's encode only, such as `pair`).
                  `pair` takes two Encoded instead of a batch and returns `score` f32 "b", and
                  `embedding` f32 "b d" if tasks can be trained on it (tasks/answer.py)
    start:        (rng, spec, params) -> extra; called after a warm start
    after_update: (params, extra, step) -> (params, extra)
    """

    init: Callable[[Array, Spec], Params]
    loss: Loss
    encode: Mapping[str, Callable[..., Encoded]]
    start: Callable[[Array, Spec, Params], Extra] = no_extra
    after_update: Callable[[Params, Extra, Array], tuple[Params, Extra]] = unchanged


def assemble(
    net: Any,
    recipe: Any,
    *,
    init: Callable[..., Params],
    loss: Callable[..., tuple[Array, Out]],
    encode: Mapping[str, Callable[..., Encoded]],
    start: Callable[..., Extra] | None = None,
    after_update: Callable[..., tuple[Params, Extra]] | None = None,
) -> Method:
    """The `Method` of functions (net, recipe, ...) that take a net and its recipe before the
    arguments that `Method` lists. `start` and `after_update` default as in `Method`."""

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, net, recipe)

    return Method(
        init=bound(init),
        loss=bound(loss),
        encode={name: bound(verb) for name, verb in encode.items()},
        start=no_extra if start is None else bound(start),
        after_update=unchanged if after_update is None else bound(after_update),
    )


def made_of(
    build: Callable[P, tuple[Any, Any]],
) -> Callable[[Callable[..., Method]], Callable[P, Method]]:
    """Decorator for a method file's `make(**cfg)`, which passes its arguments to `build`. It gives
    `make` the docstring of `build` and its signature, which configs are checked against.

        @made_of(build)
        def make(**cfg: Any) -> Method:
            return assemble(*build(**cfg), init=init, loss=loss, encode=dict(video=encode_video))
    """

    def decorate(make: Callable[..., Method]) -> Callable[P, Method]:
        return functools.wraps(build, assigned=("__doc__",))(make)

    return decorate


class Stream(NamedTuple):
    """A finite sequence of batches for evaluation, the same in every pass.

    batches: () -> the batches, all of one structure, the last one padded with `valid=False` rows
    rows:    the number of real rows
    table:   columns on the host, indexed by `id`, such as captions and paths: table["caption"][id]
    spec:    shapes and dtypes of a global batch; None if only a batch tells them
    """

    batches: Callable[[], Iterator[Batch]]
    rows: int
    table: Mapping[str, Any]
    spec: Spec | None = None


def no_counts(step: int) -> Mapping[str, int]:
    """`Data.counts` where nothing can fail."""
    return {}


class Data(NamedTuple):
    """The data of a run, as the entries use it.

    spec:    shapes and dtypes of a global training batch
    batches: first step -> endless training batches (this process's rows, numpy)
    rows:    rows of one training epoch
    streams: evaluation streams by name
    facts:   facts about the data that methods need: vocab_size, pad_id, mask_id (tokens, if there
             are captions), mean and std (pixels, RGB in [0, 1]), labels (the number of classes)
    decode:  token ids -> readable words
    counts:  step -> rows read, and rows that failed by cause, in the batches from the first step
             given to `batches` up to but excluding `step`, which must not decrease between calls
    keep:    files by name, which a run keeps in its folder to need no training set later
             (data/kept.py)
    labels:  names of the classes, in their order; empty if unknown
    """

    spec: Spec
    batches: Callable[[int], Iterator[Batch]]
    rows: int
    streams: Mapping[str, Stream]
    facts: Mapping[str, Any]
    decode: Callable[[Any], list[str]]
    counts: Callable[[int], Mapping[str, int]] = no_counts
    keep: Mapping[str, bytes] = {}
    labels: tuple[str, ...] = ()


class Evaluator(NamedTuple):
    """run: state -> (name, number) pairs; protocol: a description of how they are computed."""

    run: Callable[[State], Iterator[tuple[str, float]]]
    protocol: str


def check_batch(batch: Batch | Spec, where: str = "batch") -> None:
    """Raises UserError unless every key is known and has the dtype and axes that KEYS defines."""
    if "valid" not in batch:
        raise UserError(f"{where} has no key 'valid'; every batch needs one (types.KEYS)")
    rows = batch["valid"].shape[0]
    for name, array in batch.items():
        key = KEYS.get(name)
        if key is None:
            raise UserError(f"{where} has an unknown key '{name}'; add it to types.KEYS")
        axes = key.axes.split()
        required = [a for a in axes if not a.startswith("[")]
        good_rank = len(required) <= len(array.shape) <= len(axes)
        # Pixels may come as floats in [0, 1] (parity runs); everything else is exact.
        good_dtype = np.dtype(array.dtype) == np.dtype(key.dtype) or (
            key.dtype == "uint8" and jnp.issubdtype(array.dtype, jnp.floating)
        )
        if not (good_rank and good_dtype and array.shape[0] == rows):
            raise UserError(
                f"{where}['{name}'] is {array.dtype}{tuple(array.shape)}; "
                f"it must be {key.dtype} '{key.axes}' with {rows} rows"
            )


# Values that people write in configs.

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "None",
    Mapping: "a dict",
    Sequence: "a list",
}


def check_values(function: Callable[..., Any], where: str, given: Mapping[str, Any]) -> None:
    """Raises UserError unless the values fit the annotations of a function or class. Annotations
    of other types than those of WORDS, alone, in unions or in lists, are not checked."""
    function = inspect.unwrap(function)
    holder = function
    if inspect.isclass(function) and not hasattr(function, "_fields"):
        holder = function.__init__
    try:
        hints = get_type_hints(holder)
    except (NameError, TypeError):  # of names that exist only for type checkers
        return
    for name, value in given.items():
        if name in hints and not fits(value, hints[name]):
            raise UserError(f"{where}.{name}={value!r:.60}: it must be {in_words(hints[name])}")


def at_least(where: str, least: int, **given: int | float | None) -> None:
    """Raises UserError unless each number that is given is `least` or more."""
    for name, value in given.items():
        if value is not None and not value >= least:
            raise UserError(f"{where}.{name}={value}: it must be {least} or more")


def kind_of(hint: Any) -> Any:
    """The key of WORDS for an annotation; None if there is none."""
    origin = get_origin(hint) or hint
    if inspect.isclass(origin) and origin not in WORDS:
        if origin in (list, tuple):
            return Sequence
        return Mapping if origin is dict else None
    return origin if origin in WORDS else None


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that an annotation names, or the annotation names another."""
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, one) for one in get_args(hint))
    kind, inner = kind_of(hint), get_args(hint)
    if kind is None or hasattr(value, "dtype"):  # arrays and their scalars
        return True
    if kind is Sequence:
        deeper = inner[:1] if len(inner) == 1 or inner[1:] == (...,) else ()
        return isinstance(value, (list, tuple)) and all(fits(v, d) for v in value for d in deeper)
    if kind is Mapping:
        deeper = [d for d in inner[1:] if kind_of(d) or get_args(d)]  # streams open when looked at
        return isinstance(value, Mapping) and all(
            fits(v, d) for d in deeper for v in value.values()
        )
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def in_words(hint: Any) -> str:
    """An annotation for people."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return " or ".join(dict.fromkeys(WORDS.get(kind_of(part), "another value") for part in parts))
