"""Test-time training against a loop over tokens whose gradients are found by automatic differentiation, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.ttt import ttt
from tests.tolerance import assert_close

B, T, H, K, M, C = 2, 27, 2, 4, 6, 5
# A document that ends inside a mini-batch, several in one block, one that begins on a block's edge, padding everywhere.
SEGMENTS = np.array([[1] * 7 + [2] + [3] * 2 + [4] * 14 + [0] * 3, [0] * 5 + [5] * 10 + [6] * 12])


def example(layers):
    r = np.random.default_rng(0)
    normal = lambda *shape: r.standard_normal(shape)
    return {
        "q": normal(B, T, H, K),
        "k": normal(B, T, H, K),
        "v": normal(B, T, H, K),
        "token_rate": r.uniform(0, 1, (B, T, H)),
        "place_rate": r.uniform(0, 1, C),
        "weights": (normal(H, K + 1, K),) if layers == 1 else (normal(H, K + 1, M), normal(H, M + 1, K)),
        "norm_weight": 1 + 0.3 * normal(H, K),
        "norm_bias": 0.3 * normal(H, K),
    }


def by_token(positions, q, k, v, token_rate, place_rate, weights, norm_weight, norm_bias):
    """One row of one head: [T], [T, K], [T], [C], [K + 1, K] or of two layers, [K]."""

    def norm(z):
        z = z - z.mean()
        return norm_weight * z / jnp.sqrt((z**2).mean() + 1e-6) + norm_bias

    def model(W, x):
        for layer in W[:-1]:
            x = jax.nn.gelu(jnp.append(x, 1) @ layer)
        return norm(jnp.append(x, 1) @ W[-1])

    loss = lambda W, k, v: ((model(W, k) - (v - k)) ** 2).sum() / 2

    def token(carry, x):
        t, q, k, v, c = x
        W_0, total = carry
        begin = lambda fresh, W, A: jnp.where(t == 0, fresh, jnp.where(t % C == 0, W - place_rate[-1] * A, W))
        W_0 = jax.tree.map(begin, weights, W_0, total)
        total = jax.tree.map(lambda A, G: jnp.where(t % C == 0, 0, A) + c * G, total, jax.grad(loss)(W_0, k, v))
        W = jax.tree.map(lambda W, A: W - place_rate[t % C] * A, W_0, total)
        return (W_0, total), q + model(W, q)

    return jax.lax.scan(token, (weights, jax.tree.map(jnp.zeros_like, weights)), (positions, q, k, v, token_rate))[1]


def reference(x, segment_ids):
    positions = np.array([[sum(row[:t] == row[t]) for t in range(T)] for row in segment_ids])
    over_heads = jax.vmap(by_token, (None, 1, 1, 1, 1, None, 0, 0, 0), 1)
    over_rows = jax.vmap(over_heads, (0, 0, 0, 0, 0, None, None, None, None))
    names = ("q", "k", "v", "token_rate", "place_rate", "weights", "norm_weight", "norm_bias")
    y = over_rows(positions, *(x[name] for name in names))
    return jnp.where((segment_ids == 0)[..., None, None], 0, y)


def in_pieces(x, cuts):
    shared = {name: x[name] for name in ("place_rate", "weights", "norm_weight", "norm_bias")}
    W = tuple(jnp.broadcast_to(a, (B, *a.shape)) for a in x["weights"])
    state, y = (W, tuple(map(jnp.zeros_like, W))), []
    for start, stop in zip((0, *cuts), (*cuts, T)):
        piece = {name: a[:, start:stop] for name, a in x.items() if name not in shared}
        where = jnp.broadcast_to(jnp.arange(start, stop), (B, stop - start))
        out, state = ttt(**piece, **shared, positions=where, initial_state=state)
        y.append(out)
    return jnp.concatenate(y, 1)


@pytest.mark.parametrize("form,layers", [("whole", 1), ("packed", 1), ("packed", 2), ("pieces", 2)])
def test_definition(form, layers):
    """Outputs and gradients; cuts and documents end anywhere in a mini-batch."""
    ids = SEGMENTS if form == "packed" else np.ones((B, T), int)
    ours = {
        "whole": lambda x: ttt(**x)[0],
        "packed": lambda x: ttt(**x, segment_ids=ids)[0],
        "pieces": functools.partial(in_pieces, cuts=(1, 11)),
    }[form]

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, x):
        y, pull_back = jax.vjp(f, x)
        return {"y": y} | pull_back(jnp.sin(1 + jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))[0]

    with jax.enable_x64(True):
        found, expected = run(ours, example(layers)), run(lambda x: reference(x, ids), example(layers))
        for name in expected:
            for a, b in zip(*(jax.tree.leaves(tree[name]) for tree in (found, expected)), strict=True):
                assert_close(a, b, 1e-11, what=name)
