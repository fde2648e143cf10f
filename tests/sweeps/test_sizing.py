"""Widths against an exhaustive search, costs against the model that is built."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from common.errors import UserError
from data.task import Spec
from models.config import ModelConfig
from models.sequence_model import SequenceModel
from sweeps import sizing
from sweeps.sizing import Sized, solve
from training import setup

SPEC = Spec(vocab_size=11, channels=None, targets=11, objective="causal_lm", length=16)


def model(name, width=16, **options):
    return ModelConfig(vocab_size=11, targets=11, width=width, depth=2, pattern=(name,), length=16, **options)


def heads(step, power=2):
    def amount(width):
        if width % step:
            raise UserError(f"{width} cannot be divided into {step} heads")
        return 3 * width**power + 7 * width

    return amount


@pytest.mark.parametrize("step", [1, 4, 6, 96])
@pytest.mark.parametrize("budget", [1, 900, 54_321, 3_000_000])
def test_the_nearest_width_is_found(step, budget):
    amount = heads(step)
    found = solve(amount, budget, 64)
    errors = {w: abs(amount(w) - budget) for w in range(step * math.ceil(8 / step), 1200, step)}
    if found.width % 8 == 0 and abs(found.deviation) <= 0.01:
        assert errors[found.width] <= 0.01 * budget
    else:
        assert errors[found.width] == min(errors.values())
    assert found == Sized(found.width, budget, amount(found.width))
    assert found.reached == (abs(amount(found.width) / budget - 1) <= 0.05)


def test_hardware_likes_multiples_of_eight():
    assert solve(heads(1), heads(1)(1001), 64).width == 1000
    assert solve(heads(1), heads(1)(37), 64).width == 37


def test_what_cannot_be_sized():
    assert solve(lambda width: 1234, 999, 48) == Sized(48, 999, 1234), "as it is where the width does not matter"
    nothing = solve(lambda width: None, 999, 48)
    assert nothing == Sized(48, 999, None) and nothing.deviation is None and not nothing.reached

    def never(width):
        raise UserError("is not causal")

    with pytest.raises(UserError, match=r"^is not causal$"):
        solve(never, 999, 48)
    with pytest.raises(UserError, match="more than 0"):
        solve(heads(1), 0, 48)


def test_few_widths_are_looked_at():
    looked = []
    solve(lambda width: looked.append(width) or heads(1)(width), heads(1)(133), 96)
    assert 133 in looked and len(set(looked)) == len(looked) <= 8, "halves would be 7 of them, and their neighbours"


def test_a_model_is_counted_once(monkeypatch):
    counted = []
    count = setup.cost
    monkeypatch.setattr(setup, "cost", lambda model, spec: counted.append(model.width) or count(model, spec))
    costs = sizing.Costs()
    first = sizing.match(costs, model("attention"), SPEC, "params", 9_000)
    before = len(counted)
    assert sizing.match(costs, model("attention"), SPEC, "params", 9_000) == first and len(counted) == before
    assert any(width % 8 for width in counted), "a width that is refused is asked for once, too"
    costs.amount(model("attention", channel_mixer="mlp"), SPEC, "params")
    costs.amount(model("attention"), dataclasses.replace(SPEC, length=8), "flops")
    assert len(counted) == before + 2, "another model, and another task"


@pytest.mark.parametrize("fault", [ValueError, TypeError, ZeroDivisionError])
def test_a_fault_is_no_width_that_cannot_be_built(fault):
    def faulty(width):
        if width > 100:
            raise fault("a slip in a mixer")
        return width

    with pytest.raises(fault, match="a slip"):
        solve(faulty, 1000, 64)


@pytest.mark.parametrize("name", ["attention", "s4d"])
@pytest.mark.parametrize("measure", ["params", "state"])
def test_models_are_sized(name, measure):
    """The nearest of all widths that can be built."""
    budget = 1.1 * sizing.Costs().amount(model(name, 24), SPEC, measure)
    found = sizing.match(sizing.Costs(), model(name), SPEC, measure, budget)
    widths = [w for w in range(20, 29) if name != "attention" or w % 8 == 0]  # four heads, rotated in pairs
    amounts = {w: sizing.Costs().amount(dataclasses.replace(model(name), width=w), SPEC, measure) for w in widths}
    assert found.achieved == amounts[found.width]
    assert abs(found.achieved - budget) <= min(abs(a - budget) for a in amounts.values()) + 0.01 * budget


def test_costs_are_those_of_the_model():
    config = model("gla")
    cost = setup.cost(config, SPEC)
    built = SequenceModel(config, rngs=nnx.Rngs(0))
    assert cost.parameters == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(built, nnx.Param)))
    assert cost.carry_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(built.initial_carry(1, 16)))
    for measure, field in sizing.MEASURES.items():
        assert sizing.Costs().amount(config, SPEC, measure) == getattr(cost, field)
    encoder = dataclasses.replace(config, causal=False)
    assert setup.cost(encoder, SPEC).carry_bytes is None and sizing.Costs().amount(encoder, SPEC, "state") is None
    pair = dataclasses.replace(encoder, head="pair", targets=2, tie_embeddings=False)
    spec = dataclasses.replace(SPEC, objective="pair_classification", targets=2, metric="", metrics=(), causal=None)
    assert setup.cost(pair, spec).flops_per_token > 1.5 * setup.cost(encoder, SPEC).flops_per_token
    real = dataclasses.replace(encoder, vocab_size=None, channels=3, tie_embeddings=False)
    assert setup.cost(real, dataclasses.replace(SPEC, vocab_size=None, channels=3)).parameters > 0
