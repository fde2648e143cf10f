"""MesaNet's linear systems."""

import jax.numpy as jnp
import numpy as np

from models.mixers.mesa_net import ridge_solve
from tests.tolerance import assert_close


def test_solution():
    """As many steps as channels solve the systems; where nothing is asked, more of them change nothing."""
    numbers = np.random.default_rng(0)
    length, size = 6, 4
    q, k = numbers.standard_normal((2, 1, length, 1, size))
    beta, decay = numbers.uniform(0.2, 0.9, (2, 1, length, 1))
    ridge = numbers.uniform(0.5, 1.5, (1, size))
    state = np.eye(size)[None, None]
    q[:, 2] = 0
    expected, H = [], state[0, 0]
    for t in range(length):
        H = decay[0, t, 0] * H + beta[0, t, 0] * np.outer(k[0, t, 0], k[0, t, 0])
        expected.append(np.linalg.solve(H + np.diag(ridge[0]), q[0, t, 0]))
    arrays = (jnp.asarray(a, jnp.float32) for a in (q, k, beta, np.log(decay), ridge, state))
    found = ridge_solve(2 * size, *arrays, None)
    assert_close(found[0, :, 0], np.stack(expected))
