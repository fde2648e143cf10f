"""Log-linear attention against a list of Fenwick buckets, merged as in a binary counter, and against its own pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.linear_attention import linear_attention
from ops.log_linear_attention import level, log_linear_attention
from tests.tolerance import assert_close

B, T, H, K, V, L = 2, 39, 2, 3, 4, 5  # the last level, 6, shares the weight of level 4
SEGMENTS = np.array([[1] * 2 + [2] * 33 + [3] + [0] * 3, [0] * 4 + [5] * 20 + [6] * 15])
CHUNK = 8


def example(strength=0.3):
    r = np.random.default_rng(0)
    sizes = {"q": K, "k": K, "v": V, "level_weights": L}
    return {name: r.standard_normal((B, T, H, size)) for name, size in sizes.items()} | {
        "log_decay": -strength * np.abs(r.standard_normal((B, T, H)))
    }


def counter(q, k, v, level_weights, log_decay):
    """One head [T, ...]: buckets of equal sizes are merged like the carries of a binary counter."""
    buckets, outputs = {}, []  # level -> state
    for t in range(len(q)):
        buckets = {l: np.exp(log_decay[t]) * S for l, S in buckets.items()}
        own = np.outer(k[t], v[t])
        read = level_weights[t, 0] * own + sum(level_weights[t, min(l, L - 1)] * S for l, S in buckets.items())
        outputs.append(read.T @ q[t])
        l = 1
        while l in buckets:
            own, l = own + buckets.pop(l), l + 1
        buckets[l] = own
    return np.stack(outputs)


@functools.partial(jax.jit, static_argnums=(1, 3))
def run(x, chunk, segment_ids=None, cuts=None):
    """Outputs and the gradients of a fixed projection; of the whole, or of pieces that pass the state on."""

    def f(x):
        if cuts is None:
            return log_linear_attention(**x, segment_ids=segment_ids, chunk_size=chunk)[0]
        state, y = jnp.zeros((B, 6, H, K, V)), []
        for start, stop in zip((0, *cuts), (*cuts, T)):
            piece = {name: a[:, start:stop] for name, a in x.items()}
            where = jnp.broadcast_to(jnp.arange(start, stop), (B, stop - start))
            out, state = log_linear_attention(**piece, positions=where, initial_state=state, chunk_size=chunk)
            y.append(out)
        return jnp.concatenate(y, 1)

    y, pull_back = jax.vjp(f, x)
    return {"y": y} | pull_back(jnp.sin(1 + jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))[0]


def compare(found, expected, tolerance=1e-12):
    for name, value in expected.items():
        assert_close(found[name], value, tolerance, what=name)


def test_buckets():
    """Outputs are those of the counter, in whole and packed rows; gradients of packed rows are those of their documents."""
    x = example()
    with jax.enable_x64(True):
        whole, packed = run(x, CHUNK), run(x, CHUNK, SEGMENTS)
    for i, h in np.ndindex(B, H):
        head = {name: a[i, :, h] for name, a in x.items()}
        assert_close(whole["y"][i, :, h], counter(**head), 1e-12)
        for segment in set(SEGMENTS[i]) - {0}:
            own = SEGMENTS[i] == segment
            assert_close(packed["y"][i, own, h], counter(**{name: a[own] for name, a in head.items()}), 1e-12)
    assert not np.asarray(packed["y"])[SEGMENTS == 0].any()


@pytest.mark.parametrize("strength", [pytest.param(0.3, marks=pytest.mark.thorough), 40.0])
def test_forms(strength):
    """One chunk with all levels, chunks with a pass for each high level, and pieces: outputs and gradients."""
    x = example(strength)
    with jax.enable_x64(True):
        dense = run(x, 64)
        compare(run(x, CHUNK), dense)
        compare(run(x, CHUNK, None, (1, 22)), dense)
        compare(run(x, CHUNK, SEGMENTS), run(x, 64, SEGMENTS))
    compare(run(jax.tree.map(jnp.float32, x), CHUNK), dense, 1e-5)


def test_level():
    """Position 6 = 110b has a bucket of the four tokens 0..3 and one of the two tokens 4, 5."""
    assert level(jnp.arange(7), jnp.int32(6)).tolist() == [3, 3, 3, 3, 2, 2, 0]


def test_full():
    """Three buckets hold seven tokens; with the eighth in them they could not give what the ninth asks for."""
    x = jax.tree.map(jnp.float32, example())
    where = jnp.broadcast_to(jnp.arange(T), (B, T))
    y, _ = jax.jit(log_linear_attention)(**x, positions=where, initial_state=jnp.zeros((B, 3, H, K, V)))
    assert np.isfinite(y[:, :8]).all() and np.isnan(y[:, 8:]).all()


def test_final_state_of_a_long_piece():
    """The buckets are exact however much has been forgotten before the tokens in them; here they sum to one decayed sum."""
    r, length = np.random.default_rng(1), 150
    g = np.where(np.arange(length) < 75, -100, -0.1).astype(np.float32).reshape(1, length, 1)
    k, v = r.standard_normal((2, 1, length, 1, K)).astype(np.float32)
    where, weights = np.arange(length, dtype=np.int32)[None], np.ones((1, length, 1, 1), np.float32)
    _, state = jax.jit(log_linear_attention)(
        k, k, v, g, weights, positions=where, initial_state=jnp.zeros((1, 8, 1, K, K))
    )
    S = np.zeros((K, K))
    for t in range(length):
        S = np.exp(np.float64(g[0, t, 0])) * S + np.outer(k[0, t, 0].astype(np.float64), v[0, t, 0])
    assert_close(np.sum(state, 1)[0, 0], S, 1e-6)


def test_types_may_differ():
    """Queries and keys of bfloat16 are scaled and multiplied in the precision of the values."""
    x = example()
    types = dict.fromkeys(x, jnp.float32) | dict.fromkeys("qk", jnp.bfloat16)
    x = {name: jnp.asarray(a, types[name]) for name, a in x.items()}
    y, _ = jax.jit(functools.partial(log_linear_attention, scale=24**-0.5, chunk_size=CHUNK))(**x)
    x = {name: np.asarray(a, np.float64) for name, a in x.items()}
    for i, h in np.ndindex(B, H):
        assert_close(y[i, :, h], 24**-0.5 * counter(**{name: a[i, :, h] for name, a in x.items()}))


def test_equal_weights():
    """With one weight for all levels nothing is left of the hierarchy."""
    x = jax.tree.map(jnp.float32, example()) | {"level_weights": jnp.ones((B, T, H, L))}
    expected, _ = jax.jit(linear_attention)(x["q"], x["k"], x["v"], x["log_decay"], segment_ids=SEGMENTS)
    assert_close(run(x, CHUNK, SEGMENTS)["y"], expected)
