"""SNCLR against the official code: loss, every gradient, the moving average and the queue after a
step, and the loss of two processes with a queue each; 1e-9 relative in fp64.

The numbers come from ChongjianGE/SNCLR @b95c7e5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import goldens
from tests.goldens import close, probe
from vtp_jax.objectives import neighbours
from vtp_jax.objectives.contrastive import normalise


def test_a_step_has_the_official_numbers():
    golden = goldens.snclr()
    out, case = golden.run(), golden.case
    goldens.check_losses(golden, out)
    goldens.check_gradients(golden, out)
    averages = {n: x for n, x in case["momentum_probe"].items() if n != "pos_embed"}
    assert averages.keys() < {n.removeprefix("after/momentum_encoder.") for n in out}
    for name, expected in averages.items():
        x = out[f"after/momentum_encoder.{name}"]
        assert probe(x) == close(expected, np.linalg.norm(x)), name
    assert out["pointer"] == case["pointer"]
    assert probe(out["bank"]) == close(case["bank_probe"], 1.0)
    first = out["bank"][golden.inputs["pointer"], :4]
    assert first.tolist() == close(case["bank_first"], 1.0)


@pytest.mark.parametrize("golden", goldens.load("snclr_tiny")["ranks"], ids=["code", "threshold"])
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

        value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(query, support)
    assert float(value) == close(golden["loss"])
    assert probe(np.asarray(grads[0])) == close(golden["query_grad"], 1.0)
    assert probe(np.asarray(grads[1])) == close(golden["support_grad"], 1.0)
