"""The momentum delta rule: the reference against a numpy loop, the chunked form against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.delta_rule import delta_rule
from ops.momentum_delta_rule import momentum_delta_rule
from tests.tolerance import assert_close

B, T, H, K, V = 2, 29, 2, 5, 3
SEGMENTS = np.array([[1] * 5 + [2] * 11 + [3] + [4] * 8 + [0] * 4, [0] * 2 + [7] * 22 + [8] * 5])


def example(strength=0.3):
    r = np.random.default_rng(0)
    k = r.standard_normal((B, T, H, K))
    gate = lambda: -strength * np.abs(r.standard_normal((B, T, H)))
    return {
        "q": r.standard_normal((B, T, H, K)),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": r.standard_normal((B, T, H, V)),
        "beta": r.uniform(0, 2, (B, T, H)),
        "log_momentum": gate(),
        "log_decay": gate(),
        "initial_state": (r.standard_normal((B, H, K, V)), r.standard_normal((B, H, K, V))),
    }


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(form, x, segment_ids=None, cut=None):
    """Outputs, states and the gradients of a fixed projection, of the whole or of two pieces."""

    def f(x):
        call = functools.partial(momentum_delta_rule, scale=0.7, implementation=form, chunk_size=8)
        if cut is None:
            return call(**x, segment_ids=segment_ids)
        state = x["initial_state"]
        first, second = ({n: a[:, s] for n, a in x.items() if a is not state} for s in (slice(cut), slice(cut, None)))
        y, state = call(**first, initial_state=state)
        z, state = call(**second, initial_state=state)
        return jnp.concatenate([y, z], 1), state

    out, pull_back = jax.vjp(f, x)
    weights = jax.tree.map(lambda a: jnp.sin(1 + jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), out)
    return out, pull_back(weights)[0]


def compare(found, expected, tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, tolerance, what=jax.tree_util.keystr(path))


def definition(x):
    """Token by token, of the packed rows."""
    y, final = np.zeros((B, T, H, V)), np.zeros((2, B, H, K, V))
    for i, h in np.ndindex(B, H):
        M, S = (s[i, h] for s in x["initial_state"])
        for t in range(T):
            if t and SEGMENTS[i, t] != SEGMENTS[i, t - 1]:
                M, S = np.zeros_like(M), np.zeros_like(S)
            if SEGMENTS[i, t]:
                k = x["k"][i, t, h]
                S = np.exp(x["log_momentum"][i, t, h]) * S - x["beta"][i, t, h] * np.outer(k, M.T @ k - x["v"][i, t, h])
                M = np.exp(x["log_decay"][i, t, h]) * M + S
                y[i, t, h] = 0.7 * M.T @ x["q"][i, t, h]
        final[:, i, h] = M, S
    return y, tuple(final)


def test_reference_is_the_definition():
    x = example()
    with jax.enable_x64(True):
        compare(run("reference", x, SEGMENTS)[0], definition(x), 1e-13)


@pytest.mark.parametrize("form", ["reference", "chunked"])
def test_types_may_differ(form):
    """Queries and keys of bfloat16 are scaled and multiplied in the precision of the values."""
    x = jax.tree.map(jnp.float32, example(0.05))
    x |= {name: jnp.asarray(x[name], jnp.bfloat16) for name in "qk"}
    call = functools.partial(momentum_delta_rule, scale=0.7, segment_ids=SEGMENTS, implementation=form, chunk_size=8)
    compare(jax.jit(call)(**x), definition(jax.tree.map(lambda a: np.asarray(a, np.float64), x)), 1e-5)


@pytest.mark.parametrize("strength", [pytest.param(0.3, marks=pytest.mark.thorough), 40.0])
def test_chunked(strength):
    """Outputs, states and gradients in float64, of whole and packed rows; the state passes from piece to piece."""
    x = example(strength)
    with jax.enable_x64(True):
        whole = run("reference", x)
        compare(run("chunked", x), whole, 1e-12)
        compare(run("chunked", x, None, 11), whole, 1e-12)
        compare(run("chunked", x, SEGMENTS), run("reference", x, SEGMENTS), 1e-12)


def test_float32():
    x = jax.tree.map(jnp.float32, example(0.05))
    compare(run("chunked", x), run("reference", x), 1e-5)


def test_without_momentum_it_is_a_delta_rule():
    """The error is that of the memory before its decay: the general form, with a = -beta k and b = k."""
    x = jax.tree.map(jnp.float32, example())
    x["initial_state"] = (x["initial_state"][0], jnp.zeros((B, H, K, V)))
    x["log_momentum"] = jnp.full((B, T, H), -jnp.inf)
    y, (state, _) = jax.jit(momentum_delta_rule)(**x)
    bk = x["beta"][..., None] * x["k"]
    expected = jax.jit(delta_rule)(
        x["q"], bk, x["v"], None, x["log_decay"], a=-bk, b=x["k"], initial_state=x["initial_state"][0]
    )
    compare((y, state), expected, 1e-5)


def test_bounded():
    """Steps up to 1 under gates that change wildly, keys from a small space: a thousand tokens later nothing has grown."""
    r = np.random.default_rng(1)
    q, v = (r.standard_normal((1, 1024, 8, K)) for _ in range(2))
    gate = lambda: 1 / (1 + np.exp(-3 * r.standard_normal((1, 1024, 8))))
    k = q / np.linalg.norm(q, axis=-1, keepdims=True)
    x = jax.tree.map(jnp.float32, (q, k, v, gate(), np.log(gate()), np.full((1, 1024, 8), -0.01)))
    _, (memory, _) = jax.jit(momentum_delta_rule)(*x)
    assert jnp.abs(memory).max() < 30


def test_many_chunks_and_rows():
    """A size at which LAPACK's solver blocked forever inside the compiled loop over chunks, gradients included."""
    r = np.random.default_rng(2)
    shape = (8, 256, 4)
    q, k, v = (r.standard_normal((*shape, 16)) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    x = q, k, v, r.uniform(0, 1, shape), -r.uniform(0, 1, shape), -r.uniform(0, 0.1, shape)
    x = jax.tree.map(jnp.float32, x)

    def f(form):
        loss = lambda x: jnp.sum(jnp.sin(momentum_delta_rule(*x, implementation=form)[0]))
        return jax.jit(jax.value_and_grad(loss))(x)

    compare(f("chunked"), f("reference"), 1e-4)
