import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import linear_recurrence as module
from ops import pallas_recurrence
from ops.linear_recurrence import linear_recurrence

IMPLEMENTATIONS = ["reference", "sequential", "associative"]
TOLERANCE = 1e-5  # of the largest entry expected, float32
IDS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0, 3, 3, 3, 3], [0, 0, 4, 4, 4, 4, 5, 6, 6, 6, 6, 0, 0]])
WHOLE = np.ones_like(IDS)


def oracle(a, b, h0, ids, dh, dfinal):
    """h, final state and the gradients to a, b and h0, token by token in double precision; `a` is [B, T, ...]."""
    h, previous, da, db = (np.zeros(b.shape, np.result_type(b, np.float64)) for _ in range(4))
    state = np.array(h0, h.dtype)
    restarts = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    for t, i in np.ndindex(ids.shape[::-1]):
        state[i] = 0 if restarts[i, t] else state[i]
        previous[i, t] = state[i]
        if ids[i, t]:
            h[i, t] = state[i] = a[i, t].astype(h.dtype) * state[i] + b[i, t]
    final, lam = state.copy(), np.array(dfinal, h.dtype)
    for t, i in reversed(list(np.ndindex(ids.shape[::-1]))):
        if ids[i, t]:
            lam[i] += dh[i, t]
            db[i, t], da[i, t] = lam[i], lam[i] * np.conj(previous[i, t])
            lam[i] *= np.conj(a[i, t].astype(h.dtype))
        lam[i] = 0 if restarts[i, t] else lam[i]
    return h, final, da, db, lam


def draw(seed, shape, is_complex):
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape).astype(np.float32)
    return x + 1j * random.standard_normal(shape).astype(np.float32) if is_complex else x


def cases(is_complex):
    """name -> (a, b, h0, ids, dh, dfinal)"""
    kinds = {
        "decay": (IDS, 0.9),
        "constant": (IDS, 0.9),
        "constant, |a| = 1": (WHOLE, 1.0),
        "strong decay": (WHOLE, np.exp(-20.0)),
        "even": (WHOLE[:, :8], 1.0),
        "one token": (IDS[:, :1], 0.9),
    }
    for seed, (name, (ids, magnitude)) in enumerate(kinds.items()):
        shape = (*ids.shape, 2, 3)
        shape_a = shape[2:] if "constant" in name else shape
        a = np.sign(draw(seed, shape_a, False)) * np.float32(magnitude)
        if is_complex:
            a = (np.abs(a) * np.exp(1j * draw(seed, shape_a, False))).astype(np.complex64)
        state = ids.shape[:1] + shape[2:]
        b, dh = draw(seed + 20, shape, is_complex), draw(seed + 30, shape, is_complex)
        yield name, (a, b, draw(seed + 40, state, is_complex), ids, dh, draw(seed + 50, state, is_complex))


def parts(x):
    return (jnp.asarray(x.real), jnp.asarray(x.imag)) if np.iscomplexobj(x) else jnp.asarray(x)


def whole(x):
    return np.asarray(x[0], np.float64) + 1j * np.asarray(x[1], np.float64) if isinstance(x, tuple) else x


def poison(x, ids):
    """NaN on padding."""
    return np.where((ids == 0).reshape(ids.shape + (1,) * (x.ndim - 2)), np.array(np.nan, x.dtype), x)


def gradients(implementation, a, b, h0, ids, dh, dfinal):
    f = lambda a, b, h0: linear_recurrence(a, b, initial_state=h0, segment_ids=ids, implementation=implementation)
    (h, final), pull_back = jax.vjp(f, a, b, h0)
    return h, final, *pull_back((dh, final if dfinal is None else dfinal))


def assert_close(actual, expected, tolerance, message):
    for name, x, y in zip(("h", "final", "da", "db", "dh0"), actual, expected, strict=True):
        x = np.asarray(whole(x))
        assert x.shape == y.shape
        error, scale = np.max(np.abs(x - y)), np.max(np.abs(y))
        assert error <= tolerance * scale, f"{message}, {name}: {error} against {scale}"


def check(implementation, is_complex, dtype, tolerance):
    todo = dict(cases(is_complex))
    arguments = {}
    for name, (a, b, h0, ids, dh, dfinal) in todo.items():
        if a.ndim == b.ndim:
            a = poison(a, ids)
        ids_or_none = None if np.all(ids == 1) else jnp.asarray(ids)
        arrays = jax.tree.map(lambda x: x.astype(dtype), tuple(map(parts, (a, poison(b, ids), h0, dh, dfinal))))
        arguments[name] = (*arrays[:3], ids_or_none, *arrays[3:])
    run = jax.jit(lambda arguments: {name: gradients(implementation, *x) for name, x in arguments.items()})
    for name, actual in run(arguments).items():
        a, b, h0, ids, dh, dfinal = todo[name]
        constant = a.ndim < b.ndim
        expected = oracle(np.broadcast_to(a, b.shape), b, h0, ids, dh, dfinal)
        if constant:
            expected = (*expected[:2], expected[2].sum((0, 1)), *expected[3:])
        assert jax.tree.leaves(actual)[0].dtype == dtype
        assert_close(actual, expected, tolerance, name)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "blocked", "pallas"])
def test_against_a_loop(implementation, is_complex, monkeypatch):
    """Values, final states and all gradients, with NaN on padding; 13 tokens are several chunks, or blocks of 3 whose borders are
    blocks again, or of 8, and a rest.
    """
    monkeypatch.setattr(module, "_CHUNK", 4)
    monkeypatch.setattr(module, "_BLOCK", 3)
    monkeypatch.setattr(pallas_recurrence, "BLOCK_BYTES", 1)
    check(implementation, is_complex, jnp.float32, TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_double_precision(implementation, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 4)
    with jax.enable_x64(True):
        check(implementation, True, jnp.float64, 1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cut_anywhere(implementation):
    """The state carries a sequence over a cut; where the cut is between two segments, the caller drops it."""
    name_to_case = dict(cases(True))
    a, b, h0, ids, _, _ = name_to_case["decay"]
    run = jax.jit(
        lambda a, b, h0, ids: linear_recurrence(a, b, initial_state=h0, segment_ids=ids, implementation=implementation)
    )
    expected, expected_final = map(whole, run(parts(a), parts(b), parts(h0), ids))
    for cut in (1, 3, 6, 12):
        first, state = run(parts(a[:, :cut]), parts(b[:, :cut]), parts(h0), ids[:, :cut])
        same = (ids[:, cut] == ids[:, cut - 1])[:, None, None]
        state = jax.tree.map(lambda h, same=same: h * same, state)
        second, final = run(parts(a[:, cut:]), parts(b[:, cut:]), state, ids[:, cut:])
        h = np.concatenate([whole(first), whole(second)], axis=1)
        np.testing.assert_allclose(h, expected, atol=TOLERANCE * np.abs(expected).max())
        np.testing.assert_allclose(whole(final), expected_final, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packing(implementation):
    """A packed row is its documents one after the other, whatever lies between them."""
    a, b = (draw(seed, (1, 9, 3), False) for seed in (0, 1))
    ids = np.array([[1, 1, 1, 0, 2, 2, 2, 2, 2]])
    run = jax.jit(lambda a, b, ids: linear_recurrence(a, b, segment_ids=ids, implementation=implementation))
    packed, final = run(poison(a, ids), poison(b, ids), ids)
    for part in (slice(0, 3), slice(4, 9)):
        alone, state = run(a[:, part], b[:, part], None)
        np.testing.assert_allclose(packed[:, part], alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(final, state, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(packed)[:, 3] == 0)


def test_bfloat16():
    a, b = (jnp.asarray(draw(seed, (2, 33, 3), False)) for seed in (0, 1))
    a = jax.nn.sigmoid(a).astype(jnp.bfloat16)
    h, final = linear_recurrence(a, b.astype(jnp.bfloat16))
    expected = linear_recurrence(a.astype(jnp.float32), b)[0]
    assert (h.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(h.astype(jnp.float32), expected, atol=1e-2 * np.abs(expected).max())


@pytest.mark.usefixtures("unchecked")
def test_errors():
    x = jnp.zeros((2, 3, 4))
    for arguments, options in [
        ((x, x), {"implementation": "chunked"}),
        (((x, x), x), {}),
        ((x[:, :, :2], x), {}),
        ((x[0], x), {}),
        ((x.astype(jnp.complex64), x.astype(jnp.complex64)), {}),
        ((x, x), {"initial_state": x}),
        ((x, x), {"segment_ids": jnp.ones((2, 4), jnp.int32)}),
    ]:
        with pytest.raises(ValueError):
            linear_recurrence(*arguments, **options)
