"""Every mixer in training: on a mesh it computes what one device computes, and the optimiser obeys its parameters' facts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from models.sequence_model import ModelConfig, SequenceModel
from tests.tolerance import assert_close
from training import optimizer, sharding, state
from training.step import make_train_step

CONFIG = optimizer.OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5, group_scale={"ssm": 0.25})


def build(name, sizes, devices):
    cls = mixers.find(name)
    config = ModelConfig(
        vocab_size=16,
        targets=16,
        causal=cls.causal,
        width=32,
        depth=2,
        pattern=(name,),
        mixer={name: {k: v for k, v in cls.tiny.items() if k in mixers.defaults(name)}},
    )
    mesh = sharding.make_mesh(sizes, devices)
    make_optimizer = functools.partial(optimizer.build, CONFIG, 10)
    return state.build(lambda rngs: SequenceModel(config, rngs=rngs), make_optimizer, mesh)


@pytest.mark.parametrize("name", mixers.names())
def test_sharded_equals_unsharded(name):
    """One step on data x fsdp x tensor = 2 x 2 x 2 devices gives the loss and the gradient norm of one device."""
    tokens = jax.random.randint(jax.random.key(0), (4, 20), 0, 16)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": jnp.ones((4, 19))}
    results = []
    for sizes, devices in (({}, jax.devices()[:1]), ({"data": 2, "fsdp": 2, "tensor": 2}, None)):
        built = build(name, sizes, devices)
        with jax.set_mesh(built.mesh):
            placed = jax.device_put(batch, sharding.batch_sharding(built.mesh))
            _, metrics = make_train_step(built)(built.init(jax.random.key(1)), placed)
        results.append([float(metrics[key]) for key in ("loss", "grad_norm")])
    assert_close(results[1], results[0])


@pytest.mark.parametrize("name", mixers.names())
def test_facts_reach_the_optimizer(name):
    """Without gradients only what says `decay` moves, by its group's learning rate times the weight decay."""
    built = build(name, {}, jax.devices()[:1])
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0), built.abstract["params"])
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(built.optimizer.update)(zeros, built.optimizer.init(params), params)[0]
    for (path, facts), moved in zip(
        jax.tree_util.tree_leaves_with_path(built.metadata), jax.tree.leaves(update), strict=True
    ):
        rate = 0.1 * {"default": 1.0, "ssm": 0.25}[facts.group]
        expected = -rate * 0.5 * 2.0 if facts.decay else 0.0
        np.testing.assert_allclose(moved, expected, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", mixers.names())
def test_sensitive_parameters(name):
    """No decay on vectors, filters and what sets time scales; these also stay in float32."""
    mixer = mixers.create(name, 32, rngs=nnx.Rngs(0), causal=mixers.find(name).causal, **mixers.find(name).tiny)
    for path, variable in nnx.to_flat_state(nnx.state(mixer)):
        facts = variable.get_metadata()
        leaf = str(path[-1])
        if variable.ndim < 2 or facts["group"] != "default":
            assert not facts["decay"], leaf
        if any(mark in leaf for mark in ("a_log", "log_a", "dt_bias", "log_dt", "nu_log", "theta_log")):
            assert facts["keep_float32"] and not facts["decay"], leaf
