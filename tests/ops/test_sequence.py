"""Primitives on sequences in shards on several devices: against the token-by-token form on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import segments
from ops.attention import attention, attention_with_logsumexp
from ops.delta_rule import delta_rule
from ops.linear_attention import linear_attention
from ops.linear_recurrence import linear_recurrence
from ops.running_max import running_max
from ops.selective_scan import selective_scan
from ops.short_convolution import short_convolution
from ops.token_shift import token_shift
from tests.tolerance import assert_close
from training import sharding

B, T, H, K, V = 4, 48, 2, 4, 3
WAYS = (2, 4, 8)

# Documents over one border and over many, a border of both, documents of one token, padding over a border and at the end, nothing
# but padding, and padding up to the last shard.
SEGMENTS = np.array(
    [[1] * 5 + [2] * 19 + [0] * 3 + [3] * 20 + [4], [7] * 30 + [8] * 9 + [0] * 9, [0] * T, [0] * 41 + [9] * 7], np.int32
)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def log_decay(*shape):
    return -0.3 * np.exp(normal(9, *shape))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def queries():
    return normal(0, B, T, H, K), unit(normal(1, B, T, H, K)), normal(2, B, T, H, V)


REFERENCE = {"implementation": "reference"}
beta = 1 / (1 + np.exp(-normal(3, B, T, H)))
shared = {"initial_state": normal(4, B, H, K, V)}
# The function, its arrays by name, and what it is called with on one device.
CASES = {
    "linear_attention, per channel": (
        linear_attention,
        dict(zip("qkv", queries())) | shared | {"log_decay": log_decay(B, T, H, K), "bonus": normal(5, H, K)},
    ),
    "linear_attention, per head": (linear_attention, dict(zip("qkv", queries())) | {"log_decay": log_decay(B, T, H)}),
    "linear_attention, constant": (
        linear_attention,
        dict(zip("qkv", queries())) | shared | {"log_decay": log_decay(H)},
    ),
    "delta_rule": (
        delta_rule,
        dict(zip("qkv", queries())) | shared | {"beta": beta, "log_decay": log_decay(B, T, H, K)},
    ),
    "delta_rule, a and b": (
        delta_rule,
        dict(zip("qkv", queries()))
        | {"a": unit(normal(6, B, T, H, K)), "b": -0.5 * unit(normal(7, B, T, H, K)), "log_decay": log_decay(B, T, H)},
    ),
    "linear_recurrence": (
        linear_recurrence,
        {"a": np.tanh(normal(0, B, T, 5)), "b": normal(1, B, T, 5), "initial_state": normal(2, B, 5)},
    ),
    "linear_recurrence, complex": (
        linear_recurrence,
        {
            "a": (0.7 * np.cos(normal(0, 3, 5)), 0.7 * np.sin(normal(0, 3, 5))),
            "b": (normal(1, B, T, 3, 5), normal(2, B, T, 3, 5)),
        },
    ),
    "selective_scan": (
        selective_scan,
        {
            "x": normal(0, B, T, 6),
            "dt": np.exp(normal(1, B, T, 6) - 2),
            "A": -np.exp(normal(2, 6, 4)),
            "B": normal(3, B, T, 4),
            "C": normal(4, B, T, 4),
            "D": normal(5, 6),
            "initial_state": normal(6, B, 4, 6),
        },
    ),
    "short_convolution": (
        short_convolution,
        {
            "x": normal(0, B, T, 6),
            "weight": normal(1, 4, 6),
            "bias": normal(2, 6),
            "initial_state": normal(3, B, 3, 6),
        },
    ),
    "token_shift": (token_shift, {"x": normal(0, B, T, 6), "initial_state": normal(1, B, 6)}),
    "attention, causal": (attention, dict(zip("qkv", queries())) | {"decay": np.cumsum(log_decay(B, T, H), 1)}),
    "attention, two-sided": (
        functools.partial(attention, causal=False, activation="relu2", block_size=4),
        dict(zip("qkv", queries())),
    ),
    "attention, grouped": (
        functools.partial(attention_with_logsumexp, score_cap=3.0),
        {"q": normal(0, B, T, 4, K), "k": normal(1, B, T, 2, K), "v": normal(2, B, T, 2, V)},
    ),
    "attention, window": (
        functools.partial(attention, window=9),
        dict(zip("qkv", queries())) | {"slopes": np.float32([0.3, 0.1])},
    ),
    "attention, two-sided window": (
        functools.partial(attention_with_logsumexp, window=7, causal=False),
        dict(zip("qkv", queries())),
    ),
    "attention, a window of more than half of the row": (
        functools.partial(attention, window=30, mask=lambda query, key: (query - key) % 3 != 1),
        dict(zip("qkv", queries())),
    ),
    "attention, a two-sided window of more than half of the row": (
        functools.partial(attention_with_logsumexp, window=40, causal=False),
        dict(zip("qkv", queries())),
    ),
    "attention, a pattern": (
        functools.partial(attention, mask=lambda query, key: (query - key) % 3 == 0, block_size=4),
        dict(zip("qkv", queries())),
    ),
    "running_max": (running_max, {"log_decay": log_decay(B, T, H), "log_input": 5 * normal(1, B, T, H)}),
}


def run(name, ways, packed, implementation=None):
    """Results and gradients by all arrays, on so many shards (and twice as many devices, where there are)."""
    function, arrays = CASES[name]
    rows = 2 if ways == 4 else 1
    mesh = sharding.make_mesh({"sequence": ways, "data": rows}, jax.devices()[: ways * rows])
    where = {"segment_ids": jnp.asarray(SEGMENTS)} if packed else {}
    if implementation is not None:
        where["implementation"] = implementation

    @jax.jit
    def both(arrays):
        with sharding.tracing(mesh):
            results, pull = jax.vjp(lambda arrays: function(**arrays, **where), arrays)
            return results, pull(jax.tree.map(jnp.cos, results))

    return jax.tree.map(np.asarray, both(arrays))


@functools.cache
def expected(name, packed):
    return run(name, 1, packed, None if CASES[name][0] in (short_convolution, token_shift) else "reference")


@pytest.mark.parametrize(
    ("ways", "packed"),
    [
        pytest.param(n, packed, marks=[pytest.mark.thorough] * ((n, packed) != (4, True)), id=f"{n}-{packed}")
        for n in WAYS
        for packed in (True, False)
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_shards_are_the_whole(name, ways, packed):
    """Values, final states and gradients, with an initial state, of documents that begin and end anywhere."""
    found, wanted = run(name, ways, packed), expected(name, packed)
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        nothing = y < -1e19  # what stands for the logarithm of 0 is no measure of errors
        np.testing.assert_array_equal(x < -1e19, nothing)
        assert_close(np.where(nothing, 0, x), np.where(nothing, 0, y), what=jax.tree_util.keystr(path))


@pytest.mark.parametrize("ways", WAYS)
def test_places_of_tokens(ways):
    mesh = sharding.make_mesh({"sequence": ways}, jax.devices()[:ways])
    before = [np.array([1, 3, 0, 9], np.int32), np.array([2, 5, 1, 7], np.int32)]

    def places(ids, before):
        own = [segments.is_start(ids), segments.runs(ids), segments.positions(ids), segments.lengths(ids)]
        return [*own, segments.runs(ids, *before), segments.positions(ids, *before)]

    def split(ids, before):
        with sharding.tracing(mesh):
            return places(ids, before)

    for x, y in zip(jax.jit(split)(SEGMENTS, before), places(jnp.asarray(SEGMENTS), before), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_length_that_the_shards_do_not_divide_is_left_to_the_compiler():
    mesh = sharding.make_mesh({"sequence": 4}, jax.devices()[:4])
    x = normal(0, 2, 6, 3)

    @jax.jit
    def shift(x):
        with sharding.tracing(mesh):
            return token_shift(x)[0]

    np.testing.assert_array_equal(shift(x)[:, 1:], x[:, :-1])
