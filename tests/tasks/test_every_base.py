"""Every task on every method, as the cases of tests/methods/cases.py have them; only traced."""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval

from tests.configs import ROOT, one_for_each
from tests.methods.cases import CASES
from vtp_jax import tree
from vtp_jax.data import outline
from vtp_jax.setup import build, config
from vtp_jax.tasks import answer, classify, retrieve
from vtp_jax.types import Method, Spec, UserError

KEY, STEP = jax.eval_shape(lambda: (jax.random.key(0), jnp.zeros((), jnp.int32)))
ROWS, WORDS = 4, 8
BASES = {name: case.tasks for name, case in CASES.items() if case.tasks}


class Task(NamedTuple):
    """The option of a task that varies, its values, the other options, the keys that its batch has
    in addition to video and valid, and the verbs that are traced."""

    option: str
    values: tuple[str, ...]
    given: dict[str, Any]
    keys: tuple[str, ...]
    verbs: tuple[str, ...]


TASKS = dict(
    retrieve=Task("pool", tuple(retrieve.POOLS), {}, ("text", "text_mask"), retrieve.KINDS),
    classify=Task("pool", tuple(classify.POOLS), dict(classes=5), ("label",), ("classes",)),
    answer=Task(
        "fuse", tuple(answer.FUSES), dict(answers=5), ("text", "text_mask", "label"), ("answer",)
    ),
)


@functools.cache
def bases() -> dict[str, tuple[Method, tuple[int, ...], dict[str, Any]]]:
    """Method, clip and facts of the first tiny config of each."""
    found = {}
    for path in one_for_each(tasks=False):
        cfg = config.load(str(ROOT / path))
        spec, facts = outline.describe(cfg.data, ROWS)
        facts = {**facts, "labels": 0}  # the classes of the base's data are not those of the task's
        made = build.part("methods", cfg.method, "config.method", facts)
        found[cfg.method["name"]] = once(made), spec["video"].shape[-4:], facts
    return found


def once(made: Method) -> Method:
    """The method with its functions jitted, so that each is traced once for the same shapes."""
    init = jax.jit(lambda key, spec: made.init(key, dict(spec)), static_argnums=1)
    return made._replace(
        init=lambda key, spec: init(key, tuple(sorted(spec.items()))),
        encode={name: jax.jit(verb) for name, verb in made.encode.items()},
    )


def batch_of(base: str, task: str, *several: int, parts: bool = False) -> Spec:
    """A batch for the task: of clips; of several views of each; or of several parts of each video
    with a text each."""
    clip, b = bases()[base][1], ROWS if parts else ROWS // math.prod(several)
    text = (b, *several, WORDS) if parts else (b, WORDS)
    known = dict(
        video=((b, *several, *clip), jnp.uint8), valid=((b,), bool), text=(text, jnp.int32),
        text_mask=(text, bool), label=((b,), jnp.int32),
    )  # fmt: skip
    return {k: jax.ShapeDtypeStruct(*known[k]) for k in ("video", "valid", *TASKS[task].keys)}


def task_on(base: str, task: str, **given: Any) -> Method:
    made, _, facts = bases()[base]
    cfg = dict(name=task, **TASKS[task].given, **given)
    return build.part("tasks", cfg, "config.task", facts, base=made)


def state(made: Method, batch: Spec):
    params = jax.eval_shape(lambda key: made.init(key, batch), KEY)
    return params, jax.eval_shape(lambda key, params: made.start(key, batch, params), KEY, params)


def trace(base: str, task: str, *several: int, parts: bool = False, **given: Any) -> None:
    """Traces a step's loss, and the verbs on single clips."""
    made, batch = task_on(base, task, **given), batch_of(base, task, *several, parts=parts)
    params, extra = state(made, batch)
    value, out = jax.eval_shape(made.loss, params, extra, batch, KEY, STEP)
    assert value.shape == () and jax.tree.structure(out.extra) == jax.tree.structure(extra)
    for verb in TASKS[task].verbs:
        found = jax.eval_shape(made.encode[verb], params, extra, batch_of(base, task))
        assert found["embedding" if task == "retrieve" else "score"].shape[0] == ROWS


def test_the_matrix_has_every_method_and_every_task():
    files = {kind: {p.stem for p in (ROOT / f"vtp_jax/{kind}").glob("[a-z]*.py")}
             for kind in ("methods", "tasks")}  # fmt: skip
    for found, kind, where in (
        (BASES, "methods", "tests/methods/cases.py: a Case of this name with tasks=Tasks(...)"),
        (bases(), "methods", "configs/: a config without a task"),
        (TASKS, "tasks", "tests/tasks/test_every_base.py: TASKS"),
    ):
        assert not (new := files[kind] - set(found)), f"{where} is missing for {sorted(new)}"
        assert not (old := set(found) - files[kind]), f"{where} is for no file: {sorted(old)}"


@pytest.mark.parametrize("task, value", [(t, v) for t, one in TASKS.items() for v in one.values])
@pytest.mark.parametrize("base", BASES)
def test_a_task_works_on_a_method_or_is_rejected_in_one_line(base, task, value):
    option, known = TASKS[task].option, getattr(BASES[base], task)
    towers = [dict(towers=n) for n in retrieve.TOWERS] if task == "retrieve" else [{}]
    for more in towers:
        if value in known:
            trace(base, task, **{option: value}, **more)
            continue
        with pytest.raises(UserError, match="^config.task") as error:
            trace(base, task, **{option: value}, **more)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("base", BASES)
def test_several_views_are_rows_of_any_task(base, task):
    if known := getattr(BASES[base], task):
        change = {} if task == "answer" else dict(flip=0.5, erase=0.5)
        trace(base, task, 2, **{TASKS[task].option: known[0]}, **change)


def test_parts_with_a_text_each_are_retrieved_as_one_video():
    trace("tvtsv2", "retrieve", 4, parts=True, pool="embedding", flip=0.5, erase=0.5)


@pytest.mark.parametrize("base", BASES)
def test_recognition_makes_the_same_net_whether_or_not_the_data_have_texts(base):
    made, batch = task_on(base, "classify"), batch_of(base, "classify")
    alone, beside = (state(made, spec) for spec in (batch, {**batch_of(base, "answer"), **batch}))
    assert "text" not in batch and tree.flatten(alone) == tree.flatten(beside)


@pytest.mark.parametrize("pool", classify.POOLS)
@pytest.mark.parametrize("base", BASES)
def test_droppable_parameters_are_all_that_recognition_does_not_read(base, pool):
    known = BASES[base]
    drop = known.never + (known.mean_norm if pool == "mean_norm" else ())
    made = task_on(base, "classify", pool=pool, drop=drop)
    batch = batch_of(base, "classify")
    params, extra = state(made, batch)
    # The loss's program, without what its value does not depend on.
    program = jax.make_jaxpr(lambda *args: made.loss(*args)[0])(params, extra, batch, KEY, STEP)
    _, read = partial_eval.dce_jaxpr(program.jaxpr, [True])
    left = {n for n, used in zip(tree.flatten(params), read, strict=False) if not used}
    kept = re.compile(f"base/({'|'.join(known.computed)})")
    assert not {n for n in left if not kept.fullmatch(n)}
