"""What entries make of a config's parts."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.configs import blank
from vtp_jax.methods import omnivl
from vtp_jax.setup import build
from vtp_jax.types import Method, Out


def test_an_evaluations_clips_have_none_of_trainings_ids(monkeypatch):
    """Both ids begin at 0, so a queue of names would confuse the clips; training itself is given
    its own ids."""
    seen = []

    def loss(params, extra, batch, rng, step):
        seen.append(batch)
        return jnp.zeros(()), Out({}, extra)

    base = Method(init=lambda rng, spec: {}, loss=loss, encode={})
    monkeypatch.setattr(build, "part", lambda *args, **more: base)
    made = build.method(blank(), {})
    batch = dict(id=jnp.arange(4, dtype=jnp.int32), valid=jnp.ones(4, bool))
    made.encode["loss"]({}, {}, batch, jax.random.key(0))
    made.loss({}, {}, batch, jax.random.key(0), jnp.int32(0))
    evaluated, trained = (omnivl.identities(one) for one in seen)
    assert seen[0]["id"].dtype == jnp.int32 and len(set(evaluated.tolist())) == 4
    assert not np.isin(evaluated, trained).any() and (evaluated < 0).all()
    assert (seen[1]["id"] == batch["id"]).all()
    made.encode["loss"]({}, {}, dict(valid=batch["valid"]), jax.random.key(0))  # without ids
