"""Blocks whose mixer is made of several: the law, as for a mixer, and how they are combined."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from models import mixer as mixers
from models.config import ModelConfig
from models.parallel import COMBINE
from models.sequence_model import SequenceModel
from tests.models.test_contract import LENGTH, PACKED, PIECES, documents, inputs, normal
from tests.tolerance import assert_close

CONFIG = ModelConfig(vocab_size=7, targets=7, width=32, depth=1, length=LENGTH, channel_mixer="none")


def config(names, **options):
    tiny = {name: mixers.find(name).tiny for name in names.split("|")}
    return dataclasses.replace(CONFIG, pattern=(names,), mixer=tiny, **options)


def mixer(names, causal=True, **parallel):
    """A composite whose parameters are all off their initial values."""
    made = config(names, causal=causal, parallel=parallel)
    graph, params = nnx.split(made.make_mixer(made.items[0], dict.fromkeys(names.split("|"), 0), nnx.Rngs(0)))
    numbers = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + np.float32(0.1 * numbers.standard_normal(p.shape)), params)
    return nnx.merge(graph, params)


@pytest.mark.parametrize(
    "combine", ["gate", *(pytest.param(name, marks=pytest.mark.thorough) for name in COMBINE if name != "gate")]
)
def test_law(combine):
    """Cut anywhere, on packed rows with NaN at padding: outputs and carry are the same, and documents are as when alone."""
    made = mixer(
        "local_attention|gla|attention", combine=combine, input_scale=(2.0, 0.5, 1.0), output_scale=(0.5, 3, 1)
    )
    run = jax.jit(lambda x, carry, ids: made(x, carry, segment_ids=ids))
    x = inputs(PACKED)
    whole, gradient = jax.jit(
        lambda x: (lambda y, back: (y, back(normal(3))[0]))(*jax.vjp(lambda x: made(x, segment_ids=PACKED)[0], x))
    )(x)
    carries = []
    for pieces in (PIECES, (1,) * LENGTH):
        outputs, carry, at = [], made.initial_carry(3, LENGTH), 0
        for length in pieces:
            y, carry = run(x[:, at : at + length], carry, PACKED[:, at : at + length])
            outputs.append(y)
            at += length
        assert_close(jnp.concatenate(outputs, 1), whole, what=str(pieces))
        carries.append(carry)
    for a, b in zip(*map(jax.tree.leaves, carries), strict=True):
        assert_close(a, b, what="carry")
    assert not np.asarray(whole[PACKED == 0]).any() and not np.asarray(gradient[PACKED == 0]).any()
    assert np.isfinite(gradient).all()
    for row, which in ((0, 2), (2, 1)):
        document = documents(PACKED[row])[which]
        alone = run(np.concatenate([x[:, document], normal(5)], 1)[:, :LENGTH], None, np.ones_like(PACKED))[0]
        assert_close(whole[row, document], alone[row, : document.stop - document.start], what=f"row {row}")


@pytest.mark.parametrize("causal", [True, False])
def test_combinations(causal):
    """By the parts' own outputs; two-sided with the form that each part has."""
    x = normal(2)
    for combine in COMBINE:
        made = mixer("attention|gla", causal, combine=combine, input_scale=(2.0, 0.5), output_scale=(0.5, 3.0))
        output = jax.jit(lambda part, x: part(x)[0])
        first, second = (
            np.asarray(output(part, c * x)) for part, c in zip(made.parts.values(), (2.0, 0.5), strict=True)
        )
        if combine == "mean_norm":
            first, second = (
                np.asarray(norm.weight[...]) * y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-6) / 2
                for norm, y in zip(made.norms, (first, second), strict=True)
            )
        expected = 0.5 * first + 3.0 * second
        if combine == "gate":
            gate = 1 / (1 + np.exp(x @ np.asarray(made.w_gate[...]) @ [-1.0, 1.0]))[..., None]
            expected = gate * 0.5 * first + (1 - gate) * 3.0 * second
        assert_close(output(made, x), expected, what=combine)
        assert made.streams == causal and made.position_aware and not made.constant_carry


@pytest.mark.thorough
def test_streams_and_layers_go_by_name():
    """In a model whose layers hand something on inside and outside of composites, pieces give what the whole gives."""
    made = config(
        "rwkv7|hgrn", depth=4, prefix=("hgrn",), suffix=("rwkv7",), channel_mixer="auto", parallel={"combine": "gate"}
    )
    assert (made.layers("hgrn"), made.layers("rwkv7")) == (3, 3)
    model = SequenceModel(made, rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(0, 7, (2, 12))
    assert model.stack.suffix.layer(0, 0) == 2 and model.stack.stacked.layer(0, 1) == {"rwkv7": 1, "hgrn": 2}

    @jax.jit
    def run(model):
        carry, pieces = model.initial_carry(2, 12), []
        for piece in (slice(0, 7), slice(7, 8), slice(8, 12)):
            y, carry = model(ids[:, piece], carry)
            pieces.append(y)
        return model(ids)[0], jnp.concatenate(pieces, 1)

    whole, pieces = run(model)
    assert_close(pieces, whole)


def test_refusals():
    """Capabilities are those that all parts have, and factors are as many as parts."""
    two_sided = mixer("attention|luna", causal=False)
    assert two_sided.padding and not two_sided.packing and not two_sided.streams
    assert not config("attention|luna", causal=False).streams
    for parallel, message in (
        ({"combine": "mean"}, "model.parallel.combine='mean' is unknown"),
        ({"output_scale": (1.0,)}, "model.parallel.output_scale has 1 factors"),
        ({"combined": "sum"}, "nobody reads model.parallel.combined"),
    ):
        with pytest.raises(UserError, match=message):
            mixer("attention|gla", **parallel)
    with pytest.raises(UserError, match=r"model.parallel.combine='gate' has no effect"):
        dataclasses.replace(CONFIG, parallel={"combine": "gate"})
