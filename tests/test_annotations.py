"""A call that an annotation forbids fails in the tests, in each of the rooms whose annotations are checked."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from models.kernel_attention import running_scale
from ops.long_convolution import long_convolution


def test_shapes_are_checked():
    long_convolution(jnp.zeros((1, 4, 3)), jnp.zeros((3, 2)))
    with pytest.raises(TypeCheckError, match="kernel"):
        long_convolution(jnp.zeros((1, 4, 3)), jnp.zeros((2, 2)))


def test_types_are_checked():
    running_scale(jnp.zeros((1, 2, 1)))
    with pytest.raises(TypeCheckError, match="'log_weight'"):
        running_scale(jnp.zeros((1, 2, 1), jnp.int32))


def test_results_are_checked(monkeypatch):
    monkeypatch.setattr("ops.long_convolution._convolve", lambda x, kernel: x[:, :, :-1])
    with pytest.raises(TypeCheckError, match="return value"):
        long_convolution(jnp.zeros((1, 4, 3)), jnp.zeros((3, 2)))
