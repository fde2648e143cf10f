"""The model around the mixers: embedding, stack, head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from models.block import Block
from models.config import ModelConfig
from models.mixer import Context
from models.sequence_model import SequenceModel, sinusoids
from models.stack import REMAT
from tests.tolerance import assert_close

CONFIG = ModelConfig(
    vocab_size=11,
    targets=11,
    width=16,
    depth=4,
    pattern=("mamba", "local_attention"),
    mixer={"mamba": {"state": 4}, "local_attention": {"window": 4}},
)


def make(**changes):
    return SequenceModel(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def ids(length=19):
    return jax.random.randint(jax.random.key(0), (2, length), 0, 11)


def test_the_law_holds_for_the_whole_model():
    """A hybrid stack, cut into pieces and tokens, on packed rows: the logits are those of the whole."""
    segments = jnp.asarray([[1] * 6 + [2] * 10 + [0] * 3, [1] * 19])

    @jax.jit
    def run(model, x):
        whole, none = model(x, segment_ids=segments)
        assert none is None
        carry = model.initial_carry(2, 19)
        pieces = []
        for a, b in ((0, 7), (7, 8), (8, 19)):
            y, carry = model(x[:, a:b], carry, segment_ids=segments[:, a:b])
            pieces.append(y)
        alone, _ = model(x[:1, 6:16])
        return whole, jnp.concatenate(pieces, 1), alone

    # linear_attention knows no order: its model has a position embedding, whose positions must survive the cuts too.
    for pattern, ngrams in ((CONFIG.pattern, ()), (("linear_attention", "local_attention"), (2, 9))):
        mixer = {name: CONFIG.mixer.get(name, {}) for name in pattern}
        whole, pieces, alone = run(make(pattern=pattern, mixer=mixer, ngrams=ngrams), ids())
        valid = np.asarray(segments) > 0
        assert_close(pieces[valid], whole[valid])
        assert_close(whole[:1, 6:16], alone, what="second document alone")


def test_stacked_repeats_are_the_blocks_in_order():
    """The scan over stacked parameters equals applying the blocks one after the other."""
    model = make()
    x = jax.random.normal(jax.random.key(1), (2, 9, 16))
    graph, stacked = nnx.split(model.stack.stacked)
    expected = x
    for i in range(2):
        pattern = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], stacked))
        for block in pattern.blocks:
            expected, *_ = jax.jit(lambda block, x: block(x, context=Context()))(block, expected)
    assert_close(jax.jit(lambda stack, x: stack(x)[0])(model.stack, x), expected)
    first, second = (np.asarray(p) for p in model.stack.stacked.blocks[0].mixer.w_in[...])
    assert not np.allclose(first, second)


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param(name, marks=() if name in ("mixer", "elementwise") else pytest.mark.thorough)
        for name in REMAT
        if name != "none"
    ],
)
def test_remat_changes_nothing(remat):
    """Values and gradients are the same under every rematerialisation policy."""

    @jax.jit
    def run(model):
        graph, params = nnx.split(model)
        loss = lambda params: jnp.sum(jnp.square(nnx.merge(graph, params)(ids())[0]))
        return jax.value_and_grad(loss)(params)

    for a, b in zip(jax.tree.leaves(run(make(remat=remat))), jax.tree.leaves(run(make())), strict=True):
        assert_close(a, b, 1e-4)


def test_dropout_needs_a_key():
    """Without a key nothing is dropped; with one the rate matters and the key decides."""
    run = jax.jit(lambda model, key=None: model(ids(), key=key)[0])
    model, plain = make(dropout=0.5), make()
    assert_close(run(model), run(plain))
    a, b = (run(model, jax.random.key(i)) for i in (1, 2))
    assert not np.allclose(a, b)
    assert_close(run(model, jax.random.key(1)), a)


def test_sinusoids():
    """sin and cos of position / 10000^(2i/D)."""
    expected = [f(3 / 10000 ** (2 * i / 8)) for f in (np.sin, np.cos) for i in range(4)]
    assert_close(sinusoids(jnp.array([[3]]), 8)[0, 0], np.array(expected))


def test_untied_head_and_post_norm():
    """An untied head has its own matrix; with post-norm the residual stream is normalised after every block."""
    model = make(tie_embeddings=False, norm_position="post", norm="layernorm")
    assert model.head[...].shape == (16, 11)
    x, *_ = model.stack(5 * jax.random.normal(jax.random.key(0), (2, 7, 16)))
    np.testing.assert_allclose(np.asarray(x).mean(-1), 0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(x).std(-1), 1, atol=1e-2)


def test_replaced_channel_mixer():
    """Mixers whose paper has no MLP beside them get none with "auto", and one when asked."""
    blocks = make().stack.stacked.blocks
    assert blocks[0].channel_mixer is None and blocks[1].channel_mixer is not None
    assert all(b.channel_mixer is not None for b in make(channel_mixer="mlp").stack.stacked.blocks)


def test_capabilities_are_those_of_what_is_built():
    """They depend on the form and the hyperparameters, which a mixer's class does not know."""

    def config(name, causal=True, **hyperparameters):
        return dataclasses.replace(CONFIG, pattern=(name,), mixer={name: hyperparameters}, causal=causal)

    luna = [config("luna", causal).sketches["luna"] for causal in (True, False)]
    assert [mixer.packing for mixer in luna] == [True, False] and all(mixer.padding for mixer in luna)
    mega = [config("mega", chunk=chunk).sketches["mega"].constant_carry for chunk in (None, 8)]
    assert mega == [False, True]
    assert config("gla").streams and not config("gla", causal=False).streams and not config("luna", False).streams
    assert config("performer").random and not config("performer", redraw=False).random
    assert not config("attention").sinusoidal and config("attention", positions="none").sinusoidal


def test_configuration_as_used():
    """It is that of the same model and leaves nothing to a default."""
    config = dataclasses.replace(CONFIG, norm="layernorm")
    used = config.as_used()
    assert used.as_used() == used
    assert (used.norm_eps, used.channel_size, used.position_embedding) == (1e-6, 42, "none")
    assert used.channel_mixer == "auto"  # mamba has none, local_attention one
    assert used.mixer["mamba"]["state"] == 4 and used.mixer["mamba"]["dt_rank"] == 1
    assert used.mixer["local_attention"]["kv_heads"] == 4
    for a, b in zip(*(nnx.split(SequenceModel(c, rngs=nnx.Rngs(0))) for c in (config, used)), strict=True):
        assert a == b if isinstance(a, nnx.GraphDef) else jax.tree.all(jax.tree.map(np.array_equal, a, b))
    bare = dataclasses.replace(CONFIG, pattern=("mamba",), mixer={}, channel_size=5).as_used()
    assert (bare.channel_mixer, bare.channel_size, bare.norm_eps) == ("none", None, 1e-6)
    plain = dataclasses.replace(CONFIG, pattern=("linear_attention",), mixer={}, norm="scalenorm").as_used()
    assert (plain.channel_mixer, plain.position_embedding, plain.norm_eps) == ("swiglu", "sinusoidal", 1e-5)


def test_scaled_logits():
    """The factor stands before the cap, and 1 is none."""
    logits = lambda **changes: make(**changes)(ids())[0]
    plain = logits()
    np.testing.assert_array_equal(logits(logit_scale=4.0), 4 * plain)
    assert_close(logits(logit_scale=4.0, logit_cap=0.5), 0.5 * jnp.tanh(4 * plain / 0.5))


def test_scaled_branches():
    """x <- a x + b f(norm(x)) in each branch of one block; and b c with c of the channel mixer's output."""
    x = np.float32(np.random.default_rng(0).standard_normal((1, 5, CONFIG.width)))
    context = Context(0, None, None)

    def block(**changes):
        config = dataclasses.replace(CONFIG, pattern=("linear_attention",), mixer={}, depth=1, **changes)
        return Block(config.items[0], 0, config, rngs=nnx.Rngs(0))

    plain, scaled = block(), block(residual_scale=2.0, branch_scale=0.5, channel_scales=(1.0, 3.0))
    f = plain.mixer(plain.mixer_norm(x), context=context)[0]
    h = 2 * x + 0.5 * f
    assert_close(scaled(x, context=context)[0], 2 * h + 1.5 * plain.channel_mixer(plain.channel_norm(h)))
    n = plain.mixer_norm(x)  # "input": the norms are of the residual, too
    h = plain.channel_norm(2 * n + plain.mixer(n, context=context)[0])
    found = block(residual_scale=2.0, norm_position="input")(x, context=context)[0]
    assert_close(found, 2 * h + plain.channel_mixer(h))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "changes,message",
    [
        ({"depth": 3}, "multiple"),
        ({"channel_scales": (1.0,)}, "model.channel_scales must be two"),
        ({"branch_scale": 0.0}, "model.branch_scale must be more than 0"),
        ({"pattern": ("mambo",), "mixer": {}}, "mamba"),
        ({"norm": "rms"}, "model.norm='rms' is unknown; did you mean 'rmsnorm'"),
        ({"loss": "rel"}, "model.loss='rel' is unknown; did you mean 'rle'"),
        ({"pattern": "mamba", "mixer": {}}, "model.pattern must be names"),
        ({"width": 0}, "model.width must be at least 1, got 0"),
        ({"depth": 0}, "model.depth must be at least 1, got 0"),
        ({"length": -1}, "model.length must be at least 1, got -1"),
        ({"channel_size": 0}, "model.channel_size must be at least 1, got 0"),
        ({"expansion": 0.0}, "model.expansion must be more than 0"),
        ({"norm_eps": float("nan")}, "model.norm_eps must be more than 0 and finite, got nan"),
        ({"dropout": 1.0}, "model.dropout must be at least 0 and less than 1, got 1.0"),
        ({"logit_scale": 0.0}, "model.logit_scale must be more than 0"),
        ({"logit_cap": -1.0}, "model.logit_cap must be at least 0"),
        ({"embedding_scale": float("inf")}, "model.embedding_scale must be finite"),
        ({"mixer": {"gla": {}}}, "does not use 'gla'"),
        ({"targets": 3}, "tie_embeddings"),
        ({"ngrams": (2, 1)}, "model.ngrams must be different numbers of tokens, each at least 2"),
        ({"ngrams": (3, 3)}, "model.ngrams must be different"),
        ({"ngrams": (2,), "ngram_rows": 0}, "model.ngram_rows must be at least 1, got 0"),
        ({"ngram_size": 7}, "model.ngram_size=7 has no effect"),
        ({"channel_mixer": "moe", "channel_bias": True}, "model.channel_bias=True has no effect: .*model.moe.bias"),
        ({"channel_mixer": "none", "channel_scales": (2.0, 1.0)}, "model.channel_scales=.* has no effect"),
        ({"head": "pair", "tie_embeddings": False, "logit_cap": 5.0}, "model.logit_cap=5.0 has no effect"),
        ({"loss": "squared", "tie_embeddings": False, "logit_scale": 2.0}, "model.logit_scale=2.0 has no effect"),
        (
            {"ngrams": (2,), "channels": 1, "vocab_size": None, "tie_embeddings": False},
            "this task's inputs are numbers",
        ),
    ],
)
def test_bad_configurations(changes, message):
    """One clear error each."""
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)
