"""What every method obeys, stated over a `Case`; tests/methods/test_laws.py checks all cases.

A case is a net of width 16 and one layer, two with drop path, on eight rows. Most laws use one of
three programs of a method: a step of training on one device, its loss on eight, and its encoders.
The others only trace, but for padding (the text encoder at one more length).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from tests.arrays import fill
from vtp_jax import tree
from vtp_jax.run import sharding
from vtp_jax.setup import config
from vtp_jax.types import Batch, Extra, Method, Out, Params, Spec, State

ROWS = 8
STEP = 1  # not 0, at which schedules may hide what they multiply
RATE = 0.1
SIZE = (16, 1, 2, 32)  # of an encoder, of a decoder, of a text net
DEEP = (16, 2, 2, 32)  # of an encoder with drop path, whose rate in the first of its blocks is 0
# Word ids passed to methods whose arguments have these names.
WORDS = dict(vocab_size=30, pad_id=0, cls_id=1, sep_id=2, mask_id=3)
FIRST_WORD, LENGTH = 5, 8
ENCODERS = ("video", "text", "pair")  # verbs that return an embedding of each row


class Tasks(NamedTuple):
    """What tasks do with a method, for tests/tasks/test_every_base.py and docs/methods.md. The
    names are regexes of the method's parameters.

    retrieve, classify: values of `config.task.pool` that work; answer: values of
               `config.task.fuse`. Any other value is rejected with a one-line error
    never:     parameters that `classify` never reads, for `config.task.drop`
    mean_norm: those that it does not read with pool="mean_norm" either
    computed:  those that it does not read either, but must keep: the encoder computes with them
    """

    retrieve: tuple[str, ...] = ()
    classify: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    mean_norm: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()


class Case(NamedTuple):
    """A method as the laws see it.

    make:    the method's `make`
    config:  a config of configs/, whose rules say how parameters are split over devices
    cfg:     arguments of `make` that make it small; dropout and masks on
    video:   shape of a row's clip: "t h w", or "v t h w" for several
    views:   whether several clips of a row are views, of which encoders are given the first
    text:    whether a row has a text; texts: the number of its texts, if not one
    label:   whether a row has a class (of three)
    random:  whether the loss draws anything
    always:  losses that are computed at weight 0 too
    grouped: losses of which each group of rows has its own, where `cfg` asks for groups
    given:   parameters that must not be drawn about 0, such as a temperature
    decays_biases: whether weight decay is on biases and norms too, since the reference's is
    tasks:   what tasks do with it; None if another case of the method has it
    """

    make: Callable[..., Method]
    config: str
    cfg: Mapping[str, Any]
    video: tuple[int, ...] = (4, 16, 16)
    views: bool = False
    text: bool = False
    texts: int = 1
    label: bool = False
    random: bool = True
    always: tuple[str, ...] = ()
    grouped: tuple[str, ...] = ()
    given: Mapping[str, float] = {}
    decays_biases: bool = False
    tasks: Tasks | None = None

    @property
    def method(self) -> str:
        """The name of the method, and of its file."""
        return self.make.__module__.rpartition(".")[2]

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """What `make`, or the method's `build`, is given."""
        known = inspect.signature(self.make).parameters
        words = {k: v for k, v in WORDS.items() if k in known} if self.text else {}
        return {**words, "dtype": "float32", **self.cfg, **changes}

    def build(self, **changes: Any) -> Method:
        return self.make(**self.arguments(**changes))

    def rates(self) -> list[str]:
        """The arguments that are rates of dropping: those whose names contain "drop"."""
        return [name for name in inspect.signature(self.make).parameters if "drop" in name]

    def dropping(self, *without: str) -> Method:
        """A variant in which every rate is 0.3, or 0 for those in `without`."""
        return self.build(**{name: 0.0 if name in without else 0.3 for name in self.rates()})

    def batch(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Eight valid rows. Texts have from 2 to LENGTH - 1 words: padding follows each."""
        rng = np.random.default_rng(seed)
        found = dict(
            video=rng.integers(0, 256, (ROWS, *self.video, 3), np.uint8),
            valid=np.ones(ROWS, bool),
            id=np.arange(ROWS, dtype=np.int32) + ROWS * seed,
        )
        if self.text:
            shape = (ROWS, LENGTH) if self.texts == 1 else (ROWS, self.texts, LENGTH)
            last = rng.integers(2, LENGTH - 1, shape[:-1])[..., None]
            place = np.arange(LENGTH)
            text = rng.integers(FIRST_WORD, WORDS["vocab_size"], shape)
            text = np.where(place == 0, WORDS["cls_id"], text)
            text = np.where(place == last, WORDS["sep_id"], text)
            found |= dict(
                text=np.where(place > last, WORDS["pad_id"], text).astype(np.int32),
                text_mask=place <= last,
                maskable=(place > 0) & (place < last),
            )
        if self.label:
            found["label"] = rng.integers(0, 3, ROWS, np.int32)
        return found


class Stepped(NamedTuple):
    """A step of training, with plain gradient descent, and all that it computes."""

    value: Any
    out: Out  # of the loss
    grads: Params
    params: Params
    extra: Extra  # after the update

    def losses(self) -> dict[str, float]:
        means = {name: float(mean.value()) for name, mean in self.out.metrics.items()}
        return {k.removeprefix("loss_"): x for k, x in means.items() if k.startswith("loss_")}


class Made:
    """A case's method, its state, and its programs, each compiled once, when a law asks for it."""

    def __init__(self, case: Case):
        self.case, self.method = case, case.build()
        self.spec = shapes(case.batch())
        self.verbs = [name for name in ENCODERS if name in self.method.encode]
        self.key = jax.random.key(0)
        drawn = fill(lambda key: self.method.init(key, self.spec), self.key)
        given = {name: np.float32(x) for name, x in case.given.items()}
        self.params = jax.tree.map(jnp.asarray, tree.replace(drawn, given))

    def step(
        self, batch: Batch, params: Params | None = None, extra: Extra | None = None,
        seed: int = 0, step: int = STEP,
    ) -> Stepped:  # fmt: skip
        """A step on one device; from a state that has taken one, unless another is given."""
        params = self.params if params is None else params
        extra = self.extra if extra is None else extra
        return self.one(params, extra, batch, jax.random.key(seed), jnp.int32(step))

    def run(self, params: Params, extra: Extra, batch: Batch, rng: Any, step: Any) -> Stepped:
        graded = jax.value_and_grad(self.method.loss, has_aux=True)
        (value, out), grads = graded(params, extra, batch, rng, step)
        moved = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        params, extra = self.method.after_update(moved, out.extra, step)
        return Stepped(value, out, grads, params, extra)

    @functools.cached_property
    def one(self) -> Callable[..., Stepped]:
        return jax.jit(self.run)

    @functools.cached_property
    def extra(self) -> Extra:
        """After a step, so that queues hold something and averages are not what they average."""
        begin = jax.jit(lambda params: self.method.start(self.key, self.spec, params))
        return self.step(self.case.batch(seed=9), extra=begin(self.params)).extra

    @functools.cached_property
    def outline(self) -> Extra:
        """The shapes of `extra`, for laws that compile nothing."""
        return jax.eval_shape(lambda p: self.method.start(self.key, self.spec, p), self.params)

    @functools.cached_property
    def encoders(self) -> Callable[..., Mapping[str, Any]]:
        """(params, extra, batch) -> what the verbs return, as one program."""

        def run(params: Params, extra: Extra, batch: Batch) -> Mapping[str, Any]:
            found: dict[str, Any] = {}
            for name in self.verbs:
                given = (found["video"], found["text"]) if name == "pair" else (batch,)
                found[name] = self.method.encode[name](params, extra, *given)
            return found

        return jax.jit(run)

    def encode(self, batch: Batch) -> Mapping[str, Any]:
        return self.encoders(self.params, self.extra, self.one_view(batch))

    def one_view(self, batch: Batch) -> Batch:
        """The batch as encoders take it: with one view."""
        return {**batch, "video": batch["video"][:, 0]} if self.case.views else batch

    def on(self, mesh: jax.sharding.Mesh, f: Callable[..., Any]) -> tuple[Any, Params]:
        """What the method's loss, or `run`, returns of the default batch on a mesh; and the
        parameters as they are placed there."""
        rules = config.load(self.case.config).sharding
        state = State(jnp.int32(STEP), self.params, {}, self.extra)
        placed = sharding.state_shardings(state, mesh, rules, note=lambda text: None)
        with sharding.activate(mesh):
            state = jax.device_put(state, placed)
            batch = sharding.put(self.case.batch(), mesh)
            found = jax.jit(f)(state.params, state.extra, batch, self.key, jnp.int32(STEP))
        return found, state.params

    @functools.cached_property
    def encoded(self) -> Mapping[str, Any]:
        """The shapes of what the verbs return."""
        return jax.eval_shape(self.encoders, *self.encoder_args())

    def encoder_args(self) -> tuple[Params, Extra, Batch]:
        """What encoders are traced with."""
        return self.params, self.outline, self.one_view(self.case.batch())

    def loss_args(self) -> tuple[Params, Extra, Spec, Any, Any]:
        """What losses are traced with. Variants of the method have the same parameters."""
        return self.params, self.outline, self.spec, self.key, jnp.int32(STEP)

    def metrics(self, method: Method) -> Any:
        """The metrics of a variant's loss."""
        return jax.eval_shape(method.loss, *self.loss_args())[1].metrics

    def training(self, method: Method) -> str:
        """The program of a variant's loss."""
        return program(lambda *args: method.loss(*args)[0], *self.loss_args())

    def verb(self, method: Method, name: str, helped: bool = False) -> str:
        """The program of a variant's encoder that is given a key; helped: whose net gets one even
        if the encoder does not pass it on."""
        bind, rngs = nn.Module.bind, {"dropout": jax.random.key(1)}

        def always(net: nn.Module, *args: Any, **more: Any) -> nn.Module:
            return bind(net, *args, **{**more, "rngs": rngs})

        *state, batch = self.encoder_args()
        given = (self.encoded["video"], self.encoded["text"]) if name == "pair" else (batch,)
        with mock.patch.object(nn.Module, "bind", always if helped else bind):
            return program(lambda *args: method.encode[name](*args), *state, *given, self.key)


def shapes(batch: Batch) -> dict[str, jax.ShapeDtypeStruct]:
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}


def mixed(where: np.ndarray, batch: Batch, other: Batch) -> dict[str, np.ndarray]:
    """Rows of `batch` where `where`, else of `other`."""
    row = {k: where.reshape(-1, *[1] * (v.ndim - 1)) for k, v in batch.items()}
    return {k: np.where(row[k], batch[k], other[k]) for k in batch}


def program(f: Callable[..., Any], *args: Any) -> str:
    """The text of a function's program, without what its result does not depend on."""
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return re.sub(r"0x[0-9a-f]+", "", str(jaxpr))


def draws(jaxpr: Any) -> int:
    """The number of places in a program that draw random numbers."""
    found = 0
    for eqn in jaxpr.eqns:
        found += eqn.primitive.name == "random_bits"
        found += sum(draws(one) for one in inner(eqn.params))
    return found


def inner(params: Mapping[str, Any]) -> Iterator[Any]:
    """The programs that an equation calls."""
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if hasattr(x, "eqns") or hasattr(x, "jaxpr"):
                yield getattr(x, "jaxpr", x)


def close(got: Any, wanted: Any, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Trees of equal structure whose leaves agree, `atol` being in units of a leaf's largest
    number, and of the tree's where that is next to nothing."""
    found, told = tree.flatten(got), tree.flatten(wanted)
    assert found.keys() == told.keys()
    largest = max((float(np.abs(x).max(initial=0)) for x in told.values()), default=0.0)
    for name, leaf in told.items():
        scale = max(float(np.abs(leaf).max(initial=0)), 1e-3 * largest)
        np.testing.assert_allclose(found[name], leaf, rtol, atol * scale, err_msg=name)
