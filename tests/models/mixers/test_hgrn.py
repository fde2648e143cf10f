"""HGRN and HGRN2: lower bounds of the forget gates across the layers of a model."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from models.sequence_model import ModelConfig, SequenceModel


@pytest.mark.parametrize("name", ["hgrn", "hgrn2"])
def test_lower_bounds(name):
    """0 in the first layer, rising, below 1 in the last; even steps at initialisation."""
    module = importlib.import_module(f"models.mixers.{name}")
    gamma = mixers.create_shared(name, 8, rngs=nnx.Rngs(0), causal=True, layers=4, length=16).gamma[...]
    np.testing.assert_allclose(module.lower_bounds(gamma), np.outer([0, 0.25, 0.5, 0.75], np.ones(8)), rtol=1e-6)
    bounds = np.asarray(module.lower_bounds(3 * jax.random.normal(jax.random.key(0), gamma.shape)))
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
