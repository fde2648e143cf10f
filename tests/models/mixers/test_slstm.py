"""sLSTM's initial gates."""

import jax
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers


@pytest.mark.parametrize("layer", [0, 2])
def test_initial_values(layer):
    """Forget biases from 5 to -7 over a head, by a power that grows with depth; no memory mixing yet."""
    make = lambda layer: mixers.create("slstm", 32, rngs=nnx.Rngs(0), layer=layer, layers=3, heads=2)
    mixer = jax.jit(make)(layer)  # as in a scan over layers
    expected = 5 - 12 * (np.arange(16) / 15) ** (0.3 + 1.3 * layer / 2)
    np.testing.assert_allclose(mixer.b[1], np.tile(expected, (2, 1)), rtol=1e-4, atol=1e-4)
    assert not np.asarray(mixer.b[...])[[0, 2, 3]].any() and not np.asarray(mixer.r[...]).any()
