"""HGRN and HGRN2: lower bounds of the forget gates across the layers of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from models.config import ModelConfig
from models.sequence_model import SequenceModel


@pytest.mark.parametrize("name", ["hgrn", "hgrn2"])
def test_lower_bounds(name):
    """0 in the first layer, rising, below 1 in the last; even steps at initialisation."""
    shared = mixers.create_shared(name, 8, rngs=nnx.Rngs(0), causal=True, layers=4, length=16)
    bounds = lambda: np.asarray(shared(jnp.zeros((1, 2, 8)), segment_ids=None, positions=jnp.array([[0, 1]])))
    np.testing.assert_allclose(bounds(), np.outer([0, 0.25, 0.5, 0.75], np.ones(8)), rtol=1e-6)
    shared.gamma[...] = 3 * jax.random.normal(jax.random.key(0), shared.gamma.shape)
    bounds = bounds()
    assert (bounds[0] == 0).all() and (np.diff(bounds, axis=0) > 0).all() and bounds[-1].max() < 1


def test_model_shares_the_bounds():
    """One set of bounds for all layers, and every layer's row has a gradient (but for what softmax leaves undetermined)."""
    config = ModelConfig(vocab_size=7, targets=7, width=16, depth=3, pattern=("hgrn",), channel_mixer="none")
    graph, params = nnx.split(SequenceModel(config, rngs=nnx.Rngs(0)))
    ids = jax.random.randint(jax.random.key(1), (2, 9), 0, 7)
    loss = lambda params: jnp.sum(nnx.merge(graph, params)(ids)[0] ** 2)
    gradients = jax.jit(jax.grad(loss))(params)
    gamma = gradients["stack"]["shared"]["hgrn"]["gamma"][...]
    assert gamma.shape == (3, 16) and (np.abs(gamma).max(1) > 0).all()
