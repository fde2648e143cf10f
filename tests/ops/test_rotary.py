import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.rotary import alibi_slopes, rotary


def turned(x, positions, theta, pairs):
    """Each pair of channels as a complex number times exp(i p theta), in float64."""
    y = np.array(x, np.float64)
    for b, t, h in np.ndindex(*x.shape[:3]):
        for i, (first, second) in enumerate(pairs):
            z = complex(x[b, t, h, first], x[b, t, h, second])
            z *= np.exp(1j * float(positions[b, t]) * float(theta[i]))
            y[b, t, h, first], y[b, t, h, second] = z.real, z.imag
    return y


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotation(layout):
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 1000], [0, 1, 0, 1, 2]])
    pairs = [(i, i + 4) if layout == "half" else (2 * i, 2 * i + 1) for i in range(4)]
    for base in (10000.0, 100.0):
        theta = [base ** (-2 * i / 8) for i in range(4)]
        y = rotary(x, positions, base=base, layout=layout)
        np.testing.assert_allclose(y, turned(x, positions, theta, pairs), atol=3e-4)  # float32 angles up to 1000
        np.testing.assert_allclose(y[:, :4], turned(x, positions, theta, pairs)[:, :4], atol=1e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_fewer_frequencies_turn_only_the_first_channels(layout):
    x = np.random.default_rng(1).standard_normal((1, 4, 2, 7)).astype(np.float32)
    positions = np.arange(4)[None]
    theta = np.array([0.7, 0.1])
    pairs = [(0, 2), (1, 3)] if layout == "half" else [(0, 1), (2, 3)]
    y = rotary(x, positions, frequencies=theta, layout=layout)
    np.testing.assert_allclose(y, turned(x, positions, theta, pairs), atol=1e-6)
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])


def test_products_depend_on_the_distance_only():
    random = np.random.default_rng(2)
    q, k = (np.tile(random.standard_normal((1, 1, 2, 16)), (1, 9, 1, 1)) for _ in range(2))
    positions = np.arange(9)[None]
    with jax.enable_x64(True):
        turned_q, turned_k = rotary(q, positions), rotary(k, positions + 5)
        assert turned_q.dtype == np.float64
        scores = np.einsum("bihk,bjhk->hij", turned_q, turned_k)
    np.testing.assert_allclose(scores[:, 1:, 1:], scores[:, :-1, :-1], rtol=1e-12, atol=1e-12)
    assert np.ptp(scores[0, 0]) > 0.1


def test_dtype_and_gradients():
    x = np.random.default_rng(3).standard_normal((1, 3, 1, 4)).astype(np.float32)
    positions = np.array([[0, 1, 50]])
    half = rotary(jnp.asarray(x, jnp.bfloat16), positions)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), rotary(x, positions), atol=3e-2)

    # A rotation is orthogonal: it is undone by the transpose, which is the gradient.
    pull_back = jax.vjp(lambda x: rotary(x, positions), x)[1]
    np.testing.assert_allclose(pull_back(rotary(x, positions))[0], x, atol=1e-6)

    def first(frequencies):
        return rotary(x, positions, frequencies=frequencies)[0, 2, 0, 0]

    theta, step = np.array([0.02, 0.01], np.float32), 1e-3
    slope = (first(theta + [step, 0]) - first(theta - [step, 0])) / (2 * step)
    np.testing.assert_allclose(jax.grad(first)(theta), [slope, 0], rtol=1e-2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "options, message",
    [
        ({"layout": "full"}, "layout"),
        ({"positions": np.zeros((2, 3))}, "positions"),
        ({"positions": np.zeros(4)}, "positions"),
        ({"frequencies": np.zeros(4)}, "frequencies"),
        ({"frequencies": np.zeros((1, 2))}, "frequencies"),
        ({"x": np.zeros((2, 4, 1, 5), np.float32)}, "even"),
    ],
)
def test_errors(options, message):
    arrays = {"x": np.zeros((2, 4, 1, 6), np.float32), "positions": np.zeros((2, 4), int)}
    with pytest.raises(ValueError, match=message):
        rotary(**(arrays | options))


def test_alibi_slopes():
    np.testing.assert_allclose(alibi_slopes(8), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    np.testing.assert_allclose(alibi_slopes(1), [1 / 256])
    root = math.sqrt(0.5)
    expected = [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]  # 4 heads, then every second of 8
    np.testing.assert_allclose(alibi_slopes(6), expected)
    # 12 heads, as in the authors' example: 8 heads, then every second of 16.
    np.testing.assert_allclose(alibi_slopes(12)[8:], [root, root**3, root**5, root**7], rtol=1e-6)
    assert alibi_slopes(12).dtype == jnp.float32
    with pytest.raises(ValueError, match="at least one"):
        alibi_slopes(0)
