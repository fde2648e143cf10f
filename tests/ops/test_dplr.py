"""The two forms of a diagonal-plus-low-rank state space against HiPPO-LegS as a dense matrix, in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from ops import hippo
from ops.dplr import dplr_kernel, dplr_scan
from tests.tolerance import assert_close

SIZE, LENGTH = 64, 700
DT = np.array([0.001, 0.01, 0.1])


def test_legs():
    """Also at a length where Abar^length is far from zero for one channel and vanishes for another."""
    A, B = hippo.transition("legs", SIZE)
    L, V, P, b = hippo.normal_plus_low_rank("legs", SIZE)
    C = np.random.default_rng(0).standard_normal((len(DT), SIZE))
    expected = np.zeros((len(DT), LENGTH))
    for i, dt in enumerate(DT):
        a_bar, h = hippo.discretize(A, B, dt)
        for lag in range(LENGTH):
            expected[i, lag] = C[i] @ h
            h = a_bar @ h
    half = lambda z: np.broadcast_to(z[..., SIZE // 2 :], (len(DT), SIZE // 2))
    pair = lambda z: (jnp.asarray(z.real, jnp.float32), jnp.asarray(z.imag, jnp.float32))
    system = [pair(half(z)) for z in (L, P[:, 0], b)]
    c = pair(half(C @ V))
    dt = jnp.asarray(DT, jnp.float32)

    kernels = jax.jit(lambda c: [dplr_kernel(*system, c, dt, n) for n in (1, 7, LENGTH)])
    for found in kernels((c[0][None], c[1][None])):
        assert found.shape[0] == 1
        # Seven hundred steps of float32: the phases of fast modes are known to that accuracy.
        assert_close(found[0], expected[:, : found.shape[2]], 1e-4)
    impulse = jnp.zeros((1, LENGTH, len(DT))).at[:, 0].set(1.0)
    y, state = jax.jit(lambda x: dplr_scan(x, *system, c, dt))(impulse)
    assert_close(y[0].T, expected, 1e-4)
    assert state[0].shape == (1, len(DT), SIZE // 2)
