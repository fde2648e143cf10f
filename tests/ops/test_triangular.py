"""The triangular solver against LAPACK in float64, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.triangular import solve_unit_lower
from tests.tolerance import assert_close


@pytest.mark.parametrize("size", [1, 4, 8, 32])
def test_against_lapack(size):
    numbers = np.random.default_rng(size)
    A = np.tril(numbers.standard_normal((2, 3, size, size)), -1) / np.sqrt(size)
    R, weight = numbers.standard_normal((2, 2, 3, size, 5))
    M = np.eye(size) + A
    X = np.linalg.solve(M, R)
    dR = np.linalg.solve(np.swapaxes(M, -1, -2), weight)
    dA = np.tril(-dR @ np.swapaxes(X, -1, -2), -1)
    single = lambda x: jnp.asarray(x, jnp.float32)

    @jax.jit
    def run(A, R, weight):
        found, pull_back = jax.vjp(solve_unit_lower, A, R)
        return found, *pull_back(weight)

    for found, expected in zip(run(single(A), single(R), single(weight)), (X, dA, dR), strict=True):
        assert_close(found, expected)
