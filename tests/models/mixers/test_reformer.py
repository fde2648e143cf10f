import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from models.mixer import Context
from tests.tolerance import FLOAT32, error

LENGTH = 48
X = np.random.default_rng(0).standard_normal((1, LENGTH, 16)).astype(np.float32)


def build(**options):
    return mixers.create("reformer", 16, rngs=nnx.Rngs(0), heads=2, **options)


def test_later_tokens_do_not_move_the_cuts():
    """Hashing is not seen by gradients, so what depends on what is tried out; and keys change the hashes in training only."""
    model = build(rounds=2, buckets=4, window=6)

    @jax.jit
    def run(x, layer, key):
        carry = model.initial_carry(1, LENGTH)
        stream = model(x, carry, context=Context(layer, key))[0]
        return model(x, context=Context(layer))[0], model(x, context=Context(layer, key))[0], stream

    y, trained, stream = run(X, 0, jax.random.key(0))
    changed = X.copy()
    changed[:, 30:] = X[:, 30:][:, ::-1]
    assert error(run(changed, 0, jax.random.key(0))[0][:, :30], y[:, :30]) < FLOAT32
    assert error(stream, y) < FLOAT32
    assert error(trained, y) > 0.1
    assert error(run(X, 1, jax.random.key(0))[0], y) > 0.1  # each layer has hashes of its own


def test_more_rounds_come_nearer_to_full_attention():
    hashed = [build(rounds=rounds, buckets=4, window=LENGTH) for rounds in (1, 8)]
    full = build(rounds=1, buckets=1, window=LENGTH)
    errors = jax.jit(lambda x: [jnp.mean(jnp.square(model(x)[0] - full(x)[0])) for model in hashed])(X)
    assert errors[1] < 0.25 * errors[0]


def test_refusals():
    for options in ({"buckets": 3}, {"rounds": 0}, {"window": 1}):
        with pytest.raises(ValueError, match="reformer"):
            build(**options)
    assert build(length=1024, window=128).buckets == 32
