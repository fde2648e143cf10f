"""Synthesizer: the forms that the contract does not try, and what its tables are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from tests.tolerance import assert_close


def build(**hyperparameters):
    return mixers.create("synthesizer", 16, rngs=nnx.Rngs(0), length=12, **hyperparameters)


def test_random_streams_and_packs():
    """The term that is no product of two tokens' channels has its own path: the law, with packed rows."""
    run = jax.jit(build(logits="random+dot_product"))
    x = jax.random.normal(jax.random.key(0), (2, 12, 16))
    ids = jnp.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
    whole, _ = run(x, segment_ids=ids)
    assert_close(whole[:1, 5:9], run(x[:1, 5:9])[0])
    carry = build(logits="random+dot_product").initial_carry(2, 12)
    first, carry = run(x[:, :6], carry, segment_ids=ids[:, :6])
    second, _ = run(x[:, 6:], carry, segment_ids=ids[:, 6:])
    assert_close(jnp.concatenate([first, second], 1), whole)


@pytest.mark.parametrize("logits", ["random", "factorized_random"])
def test_beyond_its_length(logits):
    """A longer input is an error; a stream that grows too long turns NaN."""
    mixer = build(logits=logits)
    with pytest.raises(ValueError, match="length 12"):
        mixer(jnp.zeros((1, 13, 16)))
    run = jax.jit(mixer)
    y, carry = run(jnp.ones((1, 12, 16)), mixer.initial_carry(1, 14))
    assert np.isfinite(y).all()
    assert np.isnan(run(jnp.ones((1, 1, 16)), carry)[0]).all()


def test_untrained_tables():
    """`trained=False`: no gradient, and a group that the optimiser leaves alone."""
    mixer = build(logits="random", trained=False)
    assert mixer.r.get_metadata()["group"] == "fixed"
    gradient = nnx.grad(lambda mixer: mixer(jnp.ones((1, 4, 16)))[0].sum())(mixer)
    assert not np.asarray(gradient["r"][...]).any() and np.asarray(gradient["w_v"][...]).any()


def test_bad_logits():
    with pytest.raises(ValueError, match="dense"):
        build(logits="dense+dens")
