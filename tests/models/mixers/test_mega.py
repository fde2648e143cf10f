"""MEGA: its moving average at initialisation, and the law of its chunked form (the contract holds the other's)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import mixer as mixers
from tests.tolerance import assert_close


def test_initialisation():
    """delta, alpha ~ N(0, 0.2), the inputs +1, -1, +1, ... with deviation 0.02, outputs and skip ~ N(0, 1)."""
    mixer = mixers.create("mega", 64, rngs=nnx.Rngs(0))
    for value, deviation in ((mixer.delta, 0.2), (mixer.alpha, 0.2), (mixer.ema_out, 1.0), (mixer.gamma, 0.02)):
        assert abs(np.std(value[...]) / deviation - 1) < 0.2
    signs = np.asarray(mixer.ema_in[...]) * (-1.0) ** np.arange(16)
    assert abs(signs.mean() - 1) < 0.01 and abs(signs.std() - 0.02) < 0.005


def test_chunks():
    """Cut inside of a chunk, the chunked form gives the same, from a carry of any capacity; chunks begin with documents."""
    mixer = mixers.create("mega", 16, rngs=nnx.Rngs(0), key_size=4, ema_size=2, chunk=5, activation="laplace")
    graph, params = nnx.split(mixer)
    x = np.float32(np.random.default_rng(0).standard_normal((1, 16, 16)))
    ids = jnp.asarray([[1] * 7 + [2] * 9])

    @jax.jit
    def run(params):
        mixer = nnx.merge(graph, params)
        carry, outputs = mixer.initial_carry(1, 1), []
        for start in range(0, 16, 8):
            y, carry = mixer(x[:, start : start + 8], carry, segment_ids=ids[:, start : start + 8])
            outputs.append(y)
        return jnp.concatenate(outputs, 1), jnp.concatenate([mixer(x[:, :7])[0], mixer(x[:, 7:])[0]], 1)

    assert_close(*run(params))
