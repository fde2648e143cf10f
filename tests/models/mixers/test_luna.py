"""Luna: P passes from layer to layer, two-sided."""

import jax
import numpy as np
from flax import nnx

from models.config import ModelConfig
from models.sequence_model import SequenceModel


def test_memory_reaches_the_next_layer():
    """What becomes of P in the first of two layers, by its norm, matters to the output; in the last it does not."""
    config = ModelConfig(vocab_size=7, targets=7, width=16, depth=2, length=8, causal=False, pattern=("luna",))
    graph, params = nnx.split(SequenceModel(config, rngs=nnx.Rngs(0)))
    tokens = np.arange(8)[None] % 7
    gradient = jax.jit(jax.grad(lambda params: (nnx.merge(graph, params)(tokens)[0] ** 2).sum()))(params)
    found = {".".join(map(str, path)): np.abs(value[...]) for path, value in nnx.to_flat_state(gradient)}
    (norm,) = (value for name, value in found.items() if name.endswith("mixer.norm.weight"))
    (shared,) = (value for name, value in found.items() if name.endswith("luna.p"))
    assert norm[0].max() > 0 and not norm[1].any()
    assert shared.max() > 0
