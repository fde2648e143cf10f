"""Mamba-2: initial decays, factors and norms."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import mixer as mixers
from tests.tolerance import assert_close


def test_initial_values():
    """A uniform in (1, 16), dt log-uniform in [0.001, 0.1], D = 1; one head for every 64 channels."""
    mixer = mixers.create("mamba2", 64, rngs=nnx.Rngs(0), heads=64, state=2)
    a, dt = np.exp(mixer.a_log[...]), np.asarray(jax.nn.softplus(mixer.dt_bias[...]))
    assert a.min() >= 1 and a.max() <= 16 and 6 < a.mean() < 11
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101
    assert (np.asarray(mixer.d[...]) == 1).all()
    assert mixers.create("mamba2", 96, rngs=nnx.Rngs(0)).a_log.shape == (3,)


def test_scales_and_norms():
    """Factors are those of the weights; a norm before the gate, and none, from their definitions."""
    x = np.float32(np.random.default_rng(0).standard_normal((1, 7, 8)))
    make = lambda **options: mixers.create("mamba2", 8, rngs=nnx.Rngs(0), state=4, heads=4, groups=2, **options)
    factors = (0.5, 1.5, 0.7, 1.1, 0.3)
    scaled, by_hand = make(scales=factors), make()
    for name, factor in {"w_z": 0.5, "w_u": 1.5, "w_bc": np.repeat([0.7, 1.1], 8), "w_dt": 0.3}.items():
        getattr(by_hand, name)[...] = getattr(by_hand, name)[...] * np.float32(factor)
    assert_close(scaled(x)[0], by_hand(x)[0])
    outer = {}
    for kind in ("none", "ungated"):
        mixer = make(output_norm=kind)
        mixer.w_out[...] = jnp.eye(16, 8)
        outer[kind] = np.asarray(mixer(x)[0], np.float64)
    z = np.float64(x @ np.asarray(make().w_z[...]))[..., :8]
    gate = z / (1 + np.exp(-z))
    inner = outer["none"] / gate
    assert_close(outer["ungated"], gate * inner / np.sqrt(np.mean(inner**2, -1, keepdims=True) + 1e-5), 1e-4)
