"""Attention with a polynomial kernel against its double sum in float64, from states that are sums over earlier tokens."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.polynomial_attention import feature_count, features, polynomial_attention
from tests.tolerance import assert_close

B, T, H, F, V = 2, 75, 2, 5, 3
SEGMENTS = np.array([[1] * 20 + [2] * 30 + [0] * 5 + [3] * 20, [0] * 4 + [4] * 71], np.int32)
POLYNOMIALS = ((1.0, 1.0, 0.5), (0.0, 0.0, 1.0), (0.3, 0.0, 2.0), (0.5, 2.0, 0.0))


def example(strength, length=T):
    r = np.random.default_rng(0)
    x = {name: r.standard_normal((B, length, H, size)) for name, size in (("q", F), ("k", F), ("v", V))}
    return x | {"log_decay": -strength * np.abs(r.standard_normal((B, length, H)))}


def double_sum(x, polynomial, segment_ids=None):
    """The equation, pair by pair; differentiable."""
    G = jnp.cumsum(x["log_decay"], 1)
    a = jnp.einsum("bthf,bshf->bhts", x["q"], x["k"])
    weights = sum(c * a**n for n, c in enumerate(polynomial))
    G = jnp.moveaxis(G, 1, 2)
    reaches = np.tril(np.ones((a.shape[-1],) * 2, bool))[None]
    if segment_ids is not None:
        reaches = reaches & (segment_ids[:, :, None] == segment_ids[:, None]) & (segment_ids[:, :, None] != 0)
    reaches = reaches[:, None]
    decay = jnp.where(reaches, jnp.exp(jnp.where(reaches, G[..., :, None] - G[..., None, :], 0)), 0)
    return jnp.einsum("bhts,bshv->bthv", weights * decay, x["v"])


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def pulled(function, x, polynomial, packed):
    """Outputs and the gradients of a fixed projection."""
    y, pull_back = jax.vjp(lambda x: function(x, polynomial, jnp.asarray(SEGMENTS) if packed else None), x)
    return {"y": y} | pull_back(jnp.sin(1 + jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))[0]


def attend(form, chunk_size, x, polynomial, segment_ids):
    options = {"segment_ids": segment_ids, "implementation": form, "chunk_size": chunk_size}
    return polynomial_attention(**x, coefficients=polynomial, **options)[0]


chunked = functools.partial(attend, "chunked", 16)


@pytest.mark.parametrize("polynomial", POLYNOMIALS[:2], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_every_form_is_the_double_sum(polynomial, packed):
    x = example(0.3)
    with jax.enable_x64(True):
        expected = jax.device_get(pulled(double_sum, jax.tree.map(jnp.asarray, x), polynomial, packed))
    if packed:  # padding may hold anything
        x = {name: np.where((SEGMENTS == 0).reshape(B, T, *[1] * (a.ndim - 2)), np.nan, a) for name, a in x.items()}
    x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), x)
    functions = [chunked, *(functools.partial(attend, form, 64) for form in ("reference", "features"))]
    for function in functions:
        for name, found in pulled(function, x, polynomial, packed).items():
            assert_close(found, expected[name], 1e-5)


def test_the_parallel_passes_of_accelerators():
    """Where chunks are read all at once they say what the loop over them says."""
    x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), example(0.3))
    expected = pulled(chunked, x, POLYNOMIALS[0], True)
    with dispatch.platform("gpu"):
        found = pulled(functools.partial(attend, "chunked", 16), x, POLYNOMIALS[0], True)
    jax.tree.map(assert_close, found, expected)


@pytest.mark.parametrize("form", ["reference", "features", "chunked"])
def test_types_may_differ(form):
    """Queries and keys of bfloat16 are multiplied in the precision of the values."""
    x = example(0.3)
    x = x | {name: np.asarray(jnp.asarray(x[name], jnp.bfloat16), np.float64) for name in "qk"}
    with jax.enable_x64(True):
        expected = np.asarray(double_sum(jax.tree.map(jnp.asarray, x), POLYNOMIALS[0]))
    types = dict.fromkeys(x, jnp.float32) | dict.fromkeys("qk", jnp.bfloat16)
    x = {name: jnp.asarray(a, types[name]) for name, a in x.items()}
    assert_close(jax.jit(functools.partial(attend, form, 16), static_argnums=(1, 2))(x, POLYNOMIALS[0], None), expected)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_features_multiply_to_the_polynomial_and_states_are_sums_of_them(size):
    """A carry is in the order of `features`, whichever form left it, and any form goes on with it."""
    r = np.random.default_rng(1)
    x, y = r.standard_normal((2, 7, size)).astype(np.float32)
    for polynomial in POLYNOMIALS:
        a = np.sum(x * y, -1, dtype=np.float64)
        phi = features(x, polynomial)
        assert phi.shape[-1] == feature_count(size, polynomial)
        assert_close(jnp.sum(phi * features(y, polynomial), -1), sum(c * a**n for n, c in enumerate(polynomial)))
        q, k = (r.standard_normal((1, 40, 1, size)).astype(np.float32) for _ in range(2))
        v = r.standard_normal((1, 40, 1, 2)).astype(np.float32)
        run = functools.partial(polynomial_attention, coefficients=polynomial, chunk_size=8)
        whole, final = run(q, k, v)
        assert_close(final, np.einsum("bthk,bthv->bhkv", features(k, polynomial), v))
        first, state = run(q[:, :13], k[:, :13], v[:, :13])
        second, state = run(q[:, 13:39], k[:, 13:39], v[:, 13:39], initial_state=state, implementation="reference")
        third, state = run(q[:, 39:], k[:, 39:], v[:, 39:], initial_state=state)
        assert_close(jnp.concatenate([first, second, third], 1), whole)
        assert_close(state, final)


def test_decays_that_leave_nothing():
    """Gradients of decays of 100 nats a token keep their precision: a token's own write is no part of them."""
    x = example(100.0)
    with jax.enable_x64(True):
        expected = jax.device_get(pulled(double_sum, jax.tree.map(jnp.asarray, x), POLYNOMIALS[0], False))
    found = pulled(chunked, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), x), POLYNOMIALS[0], False)
    for name in expected:
        assert_close(found[name], expected[name], 1e-4 if name == "log_decay" else 2e-5)


def test_gradients_of_and_through_the_state():
    x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), example(0.3, 40))
    cut = lambda x, where: {name: a[:, where] for name, a in x.items()}

    def loss(x, pieces):
        state, y = None, []
        for where in pieces:
            out, state = polynomial_attention(
                **cut(x, where), coefficients=POLYNOMIALS[0], initial_state=state, chunk_size=8
            )
            y.append(out)
        return jnp.sum(jnp.sin(jnp.concatenate(y, 1))) + jnp.sum(jnp.cos(state))

    whole, pieces = (slice(0, 40),), (slice(0, 13), slice(13, 30), slice(30, 40))
    jax.tree.map(assert_close, jax.grad(loss)(x, pieces), jax.grad(loss)(x, whole))


@pytest.mark.usefixtures("unchecked")
def test_errors_at_the_door():
    q, v = jnp.zeros((2, 6, 1, 4)), jnp.zeros((2, 6, 1, 3))
    for changes, message in (
        ({"k": v}, "need q, k"),
        ({"log_decay": jnp.zeros((2, 6))}, "log_decay must have the shape (2, 6, 1)"),
        ({"initial_state": jnp.zeros((2, 1, 10, 3))}, "initial_state must have the shape (2, 1, 15, 3)"),
        ({"segment_ids": jnp.ones((2, 5), jnp.int32)}, "segment_ids must have the shape (2, 6)"),
        ({"implementation": "fast"}, "not offered"),
        ({"chunk_size": 12}, "power of two"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            polynomial_attention(**({"q": q, "k": q, "v": v, "coefficients": (1.0, 1.0, 0.5)} | changes))
