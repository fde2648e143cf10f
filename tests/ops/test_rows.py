"""Rows: the largest number and unit length, in both forms, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.rows import row_max, unit_rows

SIZES = (1, 7, 16, 48, 128, 341)  # odd and even, below, at and above the length of vectors


@pytest.mark.parametrize("size", SIZES)
def test_row_max(size):
    x = np.random.default_rng(0).normal(size=(3, 2, size)).astype(np.float32) - 5
    for platform in ("cpu", "tpu"):
        with dispatch.platform(platform):
            np.testing.assert_array_equal(row_max(jnp.asarray(x)), x.max(-1))
    assert np.isnan(row_max(jnp.asarray(x).at[0, 0, size // 2].set(jnp.nan))[0, 0])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(row_max(x)))(jnp.asarray(x)), np.zeros_like(x))


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("form", ["reference", "halves"])
@pytest.mark.parametrize("size", SIZES)
def test_unit_rows(size, form, mean):
    """y = x / r and dx = dy / r - x (x.dy) / (N r^3), r^2 = x.x / N + eps, with N = 1 for sums."""
    rng = np.random.default_rng(size)
    x, dy = rng.normal(size=(2, 3, 2, size))
    n, eps = size if mean else 1, 1e-3
    r = np.sqrt(np.sum(x * x, -1, keepdims=True) / n + eps)
    y, pull = jax.vjp(lambda x: unit_rows(x, eps=eps, mean=mean, implementation=form), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, x / r, rtol=1e-5, atol=1e-6)
    expected = dy / r - x * np.sum(x * dy, -1, keepdims=True) / (n * r**3)
    np.testing.assert_allclose(pull(jnp.asarray(dy, jnp.float32))[0], expected, rtol=1e-4, atol=1e-5)


def test_forms_by_platform():
    """The plain formula off the CPU, whose forward-mode derivative exists."""
    x = jnp.arange(64.0).reshape(2, 32)
    with dispatch.platform("tpu"):
        dy = jax.jvp(lambda x: unit_rows(x, eps=0.0), (x + 1,), (x + 1,))[1]
    np.testing.assert_allclose(dy, jnp.zeros_like(x), atol=1e-6)
    assert "custom_vjp" in str(jax.make_jaxpr(lambda x: unit_rows(x, eps=0.0))(x))
