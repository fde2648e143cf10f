"""First values of models that are scaled from a base: what docs/scaling.md asks of every parameter of every mixer.

A map of which the inputs grow has a deviation that falls as their number's square root; all else is drawn as in the base. A new
mixer that fails here is told the `base_width`, see `models.mixer.SURROUNDINGS`.
"""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from models.config import ModelConfig
from tests.collection import one_of_each_primitive

pytestmark = pytest.mark.rest

BASE, WIDE, LENGTH = 64, 256, 32
FEW = 24  # values, of which no deviation is told


def drawn(config, name):
    """By parameter its variable, of the mixer as the model builds it."""

    def make(key):
        return nnx.state(mixers.create(name, config.width, rngs=nnx.Rngs(key), **config.mixer_options(name)))

    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    state = jax.jit(make, compiler_options=quick)(jax.random.key(3, impl="unsafe_rbg"))
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def wide(name):
    """A model of one mixer, whose heads are as large as those of its base."""
    heads = {k: v * WIDE // BASE for k, v in mixers.defaults(name).items() if k.endswith("heads") and v}
    shape = {"causal": mixers.find(name).causal, "length": LENGTH, "depth": 1}
    return ModelConfig(11, 11, **shape, width=WIDE, base_width=BASE, pattern=(name,), mixer={name: heads})


def inputs(variable):
    return math.prod(variable.shape[i] for i in variable.get_metadata()["inputs"])


@pytest.mark.parametrize("name", one_of_each_primitive(mixers.names(), pytest.mark.thorough))
def test_first_values_follow_the_inputs(name):
    found, base = (drawn(config, name) for config in (wide(name), wide(name).base))
    assert found.keys() == base.keys()
    for parameter, variable in found.items():
        before, after = (np.asarray(v[...], np.float64) for v in (base[parameter], variable))
        if min(after.size, before.size) < FEW or not before.any():
            assert before.any() == after.any(), parameter
            continue
        rms = [math.sqrt(np.mean(np.square(a))) for a in (before, after)]
        noise = 5 * min(1.0, np.std(before) / rms[0]) / math.sqrt(2 * before.size)
        expected = math.sqrt(inputs(base[parameter]) / inputs(variable))
        assert rms[1] / rms[0] == pytest.approx(expected, rel=0.02 + noise), (
            f"{name}'s {parameter}, a map of {inputs(variable)} inputs that are {inputs(base[parameter])} in the base"
        )
