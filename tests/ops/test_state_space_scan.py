import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.long_convolution import long_convolution, vandermonde_kernel
from ops.state_space_scan import state_space_scan

IMPLEMENTATIONS = ["reference", "sequential", "chunked"]
TOLERANCE = 1e-5  # of the largest entry expected, float32
NAMES = ("y", "state re", "state im", "dx", "da re", "da im", "db re", "db im", "dc re", "dc im", "dh0 re", "dh0 im")
IDS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0, 3, 3, 3, 3], [0, 0, 4, 4, 4, 4, 5, 6, 6, 6, 6, 0, 0]])
CHUNK = 4  # so that restarts fall on borders of chunks and between them, and the last chunk is not full
CASES = {
    "decay": (IDS, 0.9),
    "|a| = 1": (np.ones((2, 7), int), 1.0),
    "strong decay": (np.ones((2, 8), int), np.exp(-20.0)),
    "one token": (IDS[:, :1], 0.9),
}


def draw(ids, magnitude, seed=0):
    """x, a, b, c, initial state, cotangent of y, cotangent of the state; all but x and the cotangent of y complex."""
    random = np.random.default_rng(seed)
    (batch, length), width, states = ids.shape, 3, 2
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)
    pair = lambda *shape: normal(*shape) + 1j * normal(*shape)
    a = (magnitude * np.exp(1j * normal(width, states))).astype(np.complex64)
    state = (batch, states, width)
    x, dy = normal(batch, length, width), normal(batch, length, width)
    return x, a, pair(width, states), pair(width, states), pair(*state), dy, pair(*state)


def oracle(x, a, b, c, h0, dy, dh, ids):
    """Outputs and gradients in the order of NAMES, in double precision."""
    x, a, b, c, h, dy, lam = (z.astype(np.result_type(z, np.float64)) for z in (x, a.T, b.T, c.T, h0, dy, dh))
    restart = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    y, dx, (da, db, dc) = np.zeros(x.shape), np.zeros(x.shape), np.zeros((3, *a.shape), complex)
    before, after = {}, {}
    for t, i in np.ndindex(ids.shape[::-1]):
        before[t, i] = h[i] * (not restart[i, t])
        h[i] = after[t, i] = a * before[t, i] + b * x[i, t] if ids[i, t] else before[t, i]
        y[i, t] = 2 * np.sum(c * h[i], axis=0).real * (ids[i, t] != 0)
    for t, i in reversed(before):
        if ids[i, t]:
            dc += 2 * np.conj(after[t, i]) * dy[i, t]
            lam[i] += 2 * np.conj(c) * dy[i, t]
            dx[i, t] = np.sum(np.conj(b) * lam[i], axis=0).real
            db += lam[i] * x[i, t]
            da += lam[i] * np.conj(before[t, i])
            lam[i] *= np.conj(a)
        lam[i] *= not restart[i, t]
    pairs = (z for w in (da.T, db.T, dc.T, lam) for z in (w.real, w.imag))
    return y, h.real, h.imag, dx, *pairs


def parts(z):
    return np.ascontiguousarray(z.real), np.ascontiguousarray(z.imag)


def check(implementation, dtype, tolerance):
    arguments = {}
    for name, (ids, magnitude) in CASES.items():
        x, a, b, c, h0, dy, dh = draw(ids, magnitude)
        x = np.where((ids == 0)[..., None], np.float32(np.nan), x)
        arrays = jax.tree.map(lambda z: jnp.asarray(z, dtype), (x, *map(parts, (a, b, c, h0)), dy, parts(dh)))
        arguments[name] = (*arrays, None if np.all(ids == 1) else jnp.asarray(ids))

    def run(x, a, b, c, h0, dy, dh, ids):
        options = {"segment_ids": ids, "implementation": implementation, "chunk_size": CHUNK}
        f = lambda x, a, b, c, h0: state_space_scan(x, a, b, c, initial_state=h0, **options)
        outputs, pull_back = jax.vjp(f, x, a, b, c, h0)
        return outputs, pull_back((dy, dh))

    results = jax.jit(lambda a: {name: run(*z) for name, z in a.items()})(arguments)
    for name, actual in results.items():
        ids, magnitude = CASES[name]
        for which, u, v in zip(NAMES, jax.tree.leaves(actual), oracle(*draw(ids, magnitude), ids), strict=True):
            assert u.dtype == dtype and u.shape == v.shape
            error, scale = np.max(np.abs(np.asarray(u, np.float64) - v)), np.max(np.abs(v))
            assert error <= tolerance * scale, f"{name}, {which}: {error} against {scale}"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_against_a_loop(implementation):
    """Values, final states and all gradients, with NaN on padding."""
    check(implementation, jnp.float32, TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_double_precision(implementation):
    with jax.enable_x64(True):
        check(implementation, jnp.float64, 1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cut_anywhere(implementation):
    """The state carries a sequence over a cut; where the cut is between two segments, the caller drops it."""
    x, a, b, c, h0, _, _ = draw(IDS, 0.9)
    a, b, c, h0 = map(parts, (a, b, c, h0))

    @jax.jit
    def run(x, h0, ids):
        options = {"initial_state": h0, "segment_ids": ids, "implementation": implementation, "chunk_size": CHUNK}
        return state_space_scan(x, a, b, c, **options)

    expected, expected_state = run(x, h0, IDS)
    for cut in (1, 6, 12):
        first, state = run(x[:, :cut], h0, IDS[:, :cut])
        same = (IDS[:, cut] == IDS[:, cut - 1])[:, None, None]
        second, final = run(x[:, cut:], tuple(h * same for h in state), IDS[:, cut:])
        np.testing.assert_allclose(np.concatenate([first, second], 1), expected, atol=1e-5)
        np.testing.assert_allclose(final, expected_state, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packing(implementation):
    """A packed row is its documents one after the other, whatever lies between them."""
    ids = np.array([[1, 1, 1, 0, 2, 2, 2, 2, 2]])
    x, a, b, c, *_ = draw(ids, 0.9)
    a, b, c = map(parts, (a, b, c))
    options = {"implementation": implementation, "chunk_size": CHUNK}
    run = jax.jit(lambda x, ids: state_space_scan(x, a, b, c, segment_ids=ids, **options))
    packed, final = run(np.where((ids == 0)[..., None], np.float32(np.nan), x), ids)
    for part in (slice(0, 3), slice(4, 9)):
        alone, state = run(x[:, part], None)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)
    np.testing.assert_allclose(final, state, atol=1e-5)
    assert np.all(np.asarray(packed)[:, 3] == 0)


def test_equals_its_convolution():
    """The scan and the convolution with the Vandermonde kernel are two forms of one system."""
    x, a, b, c, *_ = draw(np.ones((2, 37), int), 0.95)
    kernel = vandermonde_kernel(parts(np.log(a)), parts(b * c), 37)
    y, _ = state_space_scan(x, parts(a), parts(b), parts(c))
    np.testing.assert_allclose(long_convolution(x, kernel), y, atol=1e-5 * np.abs(y).max())


def test_bfloat16():
    x, a, b, c, *_ = draw(np.ones((2, 33), int), 0.9)
    x, a, b, c = jnp.asarray(x, jnp.bfloat16), parts(a), parts(b), parts(c)
    y, state = state_space_scan(x, a, b, c)
    expected, expected_state = state_space_scan(x.astype(jnp.float32), a, b, c)
    assert (y.dtype, state[0].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=1e-2 * np.abs(expected).max())
    np.testing.assert_allclose(state, expected_state, rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    x, a, b, c, h0, *_ = draw(np.ones((2, 4), int), 0.9)
    a, b, c, h0 = map(parts, (a, b, c, h0))
    for arguments, options in [
        ((x, a, b, c), {"implementation": "associative"}),
        ((x[0], a, b, c), {}),
        ((x, a[:1], b, c), {}),
        ((x, a, b, tuple(z[:, :1] for z in c)), {}),
        ((x[..., :2], a, b, c), {}),
        ((x, a, b, c), {"initial_state": h0[:1]}),
        ((x, a, b, c), {"initial_state": tuple(h.swapaxes(1, 2) for h in h0)}),
        ((x, a, b, c), {"segment_ids": np.ones((2, 3), int)}),
    ]:
        with pytest.raises(ValueError):
            state_space_scan(*arguments, **options)
