import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch, matmul_fourier
from ops.long_convolution import long_convolution, vandermonde_kernel
from ops.matmul_fourier import Plan

TOLERANCE = 1e-5  # of the largest entry expected, float32
# length of the sequence, of the kernel and of the bidirectional kernel (0: none)
CASES = [(1, 1, 1), (1, 5, 3), (2, 2, 0), (13, 13, 0), (13, 13, 13), (16, 5, 9), (7, 20, 30), (31, 1, 31), (31, 31, 1)]


def draw(length, lags, future_lags, seed=0):
    """x, kernel, bidirectional kernel or None, skip, cotangent of y."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)
    future = normal(3, future_lags) if future_lags else None
    return normal(2, length, 3), normal(3, lags), future, normal(3), normal(2, length, 3)


def oracle(x, kernel, future, skip, dy):
    """y and the gradients to x, kernel, bidirectional kernel and skip, from the definition, in float64."""
    x, kernel, skip, dy = (z.astype(np.float64) for z in (x, kernel, skip, dy))
    future = np.zeros((3, 1)) if future is None else future.astype(np.float64)
    y, dx, dkernel, dfuture = x * skip, dy * skip, np.zeros_like(kernel), np.zeros_like(future)
    for t, s in np.ndindex(x.shape[1], x.shape[1]):
        lag = t - s
        k, dk, index = (kernel, dkernel, lag) if lag >= 0 else (future, dfuture, -lag)
        if index < k.shape[1]:
            y[:, t] += k[:, index] * x[:, s]
            dx[:, s] += k[:, index] * dy[:, t]
            dk[:, index] += np.sum(x[:, s] * dy[:, t], axis=0)
    return y, dx, dkernel, dfuture, np.sum(x * dy, axis=(0, 1))


def assert_close(actual, expected, tolerance, message):
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape, message
        error, scale = np.max(np.abs(np.asarray(x, np.float64) - y)), np.max(np.abs(y))
        assert error <= tolerance * scale, f"{message}: {error} against {scale}"


def run(x, kernel, future, skip, dy, form="auto"):
    options = {"implementation": form}
    f = lambda x, kernel, future, skip: long_convolution(x, kernel, bidirectional_kernel=future, skip=skip, **options)
    y, pull_back = jax.vjp(f, x, kernel, future, skip)
    return y, *(g for g in pull_back(dy) if g is not None)


def check(dtype, tolerance, form):
    arguments = [jax.tree.map(lambda z: jnp.asarray(z, dtype), draw(*case)) for case in CASES]
    results = jax.jit(lambda arguments: [run(*a, form) for a in arguments])(arguments)
    for case, actual in zip(CASES, results, strict=True):
        expected = oracle(*draw(*case))
        if case[2] == 0:
            expected = expected[:3] + expected[4:]
        assert all(z.dtype == dtype for z in actual)
        assert_close(actual, expected, tolerance, str(case))


@pytest.mark.parametrize("form", ["reference", "fft", "matmul"])
def test_against_the_sum(form):
    """Values and all gradients, kernels longer and shorter than the sequence, one way and both ways."""
    check(jnp.float32, TOLERANCE, form)


@pytest.mark.parametrize("form", ["fft", "matmul"])
def test_double_precision(form):
    with jax.enable_x64(True):
        check(jnp.float64, 1e-13, form)


@pytest.mark.parametrize("points", [1, 2, 63, 64, 1000, 70_001])
def test_plans(points):
    """A plan has room for the points, wastes few of them, and no dense transform is large."""
    plan = matmul_fourier.plan(points)
    assert points <= plan.size <= points + 2 * plan.columns and plan.rows % 2 == 0
    assert max(plan.rows, *plan.factors) <= 2 * max(2, points ** (1 / (1 + len(plan.factors))))


@pytest.mark.parametrize("plan", [Plan(6, (4,)), Plan(6, (4, 2)), Plan(2, (2, 2, 4))])
def test_transform_by_products(plan):
    """Each point of NumPy's transform is there, as itself or as the conjugate of its mirror image; and the way back."""
    x = np.random.default_rng(0).standard_normal((2, plan.size - 1, 3))
    with jax.enable_x64(True):
        z = matmul_fourier.spectrum(jnp.asarray(x), plan)
        back = matmul_fourier.inverse(z, plan, plan.size - 1)
    np.testing.assert_allclose(back, x, atol=1e-13)
    z = np.asarray(z)
    found = (z[:, :, 0] + 1j * z[:, :, 1]).reshape(2, -1, 3)
    expected = np.fft.fft(x, plan.size, axis=1)
    distance = lambda a, b: np.abs(a[:, :, None] - b[:, None]).max((0, 3))
    both = np.concatenate([found, found.conj()], 1)
    assert distance(expected, both).min(1).max() < 1e-12 and distance(found, expected).min(1).max() < 1e-12


@pytest.mark.parametrize("form", ["fft", "matmul"])
@pytest.mark.parametrize("length", [509, 1000])
def test_long(length, form):
    """Prime and composite lengths, where the transform is padded beyond the next even number and where it is not."""
    x, kernel, _, _, _ = draw(length, length, 0)
    y = jax.jit(functools.partial(long_convolution, implementation=form))(x, kernel)
    expected = [[np.convolve(x[b, :, d], kernel[d].astype(np.float64))[:length] for d in range(3)] for b in range(2)]
    assert_close([y], [np.swapaxes(expected, 1, 2)], TOLERANCE, "y")


def test_causal():
    """What comes later changes nothing, to the rounding of one transform."""
    x, kernel, _, _, _ = draw(64, 64, 0)
    later = np.where(np.arange(64)[:, None] < 40, x, x + 1)
    y, changed = jax.vmap(long_convolution, (0, None))(jnp.stack([x, later]), kernel)
    np.testing.assert_allclose(y[:, :40], changed[:, :40], atol=TOLERANCE * np.abs(y).max())
    assert np.all(np.abs(y - changed)[:, 40:].max((0, 2)) > 0)


@pytest.mark.parametrize("form", ["fft", "matmul"])
def test_bfloat16(form):
    x, kernel, future, skip, dy = draw(33, 33, 33)
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    y, dx, dkernel, *_ = run(x, kernel, future, skip, dy, form)
    expected = oracle(*(np.asarray(z, np.float32) for z in (x, kernel, future, skip, dy)))
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert_close([y.astype(jnp.float32), dx.astype(jnp.float32)], expected[:2], 5e-3, "y, dx")
    assert_close([dkernel], [expected[2]], TOLERANCE, "dkernel")


def test_what_a_platform_gets():
    """XLA's transform stays out of programs for TPUs."""
    x, kernel, *_ = draw(8, 8, 0)
    for platform, transforms in (("tpu", False), ("gpu", True), ("cpu", True)):
        with dispatch.platform(platform):
            program = str(jax.make_jaxpr(jax.grad(lambda x: long_convolution(x, kernel).sum()))(x))
        assert ("fft" in program) == transforms


@pytest.mark.usefixtures("unchecked")
def test_convolution_errors():
    x, kernel, future, skip, _ = draw(4, 4, 4)
    for arguments, options in [
        ((x[0], kernel), {}),
        ((x, kernel[:2]), {}),
        ((x, kernel.T[:, :1]), {}),
        ((x, kernel[:, :0]), {}),
        ((x, kernel), {"bidirectional_kernel": future[0]}),
        ((x, kernel), {"skip": skip[:2]}),
    ]:
        with pytest.raises(ValueError):
            long_convolution(*arguments, **options)


def draw_state_space(seed=0):
    random = np.random.default_rng(seed)
    log_a = -np.exp(random.uniform(-7, 1, (2, 4))) + 1j * random.uniform(0, np.pi, (2, 4))
    return log_a, random.standard_normal((2, 4)) + 1j * random.standard_normal((2, 4))


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 61, 1000])
def test_vandermonde_kernel(length):
    log_a, c = draw_state_space()
    expected = 2 * np.einsum("dn,dnl->dl", c, np.exp(log_a[..., None] * np.arange(length))).real
    with jax.enable_x64(True):
        kernel = vandermonde_kernel((log_a.real, log_a.imag), (c.real, c.imag), length)
        assert kernel.dtype == jnp.float64
        np.testing.assert_allclose(kernel, expected, atol=1e-12 * np.abs(expected).max())
    pairs = [(np.float32(z.real), np.float32(z.imag)) for z in (log_a, c)]
    kernel = vandermonde_kernel(*pairs, length)
    assert kernel.dtype == jnp.float32
    np.testing.assert_allclose(kernel, expected, atol=(1 + length / 30) * 1e-6 * np.abs(expected).max())


def test_vandermonde_gradients():
    log_a, c = draw_state_space()
    weights, lags = np.random.default_rng(1).standard_normal((2, 61)), np.arange(61)
    with jax.enable_x64(True):
        f = lambda log_a, c: jnp.sum(weights * vandermonde_kernel(log_a, c, 61))
        actual = jax.jit(jax.grad(f, (0, 1)))((log_a.real, log_a.imag), (c.real, c.imag))
        powers = np.exp(log_a[..., None] * lags)
        dc = 2 * np.conj(np.einsum("dl,dnl->dn", weights, powers))
        dlog_a = 2 * np.conj(c * np.einsum("dl,dnl->dn", weights * lags, powers))
        for (re, im), expected in zip(actual, (dlog_a, dc), strict=True):
            np.testing.assert_allclose(np.asarray(re) + 1j * np.asarray(im), expected, rtol=1e-10)


@pytest.mark.usefixtures("unchecked")
def test_vandermonde_errors():
    x = np.zeros((2, 4))
    for log_a, c in [((x, x[:, :1]), (x, x)), ((x, x), (x[:1], x[:1])), ((x[0], x[0]), (x[0], x[0]))]:
        with pytest.raises(ValueError):
            vandermonde_kernel(log_a, c, 8)
