"""RWKV-4's initial values, which go by layer and channel."""

import jax
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers


@pytest.mark.parametrize("layer", [0, 2])
def test_initial_values(layer):
    """Decays from -5 to 3 (logarithms) along the channels, mu a power of the channel that shrinks with depth."""
    make = lambda layer: mixers.create("rwkv4", 16, rngs=nnx.Rngs(0), layer=layer, layers=3)
    mixer = jax.jit(make)(layer)  # as in a scan over layers
    h, r = np.arange(16) / 15, layer / 2
    np.testing.assert_allclose(mixer.log_w[...], -5 + 8 * h ** (0.7 + 1.3 * r), rtol=1e-4, atol=1e-5)
    zigzag = np.resize([0, 0.5, -0.5], 16)
    np.testing.assert_allclose(mixer.u[...], np.log(0.3) + zigzag, rtol=1e-5)
    power = (np.arange(16) / 16) ** (1 - layer / 3)
    np.testing.assert_allclose(mixer.mu[...], [power, power + 0.3 * r, power**0.5], rtol=1e-5)
    assert not any(np.asarray(w[...]).any() for w in (mixer.w_k, mixer.w_r, mixer.w_o))
    w = np.asarray(mixer.w_v[...])
    np.testing.assert_allclose(w @ w.T, np.eye(16), atol=1e-5)
