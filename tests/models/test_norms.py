"""Batch normalisation: statistics of the batch, running averages, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import ModelConfig
from models.norms import BatchNorm
from models.sequence_model import SequenceModel
from tests.tolerance import assert_close
from training import optimizer, sharding, state
from training.step import make_train_step

IDS = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [2, 2, 2, 2, 2]])


def test_statistics_leave_padding_out():
    """Against numpy over the tokens that are none; in evaluation the averages count, not the batch."""
    x = np.random.default_rng(0).normal(3, 2, (3, 5, 4)).astype(np.float32)
    norm = BatchNorm(4, rngs=nnx.Rngs(0))
    y, seen = norm(jnp.asarray(x), training=True, segment_ids=jnp.asarray(IDS))
    tokens = x[IDS != 0]
    assert_close(np.asarray(y)[IDS != 0], (tokens - tokens.mean(0)) / np.sqrt(tokens.var(0) + 1e-5))
    assert_close(seen["mean"], tokens.mean(0))
    assert_close(seen["variance"], tokens.var(0))
    y, seen = norm(jnp.asarray(x))
    assert_close(y, x / np.sqrt(1 + 1e-5))
    assert seen is None


def test_gradient_is_that_of_the_batch():
    """The statistics are differentiated through, as automatic differentiation of the definition has it."""
    x = jnp.asarray(np.random.default_rng(1).normal(1, 2, (2, 3, 4)), jnp.float32)
    weight = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 4)), jnp.float32)
    norm = BatchNorm(4, rngs=nnx.Rngs(0))

    def plain(x):
        flat = x.reshape(-1, 4)
        return jnp.sum(weight * ((flat - flat.mean(0)) / jnp.sqrt(flat.var(0) + 1e-5)).reshape(x.shape))

    found = jax.grad(lambda x: jnp.sum(weight * norm(x, training=True)[0]))(x)
    assert_close(found, jax.grad(plain)(x), 1e-4)


def built(clip_norm=1.0):
    """A stacked, rematerialised model with batch normalisation, on one device."""
    config = ModelConfig(vocab_size=5, targets=5, width=8, depth=2, pattern=("lru",), norm="batchnorm", remat="full")
    options = optimizer.OptimizerConfig(learning_rate=1e-3, clip_norm=clip_norm, schedule="constant")
    make = functools.partial(optimizer.build, options, 10)
    return state.build(lambda rngs: SequenceModel(config, rngs=rngs), make, sharding.make_mesh({}, jax.devices()[:1]))


def averages(params):
    """Those of the first norm of the stack."""
    norm = params["stack"]["stacked"]["blocks"]["0"]["mixer_norm"]
    return np.asarray(norm["mean"])[0], np.asarray(norm["variance"])[0]


def test_averages_follow_the_batches():
    """average <- average + 0.1 (batch - average) at every update, whatever the learning rate and the clipping; the batch's are
    the mean of the microbatches'; an update that is not finite moves nothing."""
    model = built(clip_norm=1e-3)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 5, (4, 6)))
    batch = {"inputs": ids, "targets": ids, "weights": jnp.ones(ids.shape)}
    first = jax.device_get(model.init(jax.random.key(0)))
    embedded = first["params"]["embedding"][ids]  # what the first norm of the stack sees
    step = make_train_step(model, accumulation=2, random=True)
    new, _ = step(jax.device_put(first, model.shardings), batch)
    halves = [embedded[i::2].reshape(-1, 8) for i in (0, 1)]  # microbatch i has every second row
    mean, variance = averages(new["params"])
    assert_close(mean, 0.1 * np.mean([half.mean(0) for half in halves], 0))
    assert_close(variance, 0.9 + 0.1 * np.mean([half.var(0) for half in halves], 0))
    assert not np.array_equal(new["params"]["norm"]["mean"], first["params"]["norm"]["mean"])
    after, metrics = step(new, batch | {"weights": jnp.full(ids.shape, jnp.inf)})
    assert metrics["skipped"] == 1
    np.testing.assert_array_equal(averages(after["params"]), (mean, variance))


def test_no_gradient_moves_the_averages():
    """What a model returns of a batch is all that does: their gradient is 0, in training and in evaluation."""
    model = built()
    params, ids = model.init(jax.random.key(0))["params"], jnp.arange(4)[None]
    for key in (None, jax.random.key(0)):
        gradient = jax.jit(jax.grad(lambda p, key=key: jnp.sum(model.apply(p, ids, key=key)[0] ** 2)))(params)
        assert not np.any(averages(gradient)) and np.any(gradient["embedding"])
