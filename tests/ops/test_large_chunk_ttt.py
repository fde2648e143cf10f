"""Training in large chunks against a loop over tokens whose gradients are found by automatic differentiation, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.large_chunk_ttt import FastWeights, large_chunk_ttt
from tests.tolerance import assert_close

B, T, H, K, M, V, C = 2, 27, 2, 4, 3, 5, 6
# A document that ends inside a chunk, several in one block, one of more than two chunks, padding everywhere.
SEGMENTS = np.array([[1] * 7 + [2] + [3] * 2 + [4] * 14 + [0] * 3, [0] * 5 + [5] * 9 + [6] * 13])


def example():
    r = np.random.default_rng(0)
    normal = lambda *shape: r.standard_normal(shape)
    return {
        "q": normal(B, T, H, K),
        "k": normal(B, T, H, K),
        "v": normal(B, T, H, V),
        "rates": r.uniform(0, 0.3, (B, T, H, 3)),
        "momentum": r.uniform(0, 1, (B, T, H)),
        "weights": FastWeights(normal(H, K, M), normal(H, M, V), normal(H, K, M)),
    }


def made_orthogonal(x):
    """The authors' polynomials, of the singular values."""
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    s = s / jnp.sqrt(jnp.sum(s**2) + 1e-14)
    for a, b, c in (
        (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
    ):  # fmt: skip
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


def by_token(orthogonal, positions, q, k, v, rates, momentum, weights):
    """One row of one head."""
    f = lambda W, x: (jax.nn.silu(x @ W[0]) * (x @ W[2])) @ W[1]
    norms = [jnp.linalg.norm(w, axis=0) for w in weights]
    zeros = [0 * w for w in weights]

    def token(carry, x):
        t, q, k, v, rates, m = x
        W, D, G, total = carry
        pick = lambda condition, new, old: jax.tree.map(functools.partial(jnp.where, condition), new, old)
        D_new = [g + total / C * d for g, d in zip(G, D)]
        moved = [w + (made_orthogonal(d) if orthogonal else d) for w, d in zip(W, D_new)]
        moved = [w / (jnp.linalg.norm(w, axis=0) + 1e-5) * n for w, n in zip(moved, norms)]
        stepped = pick(t % C == 0, (moved, D_new, zeros, 0.0), carry)
        W, D, G, total = pick(t == 0, (list(weights), zeros, zeros, 0.0), stepped)
        of_token = jax.grad(lambda W: f(W, k) @ v)(W)
        G = [g + r * d for g, r, d in zip(G, rates, of_token)]
        return (W, D, G, total + m), f(W, q)

    return jax.lax.scan(token, (list(weights), zeros, zeros, 0.0), (positions, q, k, v, rates, momentum))[1]


def reference(orthogonal, x, segment_ids):
    positions = np.array([[sum(row[:t] == row[t]) for t in range(T)] for row in segment_ids])
    over_heads = jax.vmap(functools.partial(by_token, orthogonal), (None, 1, 1, 1, 1, 1, 0), 1)
    y = jax.vmap(over_heads, (0, 0, 0, 0, 0, 0, None))(
        positions, *(x[name] for name in ("q", "k", "v", "rates", "momentum", "weights"))
    )
    return jnp.where((segment_ids == 0)[..., None, None], 0, y)


@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients(packed):
    """Plain steps with momentum: whole chunks, and chunks that begin where documents do."""
    check(SEGMENTS if packed else np.ones_like(SEGMENTS), packed, orthogonal=False, gradients=True)


def test_orthogonal_steps():
    """Muon's steps, of which rounding errors come out some hundred times as large."""
    check(SEGMENTS, True, orthogonal=True, gradients=False)


def test_a_column_of_zeros():
    """Has the norm 0, whose derivative is taken to be 0. No step is taken here, so that the network is that of the first weights,
    in float64."""
    x = example()
    weights = x.pop("weights")._replace(w_1=np.zeros((H, M, V)))
    dy = np.random.default_rng(1).standard_normal((B, T, H, V))

    def network(W):
        gate, up = (jnp.einsum("bthk,hkm->bthm", x["q"], w) for w in (W.w_0, W.w_2))
        return jnp.einsum("bthm,hmv->bthv", jax.nn.silu(gate) * up, W.w_1)

    ours = lambda W: large_chunk_ttt(**x, weights=W, chunk_size=T)[0]
    with jax.enable_x64(True):
        found, expected = (jax.jit(jax.grad(lambda W, f=f: jnp.sum(dy * f(W))))(weights) for f in (ours, network))
    jax.tree.map(functools.partial(assert_close, tolerance=1e-12), found, expected)


def check(ids, packed, *, orthogonal, gradients):
    x = example()
    dy = np.random.default_rng(1).standard_normal((B, T, H, V))

    def with_gradients(f, x):
        if not gradients:
            return f(x), {}
        y, pull_back = jax.vjp(f, x)
        return y, pull_back(jnp.asarray(dy, y.dtype))[0]

    def ours(x):
        options = {"chunk_size": C, "orthogonal": orthogonal, "segment_ids": jnp.asarray(ids) if packed else None}
        return large_chunk_ttt(**x, **options)[0]

    found = jax.jit(functools.partial(with_gradients, ours))(jax.tree.map(np.float32, x))
    with jax.enable_x64(True):
        oracle = lambda x: reference(orthogonal, x, ids)
        expected = jax.tree.map(np.asarray, jax.jit(functools.partial(with_gradients, oracle))(x))
    assert_close(found[0], expected[0], 1e-3 if orthogonal else 1e-5)
    leaves = jax.tree_util.tree_leaves_with_path(found[1])
    for (path, mine), value in zip(leaves, jax.tree.leaves(expected[1]), strict=True):
        assert_close(mine, value, what=jax.tree_util.keystr(path))
