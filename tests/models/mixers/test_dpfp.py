"""Fast weight programmers: their feature map, and the update that the contract's tests do not build."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from models.mixers.dpfp import dpfp
from tests.tolerance import assert_close


def test_map():
    """Features are the products of neighbours in r, sparse and non-negative, of sum 1; that of zero is zero."""
    x = jnp.array([[1.0, 2.0, -3.0], [0.0, 0.0, 0.0]])
    # r = (1, 2, 0, 0, 0, 3), rolled by one (3, 1, 2, 0, 0, 0).
    assert_close(dpfp(x, 1), np.array([[3, 2, 0, 0, 0, 0], [0] * 6]) / 5.0)
    assert np.isfinite(jax.jit(jax.grad(lambda x: dpfp(x, 2)[:, 0].sum()))(x)).all()


def test_refusals():
    with pytest.raises(ValueError, match="choose one of delta, sum"):
        mixers.create("dpfp", 16, rngs=nnx.Rngs(0), update="product")
    with pytest.raises(ValueError, match="nu"):
        mixers.create("dpfp", 16, rngs=nnx.Rngs(0), nu=8)


def test_sum_streams():
    """The option that the contract's tests do not build obeys the law as well: two pieces of a packed row."""
    mixer = mixers.create("dpfp", 16, rngs=nnx.Rngs(0), update="sum")
    x = np.float32(np.random.default_rng(0).standard_normal((1, 12, 16)))
    ids = np.array([[1] * 3 + [2] * 7 + [0] * 2], np.int32)
    run = jax.jit(lambda x, carry, ids: mixer(x, carry, segment_ids=ids))
    first, carry = run(x[:, :6], mixer.initial_carry(1, 12), ids[:, :6])
    second, _ = run(x[:, 6:], carry, ids[:, 6:])
    assert_close(np.concatenate([first, second], 1), run(x, None, ids)[0])
