import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import norms
from ops.elementwise import gate, gelu, silu, silu_gate

X, V, DY = np.random.default_rng(0).standard_normal((3, 4, 7)) * 3
SIGMOID = 1 / (1 + np.exp(-X))
CUBIC = np.sqrt(2 / np.pi) * (X + 0.044715 * X**3)  # of gelu's approximation by tanh
F = {"silu": X * SIGMOID, "gelu": 0.5 * X * (1 + np.tanh(CUBIC))}
SLOPE = {
    "silu": SIGMOID * (1 + X * (1 - SIGMOID)),
    "gelu": 0.5 * (1 + np.tanh(CUBIC)) + 0.5 * X / np.cosh(CUBIC) ** 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * X**2),
}


def kept(f, *arrays) -> list[int]:
    """Sizes of the arrays that a backward pass keeps, scalars aside."""
    pull_back = jax.eval_shape(lambda *a: jax.vjp(f, *a)[1], *arrays)
    return sorted(math.prod(leaf.shape) for leaf in jax.tree.leaves(pull_back) if leaf.shape)


@pytest.mark.parametrize("name", F)
def test_activations_and_gates(name):
    f = {"silu": silu, "gelu": gelu}[name]
    gated = silu_gate if name == "silu" else functools.partial(gate, jax.nn.gelu)
    with jax.enable_x64(True):
        y, pull_back = jax.vjp(f, X)
        np.testing.assert_allclose(y, F[name], rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(pull_back(DY)[0], SLOPE[name] * DY, rtol=1e-12, atol=1e-13)
        y, pull_back = jax.vjp(gated, X, V)
        np.testing.assert_allclose(y, F[name] * V, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(pull_back(DY), [SLOPE[name] * V * DY, F[name] * DY], rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(
            jax.jvp(gated, (X, V), (DY, V))[1], SLOPE[name] * V * DY + F[name] * V, rtol=1e-12, atol=1e-13
        )
        h = 1e-5
        second = (jax.grad(lambda x: f(x).sum())(X + h) - jax.grad(lambda x: f(x).sum())(X - h)) / (2 * h)
        np.testing.assert_allclose(jax.grad(lambda x: jax.grad(lambda x: f(x).sum())(x).sum())(X), second, atol=1e-8)
    assert kept(f, X) == [X.size]
    assert kept(gated, X, V) == [X.size, X.size]


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm", "scalenorm"])
def test_norms_keep_their_input_in_its_own_dtype(name):
    norm = norms.NORMS[name](7, rngs=nnx.Rngs(0))
    x = jnp.asarray(X, jnp.bfloat16)
    pull_back = jax.eval_shape(lambda x: jax.vjp(norm, x)[1], x)
    assert [leaf.dtype for leaf in jax.tree.leaves(pull_back) if leaf.shape == x.shape] == [jnp.bfloat16]
