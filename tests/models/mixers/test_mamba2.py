"""Mamba-2's initial decays."""

import jax
import numpy as np
from flax import nnx

from models import mixer as mixers


def test_initial_values():
    """A uniform in (1, 16), dt log-uniform in [0.001, 0.1], D = 1; one head for every 64 channels."""
    mixer = mixers.create("mamba2", 64, rngs=nnx.Rngs(0), heads=64, state=2)
    a, dt = np.exp(mixer.a_log[...]), np.asarray(jax.nn.softplus(mixer.dt_bias[...]))
    assert a.min() >= 1 and a.max() <= 16 and 6 < a.mean() < 11
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101
    assert (np.asarray(mixer.d[...]) == 1).all()
    assert mixers.create("mamba2", 96, rngs=nnx.Rngs(0)).a_log.shape == (3,)
