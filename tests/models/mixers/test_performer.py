"""Performer's random features: what they estimate, how well, and when they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from models.mixers.performer import orthogonal_rows, orthonormal
from tests.tolerance import assert_close

SIZE = 8


def test_rows():
    """Blocks of K rows are orthogonal, the lengths those of Gaussian vectors; a last block may be cut."""
    w = orthogonal_rows(jax.random.key(0), (1000 * SIZE - 3, SIZE), jnp.float32)
    products = w[:SIZE] @ w[:SIZE].T
    assert_close(products, jnp.diag(jnp.diag(products)))
    assert abs(jnp.mean(w)) < 0.02
    assert_close(w.T @ w / len(w), jnp.eye(SIZE), 0.06)
    assert_close(jnp.var(jnp.sum(jnp.square(w), 1)), 2.0 * SIZE, 0.1)  # chi^2 with K degrees of freedom


def test_orthonormal():
    """It is LAPACK's Q with the signs of R taken over, and calls no LAPACK, which hangs where all of a CPU's devices call it."""
    z = np.random.default_rng(0).standard_normal((2, 64, 64))
    q, r = np.linalg.qr(z)
    assert_close(orthonormal(jnp.float32(z)), q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None], 1e-4)
    made = np.float64(orthonormal(jnp.float32(z)))
    assert_close(made.swapaxes(1, 2) @ made, np.broadcast_to(np.eye(64), z.shape), 1e-5)
    text = jax.jit(lambda key: orthogonal_rows(key, (128, 64), jnp.float32)).lower(jax.random.key(0)).as_text()
    assert "lapack" not in text


def test_more_features_estimate_softmax_attention_better():
    """The error falls like 1 / sqrt(M), and orthogonal rows have a smaller one than independent rows."""
    q, k, v = np.float32(np.random.default_rng(0).standard_normal((3, 32, SIZE)))
    q, k = q / 2, k / 2  # the variance of a feature grows like exp(|q + k|^2)
    expected = jax.nn.softmax(q @ k.T / SIZE**0.5) @ v
    q, k = q * SIZE**-0.25, k * SIZE**-0.25

    def attend(w):
        phi_q, phi_k = (jnp.exp(x @ w.T - jnp.sum(x * x, 1, keepdims=True) / 2) for x in (q, k))
        a = phi_q @ phi_k.T
        return a @ v / a.sum(1, keepdims=True)

    keys = jax.random.split(jax.random.key(1), 60)
    draws = jax.jit(jax.vmap(lambda key: orthogonal_rows(key, (256 * SIZE, SIZE), jnp.float32)))(keys)
    # Blocks of rows are independent: fewer features are the first ones.
    error = lambda w, features: float(jnp.sqrt(jnp.mean((jax.vmap(attend)(w[:, :features]) - expected) ** 2)))
    few, more, many = (error(draws, features * SIZE) for features in (1, 16, 256))
    assert more < few / 3 and many < more / 3
    independent = np.float32(np.random.default_rng(1).standard_normal((60, 16 * SIZE, SIZE)))
    assert more < error(independent, 16 * SIZE) / 1.1


@pytest.mark.parametrize("redraw", [True, False])
def test_redraw(redraw):
    """Training draws new features at every step unless told not to; evaluation never does."""
    x = np.float32(np.random.default_rng(0).standard_normal((1, 6, 16)))
    mixer = mixers.create("performer", 16, rngs=nnx.Rngs(0), features=8, redraw=redraw)
    run = jax.jit(lambda key: mixer(x, context=mixers.Context(key=key))[0])
    outputs = [run(key) for key in (*jax.random.split(jax.random.key(5)), None)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.allclose(outputs[a], outputs[b]) != redraw


def test_relu_kernel_streams():
    """The option that the contract's tests do not build obeys the law as well: two pieces of a packed row."""
    mixer = mixers.create("performer", 16, rngs=nnx.Rngs(0), features=8, kernel="relu")
    x = np.float32(np.random.default_rng(0).standard_normal((1, 12, 16)))
    ids = np.array([[1] * 3 + [2] * 7 + [0] * 2], np.int32)
    run = jax.jit(lambda x, carry, ids: mixer(x, carry, segment_ids=ids))
    first, carry = run(x[:, :6], mixer.initial_carry(1, 12), ids[:, :6])
    second, _ = run(x[:, 6:], carry, ids[:, 6:])
    assert_close(np.concatenate([first, second], 1), run(x, None, ids)[0])
