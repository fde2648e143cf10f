"""RWKV-7's initial values, and the first layer's values on their way through the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from models.mixer import Context
from tests.tolerance import assert_close

RANKS = {"decay_rank": 4, "rate_rank": 4, "value_rank": 4, "gate_rank": 4}


@pytest.mark.parametrize("layer", [0, 2])
def test_initial_values(layer):
    """By layer and channel, zigzag over a head; first factors zero, second ones orthogonal."""
    make = lambda layer: mixers.create("rwkv7", 16, rngs=nnx.Rngs(0), layer=layer, layers=3, heads=2, **RANKS)
    mixer = jax.jit(make)(layer)  # as in a scan over layers
    n, r = np.arange(16) / 15, layer / 2
    across = np.tile(np.linspace(-1, 1, 8), 2)
    zigzag, linear = across * np.abs(across), n - 0.5
    flat = lambda p: np.asarray(p[...]).ravel()
    np.testing.assert_allclose(flat(mixer.w_0), -5.5 + 6 * n ** (1 + r**0.3) + 2.5 * zigzag, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(flat(mixer.a_0), -0.19 + 0.3 * zigzag + 0.4 * linear, atol=1e-5)
    np.testing.assert_allclose(flat(mixer.v_0), 0.73 - 0.4 * linear, atol=1e-5)
    np.testing.assert_allclose(flat(mixer.k_k), 0.71 - 0.1 * linear, atol=1e-5)
    place = (np.arange(16) / 16) ** (0.7 * (1 - layer / 3))
    np.testing.assert_allclose(mixer.mu[2], 1 - place, atol=1e-5)
    second = np.asarray(mixer.value_out[...]).reshape(4, 16)
    np.testing.assert_allclose(second @ second.T, 0.01 * np.eye(4), atol=1e-5)
    assert not np.asarray(mixer.value_in[...]).any() and not np.asarray(mixer.w_o[...]).any()


def test_values_of_the_first_layer():
    """The first layer hands on its own values, whatever came in; a later one what it was given, and it uses it."""
    mixer = mixers.create("rwkv7", 16, rngs=nnx.Rngs(0), heads=2, **RANKS)
    mixer.w_o[...] = jax.random.normal(jax.random.key(0), mixer.w_o.shape)
    mixer.gate_in[...] = jax.random.normal(jax.random.key(1), mixer.gate_in.shape)
    x = jax.random.normal(jax.random.key(2), (1, 5, 16))
    given = jax.random.normal(jax.random.key(3), x.shape)

    @jax.jit
    def run(layer, stream):
        y, _, stream = mixer(x, context=Context(layer=layer, stream=stream))
        return y, stream

    first, values = run(0, given)
    assert_close(run(0, jnp.zeros_like(x))[0], first)
    shifted = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    expected = jnp.einsum("btd,dhk->bthk", x + (shifted - x) * mixer.mu[3], mixer.w_v[...]).reshape(x.shape)
    assert_close(values, expected)
    later, stream = run(1, given)
    assert_close(stream, given)
    assert jnp.abs(later - run(1, values)[0]).max() > 1e-3
    assert_close(run(1, values)[0], first)  # moving towards one's own values is staying
