"""Mixtures of experts, beside a loop over tokens and experts in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from models import accounting
from models.config import ModelConfig
from models.moe import MoE
from models.norms import Load, follow
from models.sequence_model import SequenceModel
from tests.tolerance import assert_close

B, T, D, E, F = 2, 7, 6, 8, 5
IDS = np.array([[1, 1, 1, 2, 2, 0, 0], [0, 3, 3, 3, 3, 3, 3]], np.int32)
OPTIONS = {
    "softmax": {"router": "softmax", "shared": 2, "shared_gate": True},
    "softmax_topk": {"router": "softmax_topk", "activation": "relu2"},
    "sigmoid": {"router": "sigmoid", "groups": 4, "top_groups": 2, "scale": 2.5, "shared": 1},
    "clamped": {"router": "softmax", "renormalize": False, "scale": 1.5, "activation": "clamped_swiglu", "bias": True},
}
RUN_ALWAYS = ("sigmoid", "clamped")


def layer(**options):
    """A mixture whose parameters are all off their initial values."""
    graph, params = nnx.split(MoE(D, rngs=nnx.Rngs(0), experts=E, top_k=3, hidden=F, **options))
    numbers = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + np.float32(0.3 * numbers.standard_normal(p.shape)), params)
    if options.get("bias"):  # beyond the limits of the clamped gate
        params["b_in"] = jax.tree.map(lambda p: 20 * p, params["b_in"])
    return nnx.merge(graph, params)


def x(seed=2):
    return np.float32(np.random.default_rng(seed).standard_normal((B, T, D)))


def expected(moe, x):
    """y, the choices and the shares of one token after the other."""
    wide = lambda p: np.asarray(p[...], np.float64)
    silu, sigmoid = (lambda a: a / (1 + np.exp(-a))), (lambda a: 1 / (1 + np.exp(-a)))
    gated = moe.w_in.shape[2] == 2
    act = lambda h: silu(h[0]) * h[1] if gated else np.maximum(h[0], 0) ** 2
    if moe.b_in is not None:
        cut = lambda h: (min(h[0], 7), np.clip(h[1], -7, 7))
        clamped = lambda g, v: g * sigmoid(1.702 * g) * (v + 1)
        act = lambda h: np.array([clamped(*cut(column)) for column in h.T])
        assert (np.abs(wide(moe.b_in)) > 8).any()
    y, choices, shares = np.zeros(x.shape), np.zeros((B, T, 3), int), np.zeros((B, T, E))
    for place in np.ndindex(B, T):
        u = x[place].astype(np.float64)
        logits = u @ wide(moe.w_router)
        if moe.router == "sigmoid":
            scores = sigmoid(logits)
            choice = scores + wide(moe.bias)
            sums = [np.sort(choice[2 * g : 2 * g + 2])[-2:].sum() for g in range(4)]
            for g in np.argsort(sums)[:2]:  # the groups that are left out
                choice[2 * g : 2 * g + 2] = -np.inf
            shares[place] = scores / scores.sum()
        else:
            choice = logits + (wide(moe.bias) if moe.bias is not None else 0)
            scores = np.exp(choice)
            shares[place] = scores / scores.sum()
        best = np.argsort(-choice)[:3]
        choices[place] = best
        for e in best:
            h = np.stack([u @ wide(moe.w_in)[e, :, i] for i in range(moe.w_in.shape[2])])
            h = h if moe.b_in is None else h + wide(moe.b_in)[e]
            weight = scores[e] / (scores[best].sum() if moe.renormalize else scores.sum())
            y[place] += (
                moe.scale * weight * (act(h) @ wide(moe.w_out)[e] + (0 if moe.b_out is None else wide(moe.b_out)[e]))
            )
        if moe.shared is not None:
            h = np.stack([u @ wide(moe.shared.w_in)[:, i] for i in range(2)])
            factor = 1 if moe.w_shared_gate is None else sigmoid(u @ wide(moe.w_shared_gate))
            y[place] += factor * (act(h) @ wide(moe.shared.w_out))
    return y, choices, shares


@pytest.mark.parametrize(
    "router", [name if name in RUN_ALWAYS else pytest.param(name, marks=pytest.mark.thorough) for name in OPTIONS]
)
def test_equals_the_loop(router):
    """Values, the auxiliary losses in closed form and the loads, with and without padding; padding enters nothing."""
    moe = layer(**OPTIONS[router], balance=0.5, z_loss=0.25)
    y, choices, shares = expected(moe, x())
    assert_close(moe(x())[0], y)
    dirty = np.where((IDS == 0)[..., None], np.float32(np.nan), x())
    run = lambda x: moe(x, segment_ids=IDS, training=True)
    (padded, followed, scalars), gradient = jax.jit(
        lambda x: (run(x), jax.grad(lambda x: jnp.sum(run(x)[0]) + run(x)[2]["objective"])(x))
    )(dirty)
    valid = IDS != 0
    assert_close(padded[valid], y[valid])
    assert (
        not np.asarray(padded[~valid]).any() and not np.asarray(gradient[~valid]).any() and np.isfinite(gradient).all()
    )
    loads = np.bincount(choices[valid].ravel(), minlength=E)
    balance = E * np.sum(loads / loads.sum() * shares[valid].mean(0))
    z = np.mean(np.log(np.exp(x()[valid].astype(np.float64) @ np.asarray(moe.w_router[...])).sum(-1)) ** 2)
    assert_close(scalars["moe_balance"], balance)
    assert_close(scalars["moe_z"], z)
    assert_close(scalars["objective"], 0.5 * balance + 0.25 * z)
    assert_close(scalars["moe_max_load"], E * loads.max() / loads.sum())
    if router == "sigmoid":
        np.testing.assert_array_equal(followed["bias"].counts, loads)
    else:
        assert not followed


def test_a_token_knows_no_other():
    """Whatever the others of the batch are, its output is the same; so are single tokens."""
    moe = layer(router="sigmoid")
    alone = moe(x())[0]
    other = np.concatenate([x()[:1], np.repeat(x(3)[:1, :1], T, 1)])  # whose tokens all choose the same experts
    assert_close(moe(other)[0][0], alone[0])
    assert_close(moe(x()[:, 4:5])[0], alone[:, 4:5])


def test_gradient_reaches_router_and_experts():
    """By differences of the objective and of a sum of outputs, along one direction."""
    graph, params = nnx.split(layer(router="sigmoid", balance=1.0, z_loss=1.0))
    direction = jax.tree.map(lambda p: np.float32(np.random.default_rng(5).standard_normal(p.shape)), params)

    @jax.jit
    def loss(step):
        moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
        moved["bias"] = params["bias"]
        y, _, scalars = nnx.merge(graph, moved)(x(), training=True)
        return jnp.sum(y * x(6)) + scalars["objective"]

    h = 1e-3
    assert_close(jax.grad(loss)(0.0), (loss(h) - loss(-h)) / (2 * h), 1e-3)


def test_bias_follows_the_load():
    """Down by the step where there is more than the mean, and up where there is less; no gradient moves it."""
    params = {"block": {"bias": np.zeros((2, 3), np.float32)}, "norm": {"weight": np.ones(1)}}
    loads = Load(np.array([[4.0, 1, 1], [2, 2, 2]], np.float32), np.full(2, 0.01, np.float32))
    after = follow(params, {"block": {"bias": loads}, "norm": None})
    np.testing.assert_allclose(after["block"]["bias"], [[-0.01, 0.01, 0.01], [0, 0, 0]])
    assert after["norm"] is params["norm"]
    assert layer(router="sigmoid").bias.get_metadata()["group"] == "fixed"


def test_active_parameters_and_operations():
    """A token uses k / E of the experts' parameters, and by default as many as in a dense channel mixer."""
    config = ModelConfig(
        vocab_size=11, targets=11, width=24, depth=2, pattern=("gla/moe", "gla/none"), mixer={"gla": {"heads": 2}}
    )
    make = lambda config: nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    sparse = make(config)
    dense = make(dataclasses.replace(config, pattern=("gla/swiglu", "gla/none")))
    router, (experts, width, maps, hidden) = 24 * 8, (8, 24, 2, 32)
    assert sparse.stack.stacked.blocks[0].channel_mixer.w_in.shape[1:] == (experts, width, maps, hidden)
    total, active = accounting.parameter_count(sparse), accounting.active_parameter_count(sparse)
    assert active == accounting.parameter_count(dense) + router == total - 6 * width * 3 * hidden
    assert config.as_used().moe["hidden"] == hidden and config.as_used().as_used() == config.as_used()
    assert config.random


@pytest.mark.parametrize(
    "options,message",
    [
        ({"top_k": 9}, "model.moe.top_k must be from 1 to 8"),
        ({"router": "sigmod"}, "did you mean 'sigmoid'"),
        ({"groups": 3}, "must divide model.moe.experts=8"),
        ({"groups": 4, "top_groups": 1, "top_k": 3, "router": "sigmoid"}, "must hold model.moe.top_k=3"),
        ({"groups": 2}, "is for model.moe.router='sigmoid'"),
        ({"shared_gate": True}, "set model.moe.shared"),
        ({"router": "softmax_topk", "renormalize": False}, "leave model.moe.renormalize at True"),
        ({"activation": "clamped_swiglu", "shared": 1}, "model.moe.shared is for other activations"),
        ({"hidden": 0}, "model.moe.hidden must be 1 or more"),
        ({"bias_update": 0.01}, "model.moe.bias_update=0.01 is of the bias of model.moe.router='sigmoid'"),
        ({"expert": 4}, "nobody reads model.moe.expert"),
    ],
)
def test_refusals(options, message):
    config = ModelConfig(vocab_size=11, targets=11, channel_mixer="moe", moe={}, width=16, depth=1)
    with pytest.raises(UserError, match=message):
        nnx.eval_shape(lambda: SequenceModel(dataclasses.replace(config, moe=options), rngs=nnx.Rngs(0)))


def test_options_without_experts_are_refused():
    with pytest.raises(UserError, match=r"model.moe.experts=4 has no effect"):
        ModelConfig(vocab_size=11, targets=11, moe={"experts": 4})
