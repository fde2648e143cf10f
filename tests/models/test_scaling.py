"""Models that are scaled from a base: the program at the base's own size, the factors elsewhere, and what is refused."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from configs import recall
from models import scaling
from models.config import ModelConfig
from models.sequence_model import SequenceModel
from tests.tolerance import assert_close
from training import optimizer, setup
from training.config import resolve
from training.optimizer import OptimizerConfig
from training.state import Metadata, nest

CONFIG = ModelConfig(vocab_size=11, targets=11, width=32, depth=4, pattern=("attention",), length=16)


def resolved(**model):
    name = model.pop("optimizer", "adamw")
    config = recall.get_config("mixer=gla")
    config.model.update({"width": 16, "depth": 2, **model})
    config.optimizer.name = name
    config.train.update({"batch_size": 2, "steps": 10})
    config.optimizer.warmup_steps = 0
    return resolve(config)


def test_a_model_that_is_its_own_base_has_the_program_of_one_without():
    """Initial values and step, operation by operation; and other programs at another size. Muon has AdamW inside."""

    def programs(**base):
        config = resolved(optimizer="muon", **base)
        built = setup.build(config, devices=jax.devices()[:1])
        batch = {k: jax.ShapeDtypeStruct((2, 32), jnp.int32) for k in ("inputs", "targets")}
        batch["weights"] = jax.ShapeDtypeStruct((2, 32), jnp.float32)
        step = setup.train_step(config, built)
        step = str(jax.make_jaxpr(step.function)(built.abstract, batch, step.settings))
        init = built.init.lower(jax.random.key(0)).as_text()
        # Not the addresses of functions, nor the names of results.
        return re.sub(r"0x[0-9a-f]+", "", step), re.sub(r"jax\.result_info = \S+", "", init)

    plain = programs()
    assert programs(base_width=16, base_depth=2) == plain
    assert all(a != b for a, b in zip(programs(base_width=8, base_depth=1), plain))


def factors(config, name="adamw"):
    """The factor of each parameter's updates, by its name."""
    flat = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))))
    fields = [field.name for field in dataclasses.fields(Metadata)]
    metadata = nest({p: Metadata(**{field: v.get_metadata()[field] for field in fields}) for p, v in flat})
    found = optimizer.factors(name, metadata, nest(scaling.growth(config)))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): value
        for path, value in jax.tree_util.tree_leaves_with_path(found)
    }


def test_the_factors_of_updates():
    """Width 64 from 16, with heads of size 8 and gates of rank 16: the table of docs/scaling.md."""
    gla = {"pattern": ("gla",), "mixer": {"gla": {"heads": 8}}, "tie_embeddings": False, "expansion": 3.0}
    config = dataclasses.replace(CONFIG, width=64, base_width=16, **gla)
    adam, lion, muon = (factors(config, name) for name in ("adamw", "lion", "muon"))
    assert adam == lion
    block = "stack/stacked/blocks/0"
    for found in (adam, muon):
        for name in ("embedding", "head", "norm/weight", f"{block}/mixer/w_decay_out", f"{block}/mixer/b_decay"):
            assert found[name] == 1, name
    for name in ("mixer/w_q", "mixer/w_o", "mixer/w_decay_in", "channel_mixer/w_in", "channel_mixer/w_out"):
        assert adam[f"{block}/{name}"] == pytest.approx(1 / 4), name
    for name in ("mixer/w_q", "mixer/w_o", "channel_mixer/w_in", "channel_mixer/w_out"):
        assert muon[f"{block}/{name}"] == pytest.approx(1 / 2), name


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "muon"])
def test_updates_have_the_factors_and_decay_has_not(name):
    facts = {key: Metadata((axis, "mlp"), True, "default", False, (0,)) for key, axis in (("w", "embed"), ("b", None))}
    fans = {"w": ((16, 8), (4, 2)), "b": ((16, 8), (8, 4))}
    grown = {key: scaling.Growth(*value, depth=0.5) for key, value in fans.items()}
    params = {key: jnp.full((16, 8), 2.0) for key in fans}
    grads = {key: jax.random.normal(jax.random.key(1), (16, 8)) for key in fans}
    rate = {"learning_rate": 1.0, "schedule": "constant", "clip_norm": 0.0}

    def update(decay, given):
        tx = optimizer.build(OptimizerConfig(name=name, weight_decay=decay, eps=1e-30, **rate), 1, facts, given)
        return tx.update(grads, tx.init(params), params)[0]

    plain, scaled = update(0.0, None), update(0.0, optimizer.Scaling(grown, 1.0))
    # Muon's update has sqrt(16) where sqrt(8 / 16) is wanted, and half of both in the base.
    expected = {"w": 0.5 * (0.5 if name == "muon" else 0.25), "b": 0.5 * 0.5}
    for key, value in expected.items():
        np.testing.assert_allclose(scaled[key], value * plain[key], rtol=1e-6)
    if name != "adam":  # whose decay is part of the gradient
        np.testing.assert_allclose(
            update(0.1, optimizer.Scaling(grown, 1.0))["w"], scaled["w"] - 0.1 * 2.0, rtol=1e-5, atol=1e-6
        )


def test_adam_forgets_small_gradients_no_sooner_than_in_the_base():
    """Gradients 4 times smaller beside an eps 4 times smaller are the base's update."""
    facts, grown = {"b": Metadata(("mlp",), False, "default", False)}, {"b": scaling.Growth((1, 1), (1, 1))}
    config, g = OptimizerConfig(schedule="constant", clip_norm=0.0, eps=1e-2), {"b": jnp.linspace(-0.1, 0.1, 7)}
    base, tx = (optimizer.build(config, 1, facts, given) for given in (None, optimizer.Scaling(grown, 4.0)))
    smaller = jax.tree.map(lambda g: g / 4, g)
    found, expected = (t.update(x, t.init(g), g)[0]["b"] for t, x in ((tx, smaller), (base, g)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_depth():
    """Of a model scaled from half its depth, the last maps of branches start as in the base, and the branches have a factor; all
    in the stack learns slower the more of it the branches do not make up for."""
    config = dataclasses.replace(CONFIG, base_depth=2, depth_alpha=0.75)

    @jax.jit
    def run(ids):
        graph, values = nnx.split(SequenceModel(CONFIG, rngs=nnx.Rngs(0)))
        factor = 2**0.5 * 2**-0.75  # the gain of depth 2 over that of depth 4, times the branch's factor
        scaled = [
            (p, v.replace(v[...] * (factor if p[-1] in ("w_o", "w_out") else 1))) for p, v in nnx.to_flat_state(values)
        ]
        return SequenceModel(config, rngs=nnx.Rngs(0))(ids)[0], nnx.merge(graph, nnx.from_flat_state(scaled))(ids)[0]

    assert_close(*run(jax.random.randint(jax.random.key(0), (2, 16), 0, 11)))
    for name, value in factors(config).items():
        assert value == (2**-0.25 if name.startswith("stack") else 1.0), name


def test_logits_and_positions_of_a_wider_model():
    made = lambda **changes: SequenceModel(dataclasses.replace(CONFIG, depth=1, **changes), rngs=nnx.Rngs(0))
    untied = {"tie_embeddings": False, "position_embedding": "sinusoidal"}

    @jax.jit
    def run(ids):
        wide, narrow = made(base_width=8, **untied), made(width=8, **untied)
        logits = made(base_width=8, logit_scale=3.0)(ids)[0], made()(ids)[0]
        return logits, (wide.position_scale[...], narrow.position_scale[...]), wide.head[...]

    logits, positions, head = run(jax.random.randint(jax.random.key(0), (2, 16), 0, 11))
    assert_close(logits[0], 0.75 * logits[1])
    assert positions[0] == positions[1]
    assert math.isclose(jnp.std(head), 8**-0.5, rel_tol=0.1)


def test_the_base_model():
    """Sizes that follow the width do so in the base, given or not; the others are the model's."""
    config = dataclasses.replace(
        CONFIG, pattern=("mamba", "attention"), mixer={"attention": {"heads": 8}}, width=64, base_width=16
    ).as_used()
    base = config.base.as_used()
    assert (base.width, base.depth, base.transfers) == (16, 4, False)
    assert base.mixer["attention"]["heads"] == base.mixer["attention"]["kv_heads"] == 2
    assert config.mixer["mamba"]["dt_rank"] == 4 and base.mixer["mamba"]["dt_rank"] == 1
    assert config.mixer["mamba"]["state"] == base.mixer["mamba"]["state"]
    assert (config.channel_size, base.channel_size) == (170, 42)
    given = {"mamba": {"dt_rank": 5}, "attention": {"heads": 4, "kv_heads": 2}}
    odd = dataclasses.replace(config, mixer=given, width=48, base_width=16, channel_size=96).base
    assert odd.mixer["attention"]["heads"] == 4  # a third of them is no whole number
    assert odd.mixer["mamba"]["dt_rank"] == 5 and odd.channel_size == 32
    moe = {"hidden": 12, "shared": 1, "shared_hidden": 30}
    experts = dataclasses.replace(CONFIG, channel_mixer="moe", moe=moe, width=48, base_width=16).base.moe
    assert (experts["hidden"], experts["shared_hidden"]) == (4, 10)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"base_width": -1}, "model.base_width must be at least 0"),
        ({"base_depth": -2}, "model.base_depth must be at least 0"),
        ({"base_width": 18}, r"the model at model.base_width=18, .*divided into 4 heads"),
        ({"pattern": ("gla", "attention"), "base_depth": 1}, "model.base_depth=1 must be a multiple of the pattern's"),
        ({"base_depth": 2, "depth_alpha": 1.5}, "model.depth_alpha must be from 0.5 to 1"),
        ({"depth_alpha": 0.5}, "model.depth_alpha=0.5 acts only with model.base_depth"),
        ({"base_depth": 2, "norm_position": "post"}, "set model.norm_position='pre'"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes).as_used()


def test_an_optimizer_without_a_rule_is_refused():
    with pytest.raises(UserError, match=r"optimizer\.name='sgd' has no rule for config\.model\.base_width"):
        resolved(base_width=8, optimizer="sgd")
