"""Luna: P passes from layer to layer, and the causal form takes packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import mixer as mixers
from models.sequence_model import ModelConfig, SequenceModel
from tests.tolerance import assert_close


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


def test_causal_packs():
    """The form declares it for itself: each document has the outputs that it has alone."""
    mixer = mixers.create("luna", 16, rngs=nnx.Rngs(0), memory=3)
    assert mixer.packing and not mixers.create("luna", 16, rngs=nnx.Rngs(0), causal=False).packing
    run = jax.jit(mixer)
    x = jax.random.normal(jax.random.key(0), (1, 12, 16))
    ids = jnp.array([[1] * 5 + [2] * 5 + [0] * 2])
    whole = run(x, segment_ids=ids)[0]
    assert_close(whole[:, :5], run(x[:, :5])[0])
    assert_close(whole[:, 5:10], run(x[:, 5:10])[0])
    _, carry = run(x[:, :6], mixer.initial_carry(1, 0), segment_ids=ids[:, :6])
    assert_close(run(x[:, 6:], carry, segment_ids=ids[:, 6:])[0], whole[:, 6:])
