"""Mamba-3's rates and rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from models.mixers.mamba3 import heavy_tail, turns
from tests.tolerance import assert_close


def test_initial_values():
    """dt log-uniform in [0.001, 0.1]; biases of B and C one."""
    mixer = mixers.create("mamba3", 32, rngs=nnx.Rngs(0), heads=32, state=4)
    dt = np.asarray(jax.nn.softplus(mixer.dt_bias[...]))
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101
    assert (np.asarray(mixer.b_bias[...]) == 1).all() and (np.asarray(mixer.c_bias[...]) == 1).all()
    with pytest.raises(ValueError, match="rotated"):
        mixers.create("mamba3", 32, rngs=nnx.Rngs(0), state=2)


def test_heavy_tail():
    """1 + a above 0, 1 / (1 - a) below, without a jump of value or slope, and with finite slopes on both sides."""
    a = jnp.array([-9.0, -1.0, 0.0, 1.0, 9.0])
    assert_close(heavy_tail(a), np.array([0.1, 0.5, 1.0, 2.0, 10.0]))
    slopes = jax.vmap(jax.grad(heavy_tail))(jnp.array([-1e6, -1e-6, 1e-6, 1.0, 1e6]))
    assert_close(slopes, np.array([0.0, 1.0, 1.0, 1.0, 1.0]))


def test_long_rotation():
    """Many turns later the angle is still right, and the rotation one of length one."""
    angle = jax.random.uniform(jax.random.key(0), (1, 5000, 1, 2), minval=0.0, maxval=3.0)
    _, (cos, sin) = jax.jit(lambda angle: turns(angle, None, None))(angle)
    expected = np.asarray(angle, np.float64).sum(1)
    assert_close(cos, np.cos(expected), 1e-4)
    assert_close(sin, np.sin(expected), 1e-4)
    assert_close(cos**2 + sin**2, np.ones((1, 1, 2)), 1e-4)


@pytest.mark.thorough
def test_several_reads():
    """With a rank, too, a sequence can be cut, and documents in a row do not meet."""
    mixer = mixers.create("mamba3", 16, rngs=nnx.Rngs(0), heads=2, state=8, rank=3)
    x = jax.random.normal(jax.random.key(0), (1, 10, 16))
    ids = jnp.array([[1] * 6 + [2] * 4])
    whole, _ = mixer(x, segment_ids=ids)
    carry, pieces = mixer.initial_carry(1, 10), []
    for piece in (slice(0, 5), slice(5, 10)):
        y, carry = mixer(x[:, piece], carry, segment_ids=ids[:, piece])
        pieces.append(y)
    assert_close(jnp.concatenate(pieces, 1), whole)
    assert_close(whole[:, 6:], mixer(x[:, 6:])[0])
