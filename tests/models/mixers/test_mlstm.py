"""mLSTM's initial gates, and its running maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers


def test_initial_values():
    """Gates that do not depend on the input yet; forget biases from 3 to 6 over the heads."""
    mixer = mixers.create("mlstm", 32, rngs=nnx.Rngs(0), depth=4)
    np.testing.assert_allclose(mixer.b_f[...], [3, 4, 5, 6], rtol=1e-6)
    assert not np.asarray(mixer.w_gates[...]).any() and np.abs(mixer.b_i[...]).max() < 0.5
    assert abs(np.std(mixer.w_up[...]) / np.sqrt(2 / (5 * 32)) - 1) < 0.05
    assert abs(np.std(mixer.w_down[...]) / (2 / (4 * np.sqrt(32))) - 1) < 0.05
    with pytest.raises(ValueError, match="block_size"):
        mixers.create("mlstm", 6, rngs=nnx.Rngs(0), block_size=5)


def test_extreme_gates():
    """Input gates of exp(+-300) give finite outputs and gradients."""
    graph, params = nnx.split(mixers.create("mlstm", 16, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (1, 9, 16))

    @jax.jit
    def run(params, bias):
        def loss(params):
            mixer = nnx.merge(graph, params)
            mixer.b_i[...] += bias
            return jnp.sum(mixer(x)[0] ** 2)

        return jax.value_and_grad(loss)(params)

    for bias in (300.0, -300.0):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run(params, bias)))
