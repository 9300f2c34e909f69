"""Nets bound to their parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vtp_jax.nn.bind import bind, has
from vtp_jax.nn.transformer import Dropout, Linear


class Toy(nn.Module):
    def setup(self):
        self.first, self.second, self.drop = Linear(3), Linear(2), Dropout(0.5)

    def both(self, x):
        return self.second(self.drop(self.first(x)))

    def one(self, x):
        return self.first(x)


def test_dropout_needs_a_key_and_dropped_parts_are_detected():
    net, x = Toy(), jnp.ones((1, 2))
    key = jax.random.key(0)
    params = net.init(key, x, method="both")["params"]
    still = bind(net, params).both(x)
    assert (still == bind(net, params).both(x)).all()
    assert not (still == bind(net, params, key).both(x)).all()
    assert has(bind(net, params), "second")
    less = bind(net, {"first": params["first"]})
    assert has(less, "first") and not has(less, "second")
    assert (less.one(x) == bind(net, params).one(x)).all()
