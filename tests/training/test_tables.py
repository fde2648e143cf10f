"""Steps by the rows that a batch reads, beside Adagrad with weight decay over whole tables, written down in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compilation.hlo import Program
from compilation.moved import moved
from models.config import ModelConfig
from models.sequence_model import SequenceModel
from training import optimizer, sharding, state, tables
from training.step import make_train_step

VOCAB, TABLE_ROWS, SIZE, ROWS, LENGTH = 16, 4096, 8, 4, 12
PEAK, SCALE, DECAY = 0.1, 4.0, 0.25
LEFT = 1 - PEAK * DECAY  # what a step leaves of a row without a gradient


def build(carry=None, rule="adagrad", axes=()):
    model = ModelConfig(
        VOCAB, VOCAB, width=8, depth=1, pattern=("min_gru",), ngrams=(3, 2), ngram_rows=TABLE_ROWS, ngram_size=SIZE
    )
    options = optimizer.OptimizerConfig(
        learning_rate=PEAK, schedule="constant", tables=rule, table_scale=SCALE, clip_norm=0.0, weight_decay=DECAY
    )
    mesh = sharding.make_mesh(dict(axes), jax.devices()[: math.prod(dict(axes).values())])
    make = functools.partial(optimizer.build, options, 10)
    return state.build(lambda rngs: SequenceModel(model, rngs=rngs), make, mesh, carry)


def batch(seed=0):
    ids = np.random.default_rng(seed).integers(VOCAB, size=(ROWS, LENGTH + 1))
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[1, 5:], segments[2, :3] = 2, 0
    weights = (segments > 0) * np.linspace(0.5, 1, LENGTH)
    arrays = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": weights, "segment_ids": segments}
    return {name: jnp.asarray(a, jnp.float32 if a.dtype.kind == "f" else jnp.int32) for name, a in arrays.items()}


def expected(built, before, rows, **kwargs):
    """The tables after the first step, and after their gradients those of everything, from a sum over whole tables."""

    def loss(params):
        logits, _ = built.apply(params, rows["inputs"], segment_ids=rows["segment_ids"], **kwargs)[:2]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, rows["targets"])
        return jnp.sum(rows["weights"] * nats) / jnp.sum(rows["weights"])

    gradients = jax.device_get(jax.jit(jax.grad(loss))(before))
    return {
        name: LEFT * np.asarray(table) - PEAK * SCALE * np.sign(gradients["ngrams"]["tables"][name])
        for name, table in before["ngrams"]["tables"].items()
    }, gradients


def compare(found, before, tables_, gradients):
    """Adagrad's first update is the rate with the sign of the gradient, where that is more than a rounding error."""
    for name, table in found["params"]["ngrams"]["tables"].items():
        gradient, table = gradients["ngrams"]["tables"][name], np.asarray(table)
        clear = np.abs(gradient) > 1e-5 * np.abs(gradient).max()
        assert clear.any(axis=1).sum() > ROWS
        np.testing.assert_allclose(table[clear], tables_[name][clear], rtol=1e-5)
        unread = ~gradient.any(axis=1)
        assert unread.sum() > TABLE_ROWS // 2
        np.testing.assert_allclose(
            table[unread], LEFT * np.asarray(before["ngrams"]["tables"][name])[unread], rtol=1e-6
        )


@pytest.mark.parametrize("accumulation, axes", ((1, {}), (2, {}), (2, {"data": 2}), (1, {"sequence": 2})))
def test_the_read_rows_are_trained_and_the_others_decay(accumulation, axes):
    """Packed rows, padding, tokens that read one row several times, also on other devices; all rows decay, but where no update is
    made."""
    built, rows = build(axes=axes), batch()
    assert tables.by_rows(built, ROWS * LENGTH)
    first = jax.device_get(built.init(jax.random.key(0)))
    step = make_train_step(built, accumulation=accumulation)
    new, metrics = step(jax.device_put(first, built.shardings), rows)
    whole, gradients = expected(built, first["params"], rows)
    compare(new, first["params"], whole, gradients)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-5)
    squares = [leaf for leaf in jax.tree.leaves(new["opt"]) if leaf.shape == (TABLE_ROWS, SIZE)]
    found = sorted(float(jnp.sum(leaf)) for leaf in squares if jnp.sum(leaf) != 0)
    of_tables = sorted(float(np.sum(np.float64(g) ** 2)) for g in gradients["ngrams"]["tables"].values())
    np.testing.assert_allclose(found, of_tables, rtol=1e-5)
    first = jax.device_get(new)
    again, _ = step(new, {**rows, "weights": jnp.zeros_like(rows["weights"])})  # of no weight: no update
    jax.tree.map(np.testing.assert_array_equal, again["params"], first["params"])


def test_rows_of_a_row_that_goes_on():
    """With truncated back-propagation the first n-grams of a piece hold tokens of the piece before it."""
    built = build(carry=(ROWS, "float32"))
    step = make_train_step(built)
    rows = {**batch(), "segment_ids": jnp.ones((ROWS, LENGTH), jnp.int32), "restart": jnp.ones(ROWS, bool)}
    middle, _ = step(built.init(jax.random.key(0)), rows)
    before = jax.device_get(middle)
    following = {**batch(1), "segment_ids": rows["segment_ids"], "restart": jnp.asarray([False, True, False, False])}
    new, metrics = step(middle, following)
    fresh = built.merge(before["params"]).initial_carry(ROWS, 0)
    pick = lambda new, old: jnp.where(following["restart"].reshape(-1, *(1,) * (old.ndim - 1)), new, old)
    carry = jax.tree.map(pick, fresh, before["carry"])
    _, gradients = expected(built, before["params"], following, carry=carry)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-5)
    for name, table in new["params"]["ngrams"]["tables"].items():
        gradient = gradients["ngrams"]["tables"][name]
        moved_by = np.asarray(table) - LEFT * before["params"]["ngrams"]["tables"][name]
        changed = np.any(np.abs(moved_by) > 1e-6, axis=1)
        clear = np.abs(gradient).max(axis=1) > 1e-5 * np.abs(gradient).max()
        np.testing.assert_array_equal(changed & clear, clear)
        assert not changed[~gradient.any(axis=1)].any()


def test_a_step_does_not_go_over_whole_tables():
    """By the bytes that the compiled step reads and writes, beside those with Adam, whose moments all fade; a scatter counts
    as if it wrote all of a table."""

    def bytes_of(rule):
        built = build(rule=rule)
        step = make_train_step(built)
        return moved(Program(step.function.lower(built.abstract, batch(), step.settings).compile().as_text()))

    assert 2 * bytes_of("adagrad") < bytes_of("same")


def test_whole_tables_where_rows_would_not_do():
    """Tables in shards, with an optimiser that moves rows which are not read, or in batches of as many tokens as rows."""
    assert not tables.by_rows(build(axes={"fsdp": 2}), ROWS * LENGTH)
    assert not tables.by_rows(build(rule="same"), ROWS * LENGTH)
    assert not tables.by_rows(build(), TABLE_ROWS)
