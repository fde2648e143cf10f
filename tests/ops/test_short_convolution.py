import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.short_convolution import short_convolution

TOLERANCE = 1e-5  # of the largest entry expected, float32
WIDTH = 3
ROWS = np.array(
    [
        [1, 1, 1, 2, 2, 2, 2, 0, 0, 3, 3, 3, 3],
        [0, 0, 4, 4, 4, 4, 5, 6, 6, 6, 7, 7, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 8, 8],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)
# segment ids and number of taps
CASES = [(ROWS, 4), (ROWS[:, :1], 4), (ROWS[:, :2], 4), (ROWS, 1), (ROWS, 2), (np.ones((1, 7), int), 9)]


def draw(ids, taps, seed=0):
    """x, weight, bias, initial state, cotangent of y, cotangent of the state."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)
    batch, length = ids.shape
    state = (batch, taps - 1, WIDTH)
    return (
        normal(batch, length, WIDTH),
        normal(taps, WIDTH),
        normal(WIDTH),
        normal(*state),
        normal(*ids.shape, WIDTH),
        normal(*state),
    )


def oracle(x, weight, bias, state, dy, dstate, ids):
    """y, state and the gradients to x, weight, bias and the initial state, with a queue for each row, in float64."""
    x, weight, bias, state, dy, dstate = (z.astype(np.float64) for z in (x, weight, bias, state, dy, dstate))
    y, dx, dweight, dbias, dinitial = map(np.zeros_like, (x, x, weight, bias, state))
    final = np.zeros_like(state)
    for i, row in enumerate(ids):
        # Entries are (value, where its gradient goes).
        queue = list(zip(state[i], dinitial[i], strict=True))
        for t, segment in enumerate(row):
            if t and segment != row[t - 1]:
                queue = [(np.zeros(WIDTH), np.zeros(WIDTH)) for _ in queue]
            if segment == 0:
                continue
            queue.append((x[i, t], dx[i, t]))
            y[i, t] = bias + sum(w * value for w, (value, _) in zip(weight, queue, strict=True))
            dbias += dy[i, t]
            for j, (value, gradient) in enumerate(queue):
                dweight[j] += value * dy[i, t]
                gradient += weight[j] * dy[i, t]
            queue.pop(0)
        for j, (value, gradient) in enumerate(queue):
            final[i, j] = value
            gradient += dstate[i, j]
    return y, final, dx, dweight, dbias, dinitial


def poison(x, ids):
    """NaN on padding."""
    return np.where((ids == 0)[..., None], np.float32(np.nan), x)


def run(x, weight, bias, state, dy, dstate, ids):
    f = lambda x, weight, bias, state: short_convolution(x, weight, bias, initial_state=state, segment_ids=ids)
    outputs, pull_back = jax.vjp(f, x, weight, bias, state)
    return *outputs, *pull_back((dy, dstate))


def check(dtype, tolerance):
    arguments = []
    for ids, taps in CASES:
        x, *others = draw(ids, taps)
        arrays = [jnp.asarray(z, dtype) for z in (poison(x, ids), *others)]
        arguments.append((*arrays, None if np.all(ids == 1) else jnp.asarray(ids)))
    results = jax.jit(lambda arguments: [run(*a) for a in arguments])(arguments)
    for (ids, taps), actual in zip(CASES, results, strict=True):
        for u, v in zip(actual, oracle(*draw(ids, taps), ids), strict=True):
            assert u.dtype == dtype and u.shape == v.shape
            error, scale = np.max(np.abs(np.asarray(u, np.float64) - v), initial=0), np.max(np.abs(v), initial=0)
            assert error <= tolerance * scale, f"{ids.shape}, {taps} taps: {error} against {scale}"


def test_against_a_queue():
    """Values, final states and all gradients, with NaN on padding."""
    check(jnp.float32, TOLERANCE)


def test_double_precision():
    with jax.enable_x64(True):
        check(jnp.float64, 1e-14)


def test_cut_anywhere():
    """The state carries a sequence over a cut; where the cut is between two segments, the caller drops it."""
    x, weight, bias, h0, _, _ = draw(ROWS, 4)
    f = jax.jit(lambda x, h0, ids: short_convolution(x, weight, bias, initial_state=h0, segment_ids=ids))
    expected, expected_state = f(x, h0, ROWS)
    for cut in range(1, 13):
        first, state = f(x[:, :cut], h0, ROWS[:, :cut])
        state *= (ROWS[:, cut] == ROWS[:, cut - 1])[:, None, None]
        second, final = f(x[:, cut:], state, ROWS[:, cut:])
        np.testing.assert_allclose(np.concatenate([first, second], 1), expected, atol=1e-6)
        np.testing.assert_array_equal(final, expected_state)


def test_packing():
    """A packed row is its documents one after the other, whatever lies between them."""
    ids = np.array([[1, 1, 1, 0, 2, 2, 2, 2, 2, 3, 3]])
    x, weight, bias, *_ = draw(ids, 4)
    packed, final = short_convolution(poison(x, ids), weight, bias, segment_ids=ids)
    for part in (slice(0, 3), slice(4, 9), slice(9, 11)):
        alone, state = short_convolution(x[:, part], weight, bias)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-6)
    np.testing.assert_array_equal(final, state)
    assert np.all(np.asarray(packed)[:, 3] == 0)


def test_bfloat16():
    x, weight, bias, state, _, _ = draw(np.ones((2, 9), int), 4)
    y, final = short_convolution(x.astype(jnp.bfloat16), weight, bias, initial_state=state)
    expected, _ = short_convolution(x, weight, bias, initial_state=state)
    assert y.dtype == final.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=2e-2 * np.abs(expected).max())


@pytest.mark.usefixtures("unchecked")
def test_errors():
    x, weight, bias, state, _, _ = draw(ROWS, 4)
    for arguments, options in [
        ((x[0], weight), {}),
        ((x, weight.T), {}),
        ((x, weight, bias[:1]), {}),
        ((x, weight), {"initial_state": state[:, :1]}),
        ((x, weight), {"segment_ids": ROWS[:, :5]}),
    ]:
        with pytest.raises(ValueError):
            short_convolution(*arguments, **options)
