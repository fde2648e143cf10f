"""What the contract does not hold of LaCT: the law where steps are made orthogonal, as they are by default."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models import mixer as mixers
from tests.models.test_contract import BATCH, LENGTH, PACKED, PIECES, WIDTH, inputs
from tests.tolerance import assert_close


@pytest.mark.thorough
def test_law_with_orthogonal_steps():
    """To the 1e-4 that its docstring states."""
    made = mixers.create("lact", WIDTH, rngs=nnx.Rngs(0), **mixers.find("lact").tiny | {"orthogonal": True})
    graph, params = nnx.split(made)
    run = jax.jit(lambda params, x, carry, ids: nnx.merge(graph, params)(x, carry, segment_ids=ids))
    x = inputs(PACKED)
    outputs, carry, at = [], made.initial_carry(BATCH, LENGTH), 0
    for length in PIECES:
        y, carry = run(params, x[:, at : at + length], carry, PACKED[:, at : at + length])
        outputs.append(y)
        at += length
    assert_close(jnp.concatenate(outputs, 1), run(params, x, None, PACKED)[0], 1e-4)
