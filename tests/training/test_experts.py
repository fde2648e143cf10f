"""Mixtures of experts in training: the objective, the choice's bias, the log and the mesh."""

import functools

import jax
import numpy as np
import pytest

from models.config import ModelConfig
from models.sequence_model import SequenceModel
from tests.tolerance import assert_close
from training import optimizer, sharding, state
from training.step import make_train_step

CONFIG = ModelConfig(
    vocab_size=16,
    targets=16,
    width=16,
    depth=4,
    prefix=("gla/mlp",),
    pattern=("gla/moe",),
    suffix=("gla/moe",),
    mixer={"gla": {"heads": 2}},
    moe={"router": "sigmoid", "experts": 4, "shared": 1, "balance": 0.5, "z_loss": 0.1, "bias_update": 0.01},
)
LENGTH = 12


def batch():
    """Rows in pairs, so that both of two microbatches are alike; the last tokens of each are padding."""
    numbers = np.random.default_rng(0)
    ids = np.repeat(numbers.integers(0, 16, (4, LENGTH)), 2, 0)
    segments = np.repeat(np.where(np.arange(LENGTH) < numbers.integers(6, LENGTH, (4, 1)), 1, 0), 2, 0)
    return {"inputs": ids, "targets": np.roll(ids, -1, 1), "weights": np.float32(segments), "segment_ids": segments}


@pytest.mark.thorough
def test_a_step_on_a_mesh_and_in_microbatches():
    """Rows and experts split over devices, in two microbatches: parameters, biases and records are those of one device."""
    rule = optimizer.OptimizerConfig(name="sgd", learning_rate=0.1, schedule="constant", b1=0.0, clip_norm=0.0)
    results, first = [], None
    for sizes, devices, accumulation in (({}, jax.devices()[:1], 1), ({"expert": 2, "data": 2, "tensor": 2}, None, 2)):
        built = state.build(
            lambda rngs: SequenceModel(CONFIG, rngs=rngs),
            functools.partial(optimizer.build, rule, 10),
            sharding.make_mesh(sizes, devices),
        )
        step = make_train_step(built, accumulation=accumulation, random=CONFIG.random)
        with jax.set_mesh(built.mesh):
            made = jax.device_get(built.init(jax.random.key(1)))
            first = made if first is None else first
            placed = jax.device_put(first, built.shardings)
            after, metrics = step(placed, jax.device_put(batch(), sharding.batch_sharding(built.mesh)))
            experts = after["params"]["stack"]["suffix"]["blocks"]["0"]["channel_mixer"]["w_in"]
            assert experts.sharding.spec[0] == ("expert" if sizes else None)
            results.append(jax.device_get((after["params"], metrics)))
    for found, expected in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(found, expected, 1e-4)
    params, metrics = results[0]
    assert metrics["moe_balance"] > 0.9 and metrics["moe_max_load"] >= 1 and metrics["moe_z"] > 0
    bias = params["stack"]["stacked"]["blocks"]["0"]["channel_mixer"]["bias"]
    assert bias.shape == (2, 4) and set(np.abs(np.float32(100) * bias).round(3).ravel()) <= {0.0, 1.0} and bias.any()
