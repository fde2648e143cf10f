"""RWKV-6's initial values, which go by layer and channel."""

import jax
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers


@pytest.mark.parametrize("layer", [0, 2])
def test_initial_values(layer):
    """Decays from -6 to -1 (logarithms of -log w) along the channels; no data dependence yet; norms grow with depth."""
    make = lambda layer: mixers.create("rwkv6", 16, rngs=nnx.Rngs(0), layer=layer, layers=3, heads=2)
    mixer = jax.jit(make)(layer)  # as in a scan over layers
    n, r = np.arange(16) / 15, layer / 2
    np.testing.assert_allclose(mixer.w_0[...].ravel(), -6 + 5 * n ** (0.7 + 1.3 * r), rtol=1e-4)
    bonus = r * (1 - n) + np.resize([0, 0.1, -0.1], 16)
    np.testing.assert_allclose(mixer.u[...].ravel(), bonus, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mixer.norm_weight[...], ((1 + layer) / 3) ** 0.7, rtol=1e-5)
    assert not any(np.asarray(w[...]).any() for w in (mixer.mix_in, mixer.decay_in, mixer.w_o))
    for w, gain in ((mixer.w_r, 1.0), (mixer.w_v, 1.0), (mixer.w_k, 0.1), (mixer.w_g, 0.1)):
        w = np.asarray(w[...]).reshape(16, 16)
        np.testing.assert_allclose(w @ w.T, gain**2 * np.eye(16), atol=1e-5)
