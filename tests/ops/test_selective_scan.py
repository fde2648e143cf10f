import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch, pallas_selective_scan
from ops.selective_scan import selective_scan
from tests.traced import equations

IMPLEMENTATIONS = ["reference", "sequential", "chunked"]
TOLERANCE = 1e-5  # of the largest entry expected, float32
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")
IDS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0, 3, 3, 3, 3], [0, 0, 4, 4, 4, 4, 5, 6, 6, 6, 6, 0, 0]])
CHUNK = 4  # so that restarts fall on borders of chunks and between them, and the last chunk is not full


def draw(ids, log_step, seed=0):
    """Arguments in the order of NAMES."""
    random = np.random.default_rng(seed)
    (batch, length), width, states = ids.shape, 3, 2
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)
    dt = np.exp(log_step + 0.3 * normal(batch, length, width))
    A = -np.exp(0.3 * normal(width, states))
    B, C = normal(batch, length, states), normal(batch, length, states)
    return [normal(batch, length, width), dt, A, B, C, normal(width), normal(batch, states, width)]


def oracle(x, dt, A, B, C, D, state, ids):
    x, dt, A, B, C, D = (z.astype(np.float64) for z in (x, dt, A, B, C, D))
    y, state = np.zeros(x.shape), state.astype(np.float64)
    for t, i in np.ndindex(ids.shape[::-1]):
        if t and ids[i, t] != ids[i, t - 1]:
            state[i] = 0
        if ids[i, t]:
            for d, n in np.ndindex(A.shape):
                decay = np.exp(dt[i, t, d] * A[d, n])
                state[i, n, d] = decay * state[i, n, d] + dt[i, t, d] * B[i, t, n] * x[i, t, d]
            y[i, t] = C[i, t] @ state[i] + D * x[i, t]
    return y, state


def poison(arguments, ids):
    """NaN on padding."""
    padding = (ids == 0)[..., None]
    return [np.where(padding, np.float32(np.nan), z) if z.shape[:2] == ids.shape else z for z in arguments]


def outputs_and_gradients(implementation, arguments, ids, cotangents):
    def f(*arguments):
        *arguments, state = arguments
        return selective_scan(
            *arguments, initial_state=state, segment_ids=ids, implementation=implementation, chunk_size=CHUNK
        )

    outputs, pull_back = jax.vjp(f, *arguments)
    return outputs, pull_back(cotangents)


CASES = {
    "mild": (IDS, -1.0),
    "strong": (np.ones((2, 7), int), 3.0),  # log-decay of -20 a token
    "one token": (IDS[:, :1], -1.0),
    "whole chunks": (np.ones((2, 8), int), -1.0),
}


def run_cases(implementation, dtype):
    arguments = {}
    for name, (ids, log_step) in CASES.items():
        random = np.random.default_rng(9)
        inputs = draw(ids, log_step)
        cotangents = tuple(random.standard_normal(inputs[i].shape) for i in (0, 6))
        arrays = jax.tree.map(lambda z: jnp.asarray(z, dtype), (poison(inputs, ids), cotangents))
        arguments[name] = (arrays[0], None if np.all(ids == 1) else jnp.asarray(ids), arrays[1])
    return jax.jit(lambda a: {name: outputs_and_gradients(implementation, *x) for name, x in a.items()})(arguments)


@pytest.fixture(scope="module")
def expected():
    """Outputs by a loop in numpy; gradients of the reference, which the loop confirms, in float64."""
    with jax.enable_x64(True):
        result = jax.tree.map(np.asarray, run_cases("reference", jnp.float64))
    for name, (ids, log_step) in CASES.items():
        for actual, value in zip(result[name][0], oracle(*draw(ids, log_step), ids), strict=True):
            np.testing.assert_allclose(actual, value, rtol=1e-12, atol=1e-12)
    return result


def assert_close(actual, expected, tolerance, message):
    for name, x, y in zip(("y", "state", *NAMES), jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        error, scale = np.max(np.abs(np.asarray(x, np.float64) - y)), np.max(np.abs(y))
        assert error <= tolerance * scale, f"{message}, {name}: {error} against {scale}"


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "blocked", "pallas"])
def test_against_a_loop(implementation, expected, monkeypatch):
    """Values, final states and all gradients, with NaN on padding; 13 tokens are several chunks, or blocks of 8, and a rest."""
    monkeypatch.setattr(pallas_selective_scan, "BLOCK", 8)
    for name, actual in run_cases(implementation, jnp.float32).items():
        assert actual[0][0].dtype == actual[0][1].dtype == jnp.float32
        assert_close(actual, expected[name], TOLERANCE, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_double_precision(implementation, expected):
    with jax.enable_x64(True):
        actual = run_cases(implementation, jnp.float64)
    for name in CASES:
        assert_close(actual[name], expected[name], 1e-13, name)


def test_gradient_by_differences(expected):
    """The reference's gradient itself, along one direction in all arguments."""
    ids, log_step = CASES["mild"]
    outputs, gradients = expected["mild"]
    inputs, random = [z.astype(np.float64) for z in draw(ids, log_step)], np.random.default_rng(9)
    cotangents = [random.standard_normal(z.shape).astype(np.float64) for z in outputs]
    direction = [random.standard_normal(z.shape) for z in inputs]
    value = lambda step: sum(
        np.sum(g * y)
        for g, y in zip(
            cotangents, oracle(*(z + step * v for z, v in zip(inputs, direction, strict=True)), ids), strict=True
        )
    )
    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    np.testing.assert_allclose(sum(np.sum(g * v) for g, v in zip(gradients, direction, strict=True)), slope, rtol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cut_anywhere(implementation):
    """The state carries a sequence over a cut; where the cut is between two segments, the caller drops it."""
    x, dt, A, B, C, D, h0 = draw(IDS, -1.0)

    @jax.jit
    def run(x, dt, B, C, h0, ids):
        options = {"initial_state": h0, "segment_ids": ids, "implementation": implementation, "chunk_size": CHUNK}
        return selective_scan(x, dt, A, B, C, D, **options)

    expected, expected_state = run(x, dt, B, C, h0, IDS)
    for cut in (1, 6, 12):
        first, state = run(*(z[:, :cut] for z in (x, dt, B, C)), h0, IDS[:, :cut])
        state *= (IDS[:, cut] == IDS[:, cut - 1])[:, None, None]
        second, final = run(*(z[:, cut:] for z in (x, dt, B, C)), state, IDS[:, cut:])
        np.testing.assert_allclose(np.concatenate([first, second], 1), expected, atol=1e-5)
        np.testing.assert_allclose(final, expected_state, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packing(implementation):
    """A packed row is its documents one after the other, whatever lies between them."""
    ids = np.array([[1, 1, 1, 0, 2, 2, 2, 2, 2]])
    x, dt, A, B, C, D, _ = draw(ids, -1.0)
    options = {"implementation": implementation, "chunk_size": CHUNK}
    run = jax.jit(lambda x, dt, B, C, ids: selective_scan(x, dt, A, B, C, D, segment_ids=ids, **options))
    x, dt, B, C = poison([x, dt, B, C], ids)
    packed, final = run(x, dt, B, C, ids)
    for part in (slice(0, 3), slice(4, 9)):
        alone, state = run(*(z[:, part] for z in (x, dt, B, C)), None)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)
    np.testing.assert_allclose(final, state, atol=1e-5)
    assert np.all(np.asarray(packed)[:, 3] == 0)


def test_states_of_all_tokens_never_exist():
    """Nothing that the gradient computes holds [B, T, D, N]."""
    ids = np.ones((2, 256), int)
    *arguments, h0 = draw(ids, -1.0)
    for implementation in IMPLEMENTATIONS[1:]:
        f = lambda *a, i=implementation: selective_scan(*a, initial_state=h0, implementation=i)[0].sum()
        jaxpr = jax.make_jaxpr(jax.grad(f, argnums=range(6)))(*arguments)
        largest = max(np.prod(v.aval.shape) for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars)
        assert largest < 0.6 * 2 * 256 * 3 * 2


@pytest.mark.parametrize("implementation", ["auto", "pallas"])
def test_bfloat16(implementation):
    ids = np.ones((2, 33), int)
    x, dt, A, B, C, D, _ = map(jnp.asarray, draw(ids, -1.0))
    x, B, C = (z.astype(jnp.bfloat16) for z in (x, B, C))
    y, state = selective_scan(x, dt, A, B, C, D, implementation=implementation)
    expected, expected_state = selective_scan(x.astype(jnp.float32), dt, A, B, C, D)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=1e-2 * np.abs(expected).max())
    np.testing.assert_allclose(state, expected_state, rtol=1e-6)


def test_the_kernel_is_taken_where_it_fits():
    """On TPUs; of channels that fill registers, of states that are not too many, and not in double precision."""
    cases = [("tpu", 256, 16, "pallas"), ("gpu", 256, 16, "blocked"), ("cpu", 256, 16, "sequential")]
    for platform, width, states, form in [*cases, ("tpu", 192, 16, "chunked"), ("tpu", 256, 65, "chunked")]:
        shapes = [(2, 8, width)] * 2 + [(width, states)] + [(2, 8, states)] * 2
        with dispatch.platform(platform), dispatch.implementation("auto") as choice:
            arrays = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
            jax.eval_shape(lambda *arrays: selective_scan(*arrays), *arrays)  # a new function, which is traced anew
        assert choice.taken["selective_scan"] == {form}
    with jax.enable_x64(True), pytest.raises(ValueError, match="not offered"):
        selective_scan(*(jnp.ones(shape) for shape in shapes), implementation="pallas")


@pytest.mark.usefixtures("unchecked")
def test_errors():
    x, dt, A, B, C, D, h0 = draw(np.ones((2, 4), int), -1.0)
    for arguments, options in [
        ((x, dt, A, B, C), {"implementation": "associative"}),
        ((x[0], dt, A, B, C), {}),
        ((x, dt[:1], A, B, C), {}),
        ((x, dt, A.T, B, C), {}),
        ((x, dt, A, B[..., :1], C), {}),
        ((x, dt, A, B, C[..., :1]), {}),
        ((x, dt, A, B, C, D[:1]), {}),
        ((x, dt, A, B, C), {"initial_state": h0.swapaxes(1, 2)}),
        ((x, dt, A, B, C), {"segment_ids": np.ones((2, 3), int)}),
    ]:
        with pytest.raises(ValueError):
            selective_scan(*arguments, **options)
