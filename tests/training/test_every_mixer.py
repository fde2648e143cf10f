"""Every mixer in training: on a mesh it computes what one device computes, and the optimiser obeys its parameters' facts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import lra, recall
from models import mixer as mixers
from models.config import ModelConfig
from models.sequence_model import SequenceModel
from tests.collection import one_of_each_primitive
from tests.tolerance import assert_close
from training import optimizer, setup, sharding, state
from training.config import resolve
from training.state import Metadata

SCALES = {"default": 1.0, "ssm": 0.25, "fixed": 0.0}
CONFIG = optimizer.OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5, group_scale=SCALES)
LENGTH = 20


def model(name: str, rngs: nnx.Rngs, length: int = LENGTH) -> SequenceModel:
    cls = mixers.find(name)
    tiny = {key: value for key, value in cls.tiny.items() if key in mixers.defaults(name)}
    config = ModelConfig(
        vocab_size=16,
        targets=16,
        causal=cls.causal,
        length=length,
        width=32,
        depth=2,
        pattern=(name,),
        mixer={name: tiny},
        channel_mixer="none",
    )
    return SequenceModel(config, rngs=rngs)


@functools.cache
def sketch(name: str) -> SequenceModel:
    """The model without values."""
    return nnx.eval_shape(lambda: model(name, nnx.Rngs(0)))


@pytest.mark.thorough
@pytest.mark.parametrize("name", one_of_each_primitive(mixers.names()))
def test_sharded_equals_unsharded(name):
    """The loss and its gradients on data x fsdp x tensor = 2 x 2 x 2 devices are those of one device."""
    ids = jax.random.randint(jax.random.key(0), (4, LENGTH), 0, 16)
    params, results = None, []
    for sizes, devices in (({}, jax.devices()[:1]), ({"data": 2, "fsdp": 2, "tensor": 2}, None)):
        built = state.build(functools.partial(model, name), None, sharding.make_mesh(sizes, devices))

        def loss(params, ids, built=built):
            logits, _ = built.apply(params, ids)
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

        with jax.set_mesh(built.mesh):
            params = built.init(jax.random.key(1))["params"] if params is None else params
            params = jax.device_put(params, built.shardings["params"])
            placed = jax.device_put(ids, sharding.batch_sharding(built.mesh))
            results.append(jax.device_get(jax.jit(jax.value_and_grad(loss))(params, placed)))
    for found, expected in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(found, expected, 1e-4)


def test_facts_reach_the_optimizer():
    """Without gradients only what says `decay` moves, by its group's learning rate times the weight decay."""
    facts = {}
    for name in mixers.names():
        abstract = sketch(name)
        for path, variable in nnx.to_flat_state(nnx.state(abstract)):
            known = {key: variable.get_metadata()[key] for key in ("axes", "decay", "group", "keep_float32")}
            facts[f"{name}.{path}"] = Metadata(**known)
    # Parameters of equal facts are one to the optimiser, and compiling an update of some thousand arrays takes a minute.
    facts = {path: known for known, path in {known: path for path, known in facts.items()}.items()}
    params = {path: jnp.full((2,) * len(known.axes), 2.0) for path, known in facts.items()}
    zeros = jax.tree.map(jnp.zeros_like, params)
    built = optimizer.build(CONFIG, 10, facts)
    update = jax.jit(built.update)(zeros, built.init(params), params)[0]
    for path, known in facts.items():
        expected = -0.1 * SCALES[known.group] * 0.5 * 2.0 if known.decay else 0.0
        np.testing.assert_allclose(update[path], expected, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", mixers.names())
def test_sensitive_parameters(name):
    """Neither vectors nor what belongs to a state space decays; there, all but the maps of the input stays in float32."""
    abstract = sketch(name)
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        facts = variable.get_metadata()
        if len(facts["axes"]) < 2 or facts["group"] != "default":
            assert not facts["decay"], path
        if facts["group"] == "ssm" and "embed" not in facts["axes"]:
            assert facts["keep_float32"], path


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.thorough] * (not mixers.find(name).uses_context))
        for name in mixers.names()
    ],
)
def test_what_a_run_says_of_its_mixers(name):
    """A run begins with what one mixer costs, also of those that share parameters with others of their name."""
    config = (
        recall.get_config(f"task=mqar,mixer={name}")
        if mixers.find(name).causal
        else lra.get_config(f"task=listops,mixer={name}")
    )
    config.model.mixer = {name: mixers.find(name).tiny}
    table, flops = setup.cost_table(resolve(config))
    assert f"one {name}" in table and flops > 0
