"""What the contract does not hold of differential attention: its second version."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from models import mixer as mixers
from tests.tolerance import assert_close


def test_version_2_in_pieces():
    """Cut anywhere, across the border of two documents too, the outputs are the same."""
    mixer = mixers.create("differential_attention", 16, rngs=nnx.Rngs(0), kv_heads=2, version=2)
    graph, params = nnx.split(mixer)
    run = jax.jit(lambda x, carry, ids: nnx.merge(graph, params)(x, carry, segment_ids=ids))
    x = np.float32(np.random.default_rng(0).standard_normal((2, 9, 16)))
    ids = np.array([[1] * 5 + [2] * 4, [3] * 7 + [0] * 2], np.int32)
    found, carry = [], mixer.initial_carry(2, 9)
    for at in range(0, 9, 3):
        y, carry = run(x[:, at : at + 3], carry, ids[:, at : at + 3])
        found.append(y)
    assert_close(jnp.concatenate(found, 1), run(x, None, ids)[0])


def test_versions():
    with pytest.raises(UserError, match="`version` must be 1 or 2, got 3"):
        mixers.create("differential_attention", 16, rngs=nnx.Rngs(0), version=3)
