"""The shift by one token, against slicing each document."""

import jax
import jax.numpy as jnp
import numpy as np

from ops.token_shift import token_shift

IDS = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [0, 0, 4, 4, 4, 4, 4, 4]])


def test_documents():
    """Each document's first token sees zero, or the state if the row begins with it."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 3, 2))
    before = jax.random.normal(jax.random.key(1), (2, 3, 2))
    y, last = token_shift(x.at[IDS == 0].set(jnp.nan), initial_state=before, segment_ids=IDS)
    expected = np.zeros(x.shape, np.float32)
    expected[0, 0], expected[0, 1:3], expected[0, 5] = before[0], x[0, :2], x[0, 4]
    expected[1, 3:] = x[1, 2:-1]
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(last[1], x[1, -1])


def test_pieces():
    """A sequence in pieces, an empty one among them, is the sequence."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 3))
    whole, final = token_shift(x)
    first, state = token_shift(x[:, :1])
    _, state = token_shift(x[:, :2], initial_state=state, segment_ids=jnp.zeros((2, 2), jnp.int32))
    rest, last = token_shift(x[:, 1:], initial_state=state)
    np.testing.assert_array_equal(jnp.concatenate([first, rest], 1), whole)
    np.testing.assert_array_equal(last, final)
