"""The layers of a model as text, and stacks with blocks before and behind the repeats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from evaluation.diagnostics.probing import Unrolled, unstack
from models import mixer as mixers
from models.config import ModelConfig
from models.pattern import Item, expand, parse
from models.sequence_model import SequenceModel
from tests.tolerance import assert_close

# hgrn reads its place among its like; rwkv7 hands a stream from one to the next, and its first one is another.
AROUND = ModelConfig(
    vocab_size=11,
    targets=11,
    width=16,
    depth=7,
    length=12,
    prefix=("hgrn/none", "rwkv7/sandwich"),
    pattern=("hgrn/mlp", "rwkv7"),
    suffix=("rwkv7/post/geglu",),
    remat="mixer",
    mixer={"rwkv7": mixers.find("rwkv7").tiny, "hgrn": mixers.find("hgrn").tiny},
)


@pytest.mark.parametrize(
    "text,items",
    [
        ("mamba+local_attention", "mamba local_attention"),
        ("3*gla/moe+attention/moe", "gla/moe gla/moe gla/moe attention/moe"),
        ("2*(a+2*b)+c", "a b b a b b c"),
        ("(a|b/none)", "a|b/none"),
    ],
)
def test_multipliers_and_brackets_are_written_out(text, items):
    assert expand([text]) == tuple(items.split())


def test_words_behind_a_slash_are_known_by_themselves():
    assert parse("attention|mamba2/sandwich/moe") == Item(("attention", "mamba2"), "moe", "sandwich")
    assert parse("mamba") == Item(("mamba",))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "changes,message",
    [
        ({"prefix": ("hgrn+",)}, r"model.prefix: 'hgrn\+' is no pattern, it ends too soon"),
        ({"suffix": ("2*(hgrn",)}, "it ends too soon"),
        ({"suffix": ("hgrn)",)}, r"'\)' is out of place"),
        ({"suffix": ("0*hgrn",)}, "0 in .*: multipliers are from 1 to 1000"),
        ({"pattern": ("0*gla+mamba",)}, "0 in .*: multipliers are from 1 to 1000"),
        ({"pattern": (f"{10**40}*gla",)}, "multipliers are from 1 to 1000"),
        ({"suffix": ("hgrn/mpl",)}, "model.suffix: 'mpl' in 'hgrn/mpl' is neither.*did you mean 'mlp'"),
        ({"suffix": ("hgrn/mlp/none",)}, "has both 'mlp' and 'none'"),
        ({"suffix": ("hgrn|hgrn",)}, "must be different"),
        ({"suffix": ("hgrm",)}, "hgrn"),
        ({"suffix": "hgrn"}, "model.suffix must be names of mixers"),
        ({"depth": 8}, "2 of the prefix, 1 of the suffix, and a multiple of the pattern's 2: 7 or 9 would fit"),
        ({"depth": 3}, "5 or 7 would fit"),
        ({"prefix": (), "suffix": ()}, "multiple of the pattern's length 2: 6 or 8 would fit.*model.suffix"),
    ],
)
def test_what_does_not_fit_names_its_key(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(AROUND, **changes)


@pytest.mark.rest
def test_prefix_and_suffix_are_blocks_like_the_others():
    """A model equals the one with the same parameters whose pattern is all its layers, also in pieces; diagnostics see each."""
    graph, params = nnx.split(SequenceModel(AROUND, rngs=nnx.Rngs(0)))
    flat = AROUND.prefix + 2 * AROUND.pattern + AROUND.suffix
    whole = dataclasses.replace(AROUND, prefix=(), pattern=flat, suffix=())
    target, wanted = nnx.split(nnx.eval_shape(lambda: SequenceModel(whole, rngs=nnx.Rngs(0))))
    values = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(params)}

    def moved(path, leaf):
        name = ".".join(map(str, path))
        if name.startswith("stack.stacked.blocks."):
            layer, rest = name.removeprefix("stack.stacked.blocks.").split(".", 1)
            block, index = AROUND.place(int(layer))
            return leaf.replace(values[f"stack.{block}.{rest}"][index][None])
        return leaf.replace(values[name])

    wanted = nnx.from_flat_state([(path, moved(path, leaf)) for path, leaf in nnx.to_flat_state(wanted)])
    ids = np.random.default_rng(0).integers(0, 11, (2, 12))
    assert [mixer.name() for mixer in unstack(nnx.merge(graph, params))] == [text.split("/")[0] for text in flat]

    @jax.jit
    def run(params, wanted):
        model = nnx.merge(graph, params)
        carry, pieces = model.initial_carry(2, 12), []
        for piece in (slice(0, 7), slice(7, 8), slice(8, 12)):
            y, carry = model(ids[:, piece], carry)
            pieces.append(y)
        shown, own = [], nnx.clone(model)
        own.stack = Unrolled(own.stack, lambda layer, x, carry, **call: (x, shown.append(x))[0])
        tapped = own(ids)[0]
        return shown, (model(ids)[0], jnp.concatenate(pieces, 1), tapped, nnx.merge(target, wanted)(ids)[0])

    shown, (found, *others) = run(params, wanted)
    assert len(shown) == 7
    for other, what in zip(others, ("pieces", "tapped", "one pattern"), strict=True):
        assert_close(other, found, what=what)
