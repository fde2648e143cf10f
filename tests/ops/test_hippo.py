"""The HiPPO matrices against their definitions by integrals, and the operator over batches against matrix exponentials."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from ops import hippo
from ops.hippo_memory import hippo_memory
from tests.tolerance import assert_close

SIZE = 8
GAUSS = np.polynomial.legendre.leggauss(40)
NODES, WEIGHTS = (GAUSS[0] + 1) / 2, GAUSS[1] / 2


def signal(length, *shape, seed=0):
    return np.random.default_rng(seed).standard_normal((*shape, length))


@pytest.mark.parametrize("degree", range(4))
def test_legs_holds_polynomials(degree):
    """c(t) = t^k m with k m = A m + B, the solution of t c' = A c + B f for f = t^k, is f itself."""
    A, B = hippo.transition("legs", SIZE)
    m = np.linalg.solve(degree * np.eye(SIZE) - A, B)
    times = np.linspace(0, 3, 7)
    assert_close(hippo.reconstruct("legs", 3.0**degree * m, times, 3.0), times**degree, 1e-12)
    # Discrete steps: the trapezoid rule's error vanishes with their number.
    errors = []
    for length in (50, 800):
        f = ((np.arange(length) + 0.5) / length) ** degree
        c = hippo.memory("legs", f, SIZE)[-1]
        middle = np.linspace(0.3, 1, 50) * length
        errors.append(np.abs(hippo.reconstruct("legs", c, middle, length) - (middle / length) ** degree).max())
    assert errors[1] < 0.1 * errors[0] or errors[1] < 1e-12


def test_legs_is_a_projection():
    """With a zero-order hold c_t is the integral of the steps against the stretched Legendre polynomials."""
    f = signal(6)
    c = hippo.memory("legs", f, SIZE, method="zoh")
    for t in range(1, 7):
        integral = sum(f[s] * WEIGHTS @ hippo.basis("legs", SIZE, (s + NODES) / t) / t for s in range(t))
        assert_close(c[t - 1], integral, 1e-10)


@pytest.mark.parametrize("measure", hippo.MEASURES)
def test_basis_is_orthonormal(measure):
    if measure == "lagt":
        nodes, weights = np.polynomial.laguerre.laggauss(20)
        weights = weights * np.exp(nodes)
    else:
        nodes, weights = NODES, WEIGHTS
    functions = hippo.basis(measure, SIZE, nodes)
    expected = np.eye(SIZE)
    if measure == "fourier":
        expected[1, 1] = 0  # the sine of frequency 0
    np.testing.assert_allclose((functions.T * weights) @ functions, expected, atol=1e-10)


@pytest.mark.parametrize("measure", hippo.MEASURES)
def test_errors_fall_with_size(measure):
    """A smooth signal is reconstructed, the better the larger N."""
    window = 20.0 if measure == "lagt" else 100.0
    t = np.arange(600)
    f = lambda t: np.sin(2 * np.pi * t / 130) + 0.5 * np.cos(2 * np.pi * t / 70 + 1)
    times = np.arange(520.0, 590.0) if measure != "legs" else np.arange(20.0, 580.0)
    errors = []
    for size in (4, 12, 32):
        c = hippo.memory(measure, f(t + 0.5), size, window)[-1]
        found = hippo.reconstruct(measure, c, times, 600.0, window)
        errors.append(np.sqrt(np.mean((found - f(times)) ** 2)))
    assert errors[0] > errors[1] and errors[0] > 5 * errors[2], errors


@pytest.mark.parametrize("method", hippo.METHODS)
def test_discretisations(method):
    """Of c' = -c + 2 f, by hand; and that small steps of all methods agree."""
    a, b = hippo.discretize(-np.eye(1), 2 * np.ones(1), 0.5, method)
    expected = {"forward": (0.5, 1.0), "backward": (1 / 1.5, 1 / 1.5), "bilinear": (0.75 / 1.25, 0.8)}
    expected["zoh"] = np.exp(-0.5), 2 * (1 - np.exp(-0.5))
    assert_close([a[0, 0], b[0]], expected[method], 1e-12)


@pytest.mark.parametrize("measure", hippo.MEASURES)
def test_normal_plus_low_rank(measure):
    """V (Diag(L) - P P*) V* is A, V is unitary, and L comes in conjugate pairs."""
    A, B = hippo.transition(measure, SIZE)
    L, V, P, b = hippo.normal_plus_low_rank(measure, SIZE)
    np.testing.assert_allclose(V @ V.conj().T, np.eye(SIZE), atol=1e-12)
    np.testing.assert_allclose(V @ (np.diag(L) - P @ P.conj().T) @ V.conj().T, A, atol=1e-10)
    np.testing.assert_allclose(V @ b, B, atol=1e-12)
    np.testing.assert_allclose(L[SIZE // 2 :], L[: SIZE // 2][::-1].conj(), atol=1e-12)
    assert (L.imag[SIZE // 2 :] > -1e-12).all()


def test_errors():
    with pytest.raises(UserError, match=r"measure='leg' is unknown; did you mean.*'legs'"):
        hippo.transition("leg", 4)
    with pytest.raises(UserError, match="even"):
        hippo.transition("fourier", 3)
    with pytest.raises(UserError, match="discretisation"):
        hippo.discretize(np.eye(2), np.ones(2), 0.1, "euler")
    with pytest.raises(ValueError, match="positions"):
        hippo_memory(jnp.zeros((1, 2, 1)), "legs", 4, segment_ids=jnp.ones((1, 2), jnp.int32))


@pytest.mark.parametrize("measure", hippo.MEASURES)
def test_memory(measure):
    """Chunks of several sizes, packed rows and a continued sequence, against the recurrence in float64."""
    f = signal(13, 2, 3).swapaxes(1, 2).astype(np.float32)
    ids = np.array([[1] * 6 + [2] * 4 + [0] * 3, [4] * 13])
    positions = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1, 2], range(13)])
    expected = np.zeros((2, 13, 3, SIZE))
    for row, start, end in ((0, 0, 6), (0, 6, 10), (1, 0, 13)):
        for h in range(3):
            expected[row, start:end, h] = hippo.memory(measure, f[row, start:end, h], SIZE, 5.0, "zoh")

    @jax.jit
    def run(f):
        call = lambda part, state, size: hippo_memory(
            f[:, part], measure, SIZE, window=5.0, initial_state=state, chunk_size=size,
            segment_ids=jnp.asarray(ids[:, part]), positions=jnp.asarray(positions[:, part]),
        )  # fmt: skip
        first, state = call(slice(0, 4), None, 32)
        second, state = call(slice(4, 13), state, 2)
        return (
            jnp.concatenate([first, second], 1),
            state,
            hippo_memory(f[1:], measure, SIZE, window=5.0, chunk_size=4)[0],
        )

    packed, state, whole = run(f)
    assert_close(packed, expected)
    assert_close(state, expected[:, -1])
    assert_close(whole, expected[1:])
