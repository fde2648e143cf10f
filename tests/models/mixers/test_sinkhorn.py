"""Sinkhorn: the permutation is doubly stochastic, and noise moves it in training alone."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import mixer as mixers
from models.mixer import Context
from models.mixers.sinkhorn import normalize
from tests.tolerance import assert_close


def test_doubly_stochastic():
    """Among the blocks that there are; the others have no part in it."""
    logits = jax.random.normal(jax.random.key(0), (5, 5))
    exists = np.array([1, 1, 1, 1, 0], bool)
    P = normalize(logits, exists[:, None] & exists[None], 30)
    for axis in (0, 1):
        assert_close(P.sum(axis), exists.astype(float))


def test_noise():
    """A key changes the outputs, another key changes them otherwise, no key leaves them alone."""
    mixer = mixers.create("sinkhorn", 16, rngs=nnx.Rngs(0), causal=False, length=12, block=3)
    x = jax.random.normal(jax.random.key(0), (1, 12, 16))
    run = jax.jit(lambda key: mixer(x, context=Context(key=key))[0])
    quiet, one, other = run(None), run(jax.random.key(1)), run(jax.random.key(2))
    assert_close(run(None), quiet, 0.0)
    assert float(jnp.abs(one - quiet).max()) > 1e-3 and float(jnp.abs(one - other).max()) > 1e-3


def test_stream_after_padding():
    """A carry that begins with padding: blocks are counted from the document's first token; none are beyond the length."""
    mixer = mixers.create("sinkhorn", 16, rngs=nnx.Rngs(0), length=12, block=3)
    run = jax.jit(mixer)
    x = jax.random.normal(jax.random.key(0), (2, 15, 16))
    ids = jnp.array([[0] * 5 + [1] * 10, [0] * 2 + [1] * 13])
    carry, outputs = mixer.initial_carry(2, 15), []
    for i in range(0, 15, 5):
        y, carry = run(x[:, i : i + 5], carry, segment_ids=ids[:, i : i + 5])
        outputs.append(y)
    y = jnp.concatenate(outputs, 1)
    assert_close(y[0, 5:], run(x[:1, 5:])[0][0])
    assert np.isfinite(y[1, :14]).all() and np.isnan(y[1, 14]).all()
