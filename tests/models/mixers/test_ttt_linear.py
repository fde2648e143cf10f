"""What TTT-Linear's inner model learns while it reads."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import mixer as mixers
from ops.ttt import ttt


def test_initialisation():
    """W of standard deviation 0.02, the step size falling as 1/i in a mini-batch, LayerNorms of gain 1."""
    mixer = mixers.create("ttt_linear", 64, rngs=nnx.Rngs(0))
    assert abs(np.std(mixer.memory[...]) - 0.02) < 0.002
    assert not np.asarray(mixer.offset[...]).any() and mixer.offset.shape == (16,)
    assert (np.asarray(mixer.head_norm[...]) == 1).all()


def test_inner_loss_falls():
    """On a sequence that repeats one token, f(k; W) comes closer to v at each mini-batch."""
    k, v = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    tokens = [jnp.broadcast_to(a, (1, 64, 1, 8)) for a in (k, k, v)]
    rates = jnp.full((1, 64, 1), 1 / 8), 1 / jnp.arange(1.0, 17)
    weight = 0.02 * jax.random.normal(jax.random.key(1), (1, 9, 8))
    y, _ = jax.jit(ttt)(*tokens, *rates, (weight,), jnp.ones((1, 8)), jnp.zeros((1, 8)))
    loss = np.square(np.asarray(y - v)).sum((0, 2, 3))
    assert (np.diff(loss[15::16]) < 0).all()
