"""DSS with its softmax kernel: growing modes, and the length that it is built for."""

import jax.numpy as jnp
import jax.random
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from tests.tolerance import assert_close

LENGTH = 24


def build(**hyperparameters):
    return mixers.create("dss", 4, rngs=nnx.Rngs(0), kernel="softmax", length=LENGTH, state=4, **hyperparameters)


@pytest.mark.parametrize("growth", [0.5, 1e4])
def test_growing_modes(growth):
    """Convolution and recurrence agree over the whole length, also where the paper's recurrence would leave float32."""
    dss = build()
    dss.a_real[...] = jnp.array([-0.5, 0.0, growth, 2 * growth])
    x = jax.random.normal(jax.random.key(0), (1, LENGTH, 4))
    convolved, _ = dss(x)
    stepped, _ = dss(x, dss.initial_carry(1, LENGTH))
    assert np.isfinite(convolved).all()
    assert_close(stepped, convolved)


def test_rows_sum_to_one():
    """The softmax's modes sum to 1 / Lambda over the length."""
    dss = build()
    dss.a_real[...] = jnp.array([-0.5, 0.1, 2.0, -3.0])
    step, first = dss.modes()
    total = sum(first * jnp.exp(lag * step) for lag in range(LENGTH))
    expected = np.broadcast_to(1 / (np.asarray(dss.a_real[...]) + 1j * np.asarray(dss.a_imag[...])), total.shape)
    assert_close(total.real, expected.real, 1e-4)
    assert_close(total.imag, expected.imag, 1e-4)


def test_length():
    """Longer sequences are refused, and only where the kernel depends on the length."""
    x = jnp.zeros((1, LENGTH + 1, 4))
    with pytest.raises(ValueError, match="built for length 24"):
        build()(x)
    mixers.create("dss", 4, rngs=nnx.Rngs(0), length=LENGTH, state=4)(x)


def test_a_stream_beyond_the_length_is_nan():
    """Its kernel ends there, and growing modes would go on without bound."""
    dss, x = build(), jax.random.normal(jax.random.key(0), (1, LENGTH, 4))
    y, carry = dss(x, dss.initial_carry(1, LENGTH))
    assert np.isfinite(y).all()
    assert np.isnan(dss(x[:, :1], carry)[0]).all()
    assert np.isfinite(dss(x[:, :1], carry, segment_ids=jnp.full((1, 1), 2))[0]).all()  # another document
