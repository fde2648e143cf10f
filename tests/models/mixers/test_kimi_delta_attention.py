"""How fast Kimi Delta Attention forgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers


def test_initialisation():
    """A uniform in (1, 16), dt log-uniform in [0.001, 0.1], one for each channel."""
    mixer = mixers.create("kimi_delta_attention", 64, rngs=nnx.Rngs(0), heads=16)
    a, dt = np.exp(mixer.a_log[...]), np.asarray(jax.nn.softplus(mixer.dt_bias[...]))
    assert 1 <= a.min() and a.max() <= 16 and a.std() > 2
    assert dt.shape == (16, 4) and dt.min() >= 0.99e-3 and dt.max() <= 0.101


def test_lower_bound():
    """No input forgets faster than the bound allows."""
    mixer = mixers.create("kimi_delta_attention", 16, rngs=nnx.Rngs(0), lower_bound=-5.0)
    decay = mixer.log_decay(100 * jax.random.normal(jax.random.key(0), (2, 50, 4, 4)))
    assert decay.min() >= -5 and jnp.abs(decay.min() + 5) < 1e-3 and decay.max() <= 0
    with pytest.raises(ValueError, match="negative"):
        mixers.create("kimi_delta_attention", 16, rngs=nnx.Rngs(0), lower_bound=5.0)
