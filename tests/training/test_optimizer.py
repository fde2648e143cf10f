"""Schedules against closed forms, updates against numpy, and the facts of parameters against the built optimiser."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training import optimizer
from training.optimizer import OPTIMIZERS, OptimizerConfig
from training.state import Metadata

TOTAL, WARMUP, PEAK, FINAL = 100, 10, 0.5, 0.1


def facts(*axes, decay=True, group="default", active=1.0):
    return Metadata(axes, decay, group, keep_float32=False, active=active)


METADATA = {
    "w": facts("embed", "mlp"),
    "stacked": facts("embed", "heads", None),
    "scale": facts("embed", decay=False),
    "log_a": facts("mlp", "state", decay=False, group="ssm"),
    "b": facts("mlp", "state", group="ssm"),
}
SHAPES = {"w": (4, 6), "stacked": (3, 4, 2, 3), "scale": (4,), "log_a": (4, 2), "b": (4, 2)}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def update(config, grads, params, steps=1, metadata=METADATA):
    """The updates of the last of some steps with the same gradients."""
    tx = optimizer.build(config, TOTAL, metadata)

    @jax.jit
    def run(grads, params):
        state = tx.init(params)
        for _ in range(steps):
            updates, state = tx.update(grads, state, params)
        return updates

    return jax.tree.map(np.asarray, run(grads, params))


def plain(name, **kwargs):
    return OptimizerConfig(
        name=name, schedule="constant", learning_rate=PEAK, **{"clip_norm": 0.0, "group_scale": {"ssm": 1.0}, **kwargs}
    )


def closed_form(name, count):
    s = count + 1
    if s <= WARMUP:
        return PEAK * s / WARMUP
    progress = (s - WARMUP) / (TOTAL - WARMUP)
    return (
        PEAK
        * {
            "cosine": FINAL + (1 - FINAL) * math.cos(math.pi * progress / 2) ** 2,
            "linear": 1 - (1 - FINAL) * progress,
            "rsqrt": max(FINAL, math.sqrt(WARMUP / s)),
            "wsd": 1.0 if s <= 80 else 1 - (1 - FINAL) * (s - 80) / 20,
            "constant": 1.0,
        }[name]
    )


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
def test_schedule_is_its_closed_form(name):
    config = OptimizerConfig(schedule=name, learning_rate=PEAK, warmup_steps=WARMUP, final_fraction=FINAL)
    rate = jax.jit(optimizer.schedule(config, TOTAL))
    counts = range(TOTAL)
    np.testing.assert_allclose([rate(c) for c in counts], [closed_form(name, c) for c in counts], rtol=2e-6)
    assert rate(TOTAL + 50) == rate(TOTAL - 1)
    if name not in ("rsqrt", "constant"):
        np.testing.assert_allclose(rate(TOTAL - 1), PEAK * FINAL, rtol=1e-6)


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
def test_schedule_without_warmup_starts_at_the_peak(name):
    rate = optimizer.schedule(OptimizerConfig(schedule=name, learning_rate=PEAK), 1000)
    np.testing.assert_allclose(rate(0), PEAK, rtol=2e-3)
    assert np.isfinite(optimizer.schedule(OptimizerConfig(schedule=name, decay_fraction=0.0), 1)(0))


def test_optimizer_uses_and_reports_the_schedule():
    none = {"b1": 0.0, "weight_decay": 0.0, "clip_norm": 0.0}
    config = OptimizerConfig(name="sgd", schedule="linear", learning_rate=PEAK, final_fraction=0.1, **none)
    tx = optimizer.build(config, 4, METADATA)
    params = tree(0)
    step = jax.jit(lambda state: tx.update(params, state, params))
    state = tx.init(params)
    for count in range(4):
        updates, state = step(state)
        rate = PEAK * (1 - 0.9 * (count + 1) / 4)
        np.testing.assert_allclose(updates["w"], -rate * params["w"], rtol=1e-6)
        np.testing.assert_allclose(tx.learning_rate(count), rate, rtol=1e-6)


def test_updates_are_the_papers():
    """Two steps with gradients g, -g/2 against the equations in numpy."""
    lr, wd, b1, b2, eps = PEAK, 0.1, 0.9, 0.95, 1e-8
    params, first = tree(0), tree(1)
    second = jax.tree.map(lambda g: -g / 2, first)
    theta, g1, g2 = (np.asarray(t["w"], np.float64) for t in (params, first, second))

    def adam(g1, g2):
        m = (b1 * (1 - b1) * g1 + (1 - b1) * g2) / (1 - b1**2)
        v = (b2 * (1 - b2) * g1**2 + (1 - b2) * g2**2) / (1 - b2**2)
        return m / (np.sqrt(v) + eps)

    lion_m = (1 - b2) * g1
    expected = {
        "adamw": adam(g1, g2) + wd * theta,
        "adam": adam(g1 + wd * theta, g2 + wd * theta),
        "sgd": b1 * (g1 + wd * theta) + g2 + wd * theta,
        "lion": np.sign(b1 * lion_m + (1 - b1) * g2) + wd * theta,
    }
    for name, direction in expected.items():
        tx = optimizer.build(plain(name, weight_decay=wd, b1=b1, b2=b2), TOTAL, METADATA)
        step = jax.jit(tx.update)
        _, state = step(first, tx.init(params), params)
        updates, _ = step(second, state, params)
        np.testing.assert_allclose(updates["w"], -lr * direction, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_gradient_moves_exactly_the_parameters_that_decay(name):
    params = tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = update(plain(name, weight_decay=0.1), zeros, params)
    assert {k for k, u in updates.items() if np.any(u != 0)} == {k for k, m in METADATA.items() if m.decay}
    if name in ("adamw", "lion", "muon"):
        np.testing.assert_allclose(updates["w"], -PEAK * 0.1 * params["w"], rtol=1e-6)
    still = update(plain(name, weight_decay=0.0), zeros, params)
    assert not any(np.any(u != 0) for u in still.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_group_scale_multiplies_the_update(name):
    params, grads = tree(0), tree(1)
    base = update(plain(name), grads, params, steps=2)
    scaled = update(plain(name, group_scale={"ssm": 0.25, "nobody": 3.0}), grads, params, steps=2)
    for key, m in METADATA.items():
        factor = 0.25 if m.group == "ssm" else 1.0
        np.testing.assert_allclose(scaled[key], base[key] * factor, rtol=3e-7, err_msg=key)  # XLA may fuse a * b + c


def test_clipping_is_by_the_global_norm():
    params, grads = tree(0), tree(1)
    norm = math.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in grads.values()))
    clipped = update(plain("sgd", b1=0.0, weight_decay=0.0, clip_norm=1.0), grads, params)
    np.testing.assert_allclose(clipped["scale"], -PEAK * np.asarray(grads["scale"]) / norm, rtol=1e-5)
    free = update(plain("sgd", b1=0.0, weight_decay=0.0, clip_norm=2 * norm), grads, params)
    np.testing.assert_allclose(free["scale"], -PEAK * np.asarray(grads["scale"]), rtol=1e-6)


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adam():
    params, grads = tree(0), tree(1)
    muon = update(plain("muon", weight_decay=0.0), grads, params)
    adam = update(plain("adamw", weight_decay=0.0), grads, params)
    for key in ("scale", "log_a", "b"):
        np.testing.assert_allclose(muon[key], adam[key], rtol=1e-6)
    # Newton-Schulz leaves singular values between about 0.7 and 1.2; each stacked layer is a matrix [4, 2 * 3] of its
    # own.
    for matrix in (muon["w"], *muon["stacked"].reshape(3, 4, 6)):
        values = np.linalg.svd(matrix / (-PEAK * 0.2 * math.sqrt(6)), compute_uv=False)
        assert values.min() > 0.6 and values.max() < 1.3
    assert all((muon[key] * np.asarray(grads[key])).sum() < 0 for key in ("w", "stacked"))


def test_muon_takes_embeddings_and_filters_to_adam():
    metadata = {"embedding": facts("vocab", "embed"), "filter": facts(None, "embed"), "w": facts("embed", "mlp")}
    tx = optimizer.build(plain("muon"), TOTAL, metadata)
    moments = [s for s in jax.tree.leaves(tx.init({k: jnp.zeros((5, 7)) for k in metadata})) if s.shape == (5, 7)]
    assert len(moments) == 5  # two for each of the first two, one for the matrix


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"name": "adamv"}, ("optimizer.name 'adamv'", "did you mean", "'adamw'")),
        ({"schedule": "cosin"}, ("optimizer.schedule 'cosin'", "did you mean 'cosine'")),
        ({"schedule": "x"}, ("choose one of cosine",)),
        ({"b1": 1.0}, ("optimizer.b1",)),
        ({"learning_rate": -1.0}, ("optimizer.learning_rate",)),
        ({"final_fraction": math.nan}, ("optimizer.final_fraction",)),
    ],
)
def test_bad_configs_say_what_to_change(kwargs, words):
    with pytest.raises(ValueError) as error:
        OptimizerConfig(**kwargs)
    assert all(word in str(error.value) for word in words)


def test_a_warmup_longer_than_the_training_is_refused():
    with pytest.raises(ValueError, match=r"lower optimizer\.warmup_steps"):
        optimizer.schedule(OptimizerConfig(warmup_steps=11), 10)
    with pytest.raises(ValueError, match=r"optimizer\.decay_fraction"):
        optimizer.schedule(OptimizerConfig(schedule="wsd", warmup_steps=9, decay_fraction=0.2), 10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tables_go_by_adagrad_and_the_rest_by_the_optimizer(name):
    """Three steps against the closed form, g / sqrt(3 g^2); a row without a gradient does not move."""
    metadata = METADATA | {"table": facts("vocab", "embed", decay=False, active=0.1), "tied": facts("vocab", "embed")}
    params, grads = (
        tree(seed)
        | {
            name: jnp.asarray(np.random.default_rng(seed).normal(size=(5, 3)), jnp.float32)
            for name in ("table", "tied")
        }
        for seed in (1, 2)
    )
    grads["table"] = grads["table"].at[3].set(0)
    found = update(plain(name, tables="adagrad", table_scale=3.0), grads, params, 3, metadata)
    expected = -PEAK * 3 * np.sign(np.asarray(grads["table"])) / np.sqrt(3)
    np.testing.assert_allclose(found.pop("table"), expected, rtol=1e-5)
    same = update(plain(name), grads, params, 3, metadata)
    assert np.abs(same.pop("table") - expected).max() > 0.01
    for key in found:
        np.testing.assert_array_equal(found[key], same[key], key)


def test_a_rule_for_tables_needs_tables():
    with pytest.raises(ValueError, match=r"optimizer\.tables='adagrad' has no effect on a model without tables"):
        optimizer.build(plain("adamw", tables="adagrad"), TOTAL, METADATA)


def test_an_unknown_group_names_the_parameter():
    with pytest.raises(ValueError, match=r"parameter stack/a .*'smm'.*did you mean 'ssm'"):
        optimizer.build(OptimizerConfig(), TOTAL, {"stack": {"a": facts("mlp", group="smm")}})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_eps_that_is_nothing_is_refused_where_adam_divides_by_it(name):
    params = tree(0)
    found = update(plain(name, eps=1e-30), jax.tree.map(jnp.zeros_like, params), params)
    assert all(np.isfinite(value).all() for value in found.values())
    if name in ("adamw", "adam", "muon"):
        with pytest.raises(ValueError, match=r"optimizer\.eps must be at least 1e-30, got 0"):
            optimizer.build(plain(name, eps=0.0), TOTAL, METADATA)
