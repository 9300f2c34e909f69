"""SNCLR held to the official code: loss, every gradient, the moving average and the queue after a
step, and the loss of two processes with a queue each; 1e-9 relative in fp64.

The numbers come from ChongjianGE/SNCLR @b95c7e5. Neither weights nor inputs are stored: the golden
says the rules that make them.
"""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax.convert import rules
from vtp_jax.methods import snclr
from vtp_jax.objectives import neighbours
from vtp_jax.objectives.contrastive import normalise

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden/snclr_tiny.json").read_text(encoding="utf-8")
)
CASE = GOLDEN["case"]
STILL = dict(jittered=0.0, grey=0.0, blur=0.0, solarise=0.0, flip=0.0)


def close(value, scale=0.0):
    return pytest.approx(value, rel=1e-9, abs=1e-9 * scale)


def make_tensor(name, shape):
    draw = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if name.endswith(".weight") and len(shape) == 1:
        value = 1 + 0.1 * draw
    elif len(shape) == 1 or name.endswith("cls_token"):
        value = 0.05 * draw
    else:
        value = draw / np.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32).astype(np.float64)


def head(ours, theirs, layers):
    """A head's layers are numbered with its norms and activations: 0, 3, 6."""
    table = []
    for i in range(layers):
        table.append(
            rules.Rule(f"{ours}/fc{i + 1}/kernel", f"{theirs}.{3 * i}.weight", rules.LINEAR)
        )
        if i + 1 < layers:
            table += rules.norm(f"{ours}/norm{i + 1}", f"{theirs}.{3 * i + 1}")
    return table


def table(part):
    """Our names and theirs, of the encoder and its projector; the predictor's with the online's."""
    vit = [r for r in rules.timm_vit(CASE["heads"], head=None) if r.ours != "position"]
    found = rules.under([*vit, *head("projector", "head", 3)], theirs=f"{part}_encoder.")
    return found if part == "momentum" else [*found, *head("predictor", "predictor", 2)]


def fill(part, shapes):
    """Our parameters by the golden's rule: from the official names and shapes."""
    empty = rules.to_theirs(table(part), jax.tree.map(lambda s: np.empty(s.shape), shapes))
    made = {name: make_tensor(name, x.shape) for name, x in empty.items()}
    return jax.tree.map(jnp.asarray, rules.to_ours(table(part), made))


def probe(x):
    x = np.asarray(x)
    return float(x.ravel() @ np.random.RandomState(4).standard_normal(x.size))


def test_a_step():
    golden, b, s = GOLDEN["step"], CASE["batch"], CASE["size"]
    with jax.enable_x64(True):
        method = snclr.make(
            size=(CASE["width"], CASE["depth"], CASE["heads"], CASE["mlp"]),
            cube=(1, CASE["patch"], CASE["patch"]),
            hidden=CASE["hidden"], features=CASE["features"], neighbours=golden["topk"],
            queue=CASE["bank"], temperature=CASE["temperature"], momentum=CASE["momentum"],
            threshold=golden["threshold"], first=STILL, second=STILL, dtype="float64",
            mean=(0.0,) * 3, std=(1.0,) * 3,
        )  # fmt: skip
        views = [np.random.RandomState(i).standard_normal((b, 3, s, s)) for i in (1, 2)]
        video = np.stack(views, axis=1).transpose(0, 1, 3, 4, 2)[:, :, None]
        batch = dict(video=jnp.asarray(video), valid=jnp.ones(b, bool))
        spec = jax.eval_shape(lambda: batch)
        shapes = jax.eval_shape(lambda key: method.init(key, spec), jax.random.key(0))
        params = fill("base", shapes)
        twin = fill("momentum", {k: v for k, v in shapes.items() if k != "predictor"})
        bank = np.random.RandomState(3).standard_normal((CASE["bank"], CASE["features"]))
        past = dict(
            key=normalise(jnp.asarray(bank)),
            real=jnp.ones(CASE["bank"], bool),
            next=jnp.int32(CASE["pointer"]),
        )

        @jax.jit
        def step(params, extra):
            # The reference averages when a step begins; here the previous step did when it ended.
            params, extra = method.after_update(params, extra, jnp.int32(-1))
            run = jax.value_and_grad(method.loss, has_aux=True)
            (value, out), grads = run(params, extra, batch, jax.random.key(0), jnp.int32(0))
            return value, out.extra, grads

        value, extra, grads = jax.device_get(step(params, dict(twin=twin, queue=past)))
    assert float(value) == close(golden["loss"])
    averages = rules.to_theirs(table("momentum"), extra["twin"])
    for key, told in golden["momentum_probe"].items():
        if key != "pos_embed":
            key = f"momentum_encoder.{key}"
            assert probe(averages[key]) == close(told, np.linalg.norm(averages[key])), key
    assert extra["queue"]["next"] == golden["pointer"]
    assert probe(extra["queue"]["key"]) == close(golden["bank_probe"], 1.0)
    first = extra["queue"]["key"][CASE["pointer"], :4]
    assert first.tolist() == close(golden["bank_first"], 1.0)
    theirs = rules.to_theirs(table("base"), grads)
    frozen = {k for k in theirs if "patch_embed" in k}
    assert theirs.keys() - frozen == golden["grad_norms"].keys()
    largest = max(golden["grad_norms"].values())
    for key in theirs.keys() - frozen:
        # The key's bias and what batch norm takes away have no gradient but rounding.
        norm = float(np.linalg.norm(theirs[key]))
        assert norm == close(golden["grad_norms"][key], largest), key
        assert probe(theirs[key]) == close(golden["grad_probes"][key], largest), key


@pytest.mark.parametrize("golden", GOLDEN["ranks"], ids=["code", "threshold"])
def test_processes_with_a_queue_each_are_groups(golden):
    b, d, ranks, k = (golden[n] for n in ("batch", "width", "ranks", "topk"))
    with jax.enable_x64(True):
        query, support, key = (
            jnp.asarray(np.random.RandomState(i).standard_normal((b, d))) for i in (11, 12, 13)
        )
        banks = jnp.asarray(np.random.RandomState(14).standard_normal((ranks * golden["bank"], d)))

        def loss(query, support):
            unit, all_real = normalise(key), jnp.ones(len(banks), bool)
            near, real = neighbours.nearest(unit, normalise(banks), all_real, k, ranks)
            weight = neighbours.positiveness(support, near, real, golden["threshold"])
            mean = neighbours.soft_info_nce(
                query,
                jnp.concatenate([unit[:, None], near], axis=1),
                jnp.ones((b, k + 1), bool),
                jnp.pad(weight, ((0, 0), (1, 0)), constant_values=1.0),
                jnp.ones(b, bool),
                temperature=golden["temperature"],
            )
            return 2 * golden["temperature"] * mean.value()

        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(query, support)
    assert float(value) == close(golden["loss"])
    assert probe(grads[0]) == close(golden["query_grad"], 1.0)
    assert probe(grads[1]) == close(golden["support_grad"], 1.0)
