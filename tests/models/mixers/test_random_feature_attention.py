"""Random feature attention: what its features estimate, and when they are drawn."""

import jax
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from tests.tolerance import assert_close, error


def test_more_features_estimate_gaussian_attention_better():
    """Two-sided, with enough keys that the floor of the denominator does not bind: softmax attention on the unit sphere."""
    x = np.float32(np.random.default_rng(0).standard_normal((1, 300, 16)))
    errors = []
    for features in (16, 1024):
        mixer = mixers.create("random_feature_attention", 16, rngs=nnx.Rngs(0), causal=False, features=features)
        q, k, v = np.moveaxis(np.einsum("btd,dshk->bshtk", x, mixer.w_qkv[...]), 1, 0)
        q, k = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (q, k))
        weights = np.exp(q @ np.swapaxes(k, -1, -2))
        expected = np.einsum("bhtk,hkd->btd", weights / weights.sum(-1, keepdims=True) @ v, mixer.w_o[...])
        errors.append(error(jax.jit(mixer)(x)[0], expected))
    assert errors[1] < errors[0] / 4  # 8 in expectation


@pytest.mark.parametrize("redraw", [True, False])
def test_redraw(redraw):
    """Training draws new features at every step unless told not to; evaluation never does."""
    x = np.float32(np.random.default_rng(0).standard_normal((1, 6, 16)))
    mixer = mixers.create("random_feature_attention", 16, rngs=nnx.Rngs(0), features=8, redraw=redraw)
    run = jax.jit(lambda key: mixer(x, context=mixers.Context(key=key))[0])
    outputs = [run(key) for key in (*jax.random.split(jax.random.key(5)), None)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.allclose(outputs[a], outputs[b]) != redraw


def test_gate_has_no_two_sided_form():
    with pytest.raises(ValueError, match="gate=False"):
        mixers.create("random_feature_attention", 16, rngs=nnx.Rngs(0), causal=False, gate=True)


def test_gate_streams():
    """The option that the contract's tests do not build obeys the law as well: two pieces of a packed row."""
    mixer = mixers.create("random_feature_attention", 16, rngs=nnx.Rngs(0), features=8, gate=True)
    x = np.float32(np.random.default_rng(0).standard_normal((1, 12, 16)))
    ids = np.array([[1] * 3 + [2] * 7 + [0] * 2], np.int32)
    run = jax.jit(lambda x, carry, ids: mixer(x, carry, segment_ids=ids))
    first, carry = run(x[:, :6], mixer.initial_carry(1, 12), ids[:, :6])
    second, _ = run(x[:, 6:], carry, ids[:, 6:])
    assert_close(np.concatenate([first, second], 1), run(x, None, ids)[0])
