"""Batch normalisation: statistics of the batch, running averages, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from models.norms import BatchNorm
from models.sequence_model import ModelConfig, SequenceModel
from tests.tolerance import assert_close
from training import optimizer, sharding, state

IDS = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [2, 2, 2, 2, 2]])


def test_statistics_leave_padding_out():
    """Against numpy over the tokens that are none; in evaluation the averages count, not the batch."""
    x = np.random.default_rng(0).normal(3, 2, (3, 5, 4)).astype(np.float32)
    norm = BatchNorm(4, rngs=nnx.Rngs(0))
    y = norm(jnp.asarray(x), training=True, segment_ids=jnp.asarray(IDS))
    tokens = x[IDS != 0]
    assert_close(np.asarray(y)[IDS != 0], (tokens - tokens.mean(0)) / np.sqrt(tokens.var(0) + 1e-5))
    assert_close(norm(jnp.asarray(x)), x / np.sqrt(1 + 1e-5))


def test_gradient_is_that_of_the_batch():
    """The statistics are differentiated through, as automatic differentiation of the definition has it."""
    x = jnp.asarray(np.random.default_rng(1).normal(1, 2, (2, 3, 4)), jnp.float32)
    weight = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 4)), jnp.float32)
    norm = BatchNorm(4, rngs=nnx.Rngs(0))

    def plain(x):
        flat = x.reshape(-1, 4)
        return jnp.sum(weight * ((flat - flat.mean(0)) / jnp.sqrt(flat.var(0) + 1e-5)).reshape(x.shape))

    found = jax.grad(lambda x: jnp.sum(weight * norm(x, training=True)))(x)
    assert_close(found, jax.grad(plain)(x), 1e-4)


def test_averages_follow_the_batches():
    """Through the optimiser of a stacked, rematerialised model: average <- average + 0.1 (batch - average) at every update,
    whatever the learning rate, the clipping and the other gradients."""
    config = ModelConfig(vocab_size=5, targets=5, width=8, depth=2, pattern=("lru",), norm="batchnorm", remat="full")
    make = functools.partial(
        optimizer.build, optimizer.OptimizerConfig(learning_rate=1e-3, clip_norm=1e-3, schedule="constant"), 10
    )
    built = state.build(lambda rngs: SequenceModel(config, rngs=rngs), make, sharding.make_mesh({}, jax.devices()[:1]))
    current = built.init(jax.random.key(0))
    params, ids = current["params"], jnp.asarray(np.random.default_rng(0).integers(0, 5, (4, 6)))

    @jax.jit
    def step(params, opt):
        loss = lambda p: jnp.sum(built.apply(p, ids, key=jax.random.key(0))[0] ** 2)
        update, _ = built.optimizer.update(jax.grad(loss)(params), opt, params)
        return optax.apply_updates(params, update)

    new = step(params, current["opt"])
    embedded = params["embedding"][ids].reshape(-1, 8)  # what the first norm of the stack sees
    norm = lambda params: params["stack"]["stacked"]["blocks"]["0"]["mixer_norm"]
    assert_close(norm(new)["mean"][0], 0.1 * embedded.mean(0))
    assert_close(norm(new)["variance"][0], 0.9 + 0.1 * embedded.var(0))
