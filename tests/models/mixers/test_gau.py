"""The softmax form of the gated attention unit: the law of which the contract holds the default form's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from tests.tolerance import assert_close


def test_softmax_in_pieces():
    """Cut between documents and inside of one; the scale follows the number of keys in the document."""
    mixer = mixers.create("gau", 16, rngs=nnx.Rngs(0), key_size=4, normalizer="softmax", length=20)
    graph, params = nnx.split(mixer)
    x = np.float32(np.random.default_rng(0).standard_normal((1, 24, 16)))
    ids = jnp.asarray([[1] * 4 + [2] * 20])

    @jax.jit
    def run(params):
        mixer = nnx.merge(graph, params)
        carry, outputs = mixer.initial_carry(1, 24), []
        for piece in (slice(0, 12), slice(12, 24)):
            y, carry = mixer(x[:, piece], carry, segment_ids=ids[:, piece])
            outputs.append(y)
        return jnp.concatenate(outputs, 1), jnp.concatenate([mixer(x[:, :4])[0], mixer(x[:, 4:])[0]], 1)

    assert_close(*run(params))


def test_softmax_needs_a_length():
    """log 1 = 0 cannot be divided by."""
    with pytest.raises(ValueError, match="length"):
        mixers.create("gau", 16, rngs=nnx.Rngs(0), normalizer="softmax", length=1)
