import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch, segments
from ops.block_recurrence import block_recurrence
from ops.delta_rule import delta_rule
from ops.dplr import dplr_scan
from ops.hippo_memory import hippo_memory
from ops.large_chunk_ttt import FastWeights, State, large_chunk_ttt
from ops.linear_attention import linear_attention
from ops.linear_recurrence import linear_recurrence
from ops.log_linear_attention import log_linear_attention
from ops.momentum_delta_rule import momentum_delta_rule
from ops.polynomial_attention import polynomial_attention
from ops.running_max import running_max
from ops.selective_scan import selective_scan
from ops.short_convolution import short_convolution
from ops.state_space_scan import state_space_scan
from ops.token_shift import token_shift
from ops.ttt import ttt

ROWS = np.array(
    [
        [1, 1, 1, 2, 3, 3, 0, 0],  # packed, padded at the end
        [0, 0, 4, 4, 0, 0, 5, 5],  # padding at the start and between
        [7, 7, 7, 7, 7, 7, 7, 7],
        [1, 2, 1, 2, 1, 2, 1, 2],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
)
ONE = ROWS[:, :1]


def runs(row):
    """(first, end) of the runs of equal ids."""
    borders = [0] + [t for t in range(1, len(row)) if row[t] != row[t - 1]] + [len(row)]
    return list(itertools.pairwise(borders))


@pytest.mark.parametrize("ids", [ROWS, ONE])
def test_is_start(ids):
    expected = np.zeros(ids.shape, bool)
    for b, row in enumerate(ids):
        for first, _ in runs(row)[1:]:
            expected[b, first] = True
    np.testing.assert_array_equal(segments.is_start(jnp.asarray(ids)), expected)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_zero_padding(shape):
    x = np.random.default_rng(0).standard_normal(ROWS.shape + shape).astype(np.float32)
    expected, poisoned = x.copy(), x.copy()
    for index in np.ndindex(*ROWS.shape):
        if ROWS[index] == 0:
            expected[index], poisoned[index] = 0, np.nan
    y, pull_back = jax.vjp(lambda x: segments.zero_padding(x, jnp.asarray(ROWS)), jnp.asarray(poisoned))
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(pull_back(jnp.asarray(x))[0], expected)
    assert segments.zero_padding(x, None) is x


def test_fill_padding():
    expected = np.where(ROWS == 0, -7, ROWS).astype(np.float32)
    np.testing.assert_array_equal(segments.fill_padding(jnp.float32(ROWS), jnp.asarray(ROWS), -7), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, jnp.bool])
def test_zero_padding_keeps_the_dtype(dtype):
    y = segments.zero_padding(jnp.ones(ROWS.shape, dtype), jnp.asarray(ROWS))
    assert y.dtype == dtype
    np.testing.assert_array_equal(np.asarray(y, np.float32), ROWS != 0)


@pytest.mark.parametrize("ids", [ROWS, ONE])
def test_positions(ids):
    expected = np.zeros(ids.shape, np.int32)
    for b, row in enumerate(ids):
        for first, end in runs(row):
            expected[b, first:end] = np.arange(end - first)
    result = segments.positions(jnp.asarray(ids))
    assert result.dtype == jnp.int32
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("ids", [ROWS, ONE])
def test_runs(ids):
    """Documents are counted in each row, and an id that comes back is another one."""
    expected = np.zeros(ids.shape, np.int32)
    for b, row in enumerate(ids):
        real = [(first, end) for first, end in runs(row) if row[first]]
        for number, (first, end) in enumerate(real, 1):
            expected[b, first:end] = number
    result = segments.runs(jnp.asarray(ids))
    assert result.dtype == jnp.int32
    np.testing.assert_array_equal(result, expected)
    for cut in range(1, ids.shape[1], 3):
        before = jnp.asarray(ids[:, cut - 1]), jnp.asarray(expected[:, :cut].max(1))
        np.testing.assert_array_equal(segments.runs(jnp.asarray(ids[:, cut:]), *before), expected[:, cut:])


@pytest.mark.parametrize("cut", [1, 3, 4, 7])
def test_positions_of_a_sequence_cut_in_two(cut):
    whole = np.asarray(segments.positions(jnp.asarray(ROWS)))
    second = segments.positions(
        jnp.asarray(ROWS[:, cut:]), jnp.asarray(ROWS[:, cut - 1]), jnp.asarray(whole[:, cut - 1] + 1)
    )
    np.testing.assert_array_equal(second, whole[:, cut:])


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("ids", [ROWS, ONE])
def test_reverse(ids, shape):
    x = np.random.default_rng(1).standard_normal(ids.shape + shape).astype(np.float32)
    expected = x.copy()
    for b, row in enumerate(ids):
        for first, end in runs(row):
            expected[b, first:end] = x[b, first:end][::-1]
    y = segments.reverse(jnp.asarray(x), jnp.asarray(ids))
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(segments.reverse(y, jnp.asarray(ids)), x)
    np.testing.assert_array_equal(segments.reverse(jnp.asarray(x), None), x[:, ::-1])


def test_lengths():
    ids = jnp.array([[0, 0, 7, 7, 7, 2, 0]])
    np.testing.assert_array_equal(segments.lengths(ids), [[2, 2, 3, 3, 3, 1, 1]])


B, T, H, K = 2, 5, 2, 3
PLACES = np.tile(np.arange(2, 2 + T, dtype=np.int32), (B, 1))


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def tokens(*names, shape=(H,)):
    return {name: normal(B, T, *shape) for name in names}


def fast_weights(*batch):
    return FastWeights(*(normal(*batch, H, K, K) for _ in range(3)))


QKV, MATRIX, PAIR = tokens(*"qkv", shape=(H, K)), normal(B, H, K, K), (normal(4, K), normal(4, K))
DECAY = {"log_decay": -np.abs(normal(B, T, H))}
# The function, the arrays of its tokens, its other arguments, and the state before.
STATES = {
    "block_recurrence": (block_recurrence, tokens("f", shape=(2, 3)), {"m": normal(2, 2, 3)}, normal(B, 2, 3)),
    "delta_rule": (delta_rule, QKV | tokens("beta") | DECAY, {}, MATRIX),
    "dplr_scan": (
        dplr_scan,
        tokens("x", shape=(4,)),
        dict.fromkeys("apbc", PAIR) | {"dt": np.ones(4, np.float32)},
        (normal(B, 4, K), normal(B, 4, K)),
    ),
    "hippo_memory": (
        functools.partial(hippo_memory, measure="legs", size=3),
        tokens("f"),
        {"positions": PLACES},
        normal(B, H, 3),
    ),
    "large_chunk_ttt": (
        functools.partial(large_chunk_ttt, chunk_size=4),
        QKV | tokens("momentum") | tokens("rates", shape=(H, 3)),
        {"positions": PLACES, "weights": fast_weights()},
        State(fast_weights(B), fast_weights(B), fast_weights(B), normal(B, H)),
    ),
    "linear_attention": (linear_attention, QKV | DECAY, {}, MATRIX),
    "linear_attention, constant": (linear_attention, QKV, {"log_decay": -np.abs(normal(H))}, MATRIX),
    "linear_recurrence": (linear_recurrence, tokens("b"), {"a": normal(H)}, normal(B, H)),
    "log_linear_attention": (
        log_linear_attention,
        QKV | DECAY | tokens("level_weights", shape=(H, 4)),
        {"positions": PLACES},
        normal(B, 4, H, K, K),
    ),
    "momentum_delta_rule": (
        momentum_delta_rule,
        QKV | DECAY | tokens("beta") | {"log_momentum": DECAY["log_decay"]},
        {},
        (MATRIX, 1 + MATRIX),
    ),
    "polynomial_attention": (
        functools.partial(polynomial_attention, coefficients=(1.0, 1.0, 0.5)),
        QKV | DECAY,
        {},
        normal(B, H, 10, K),
    ),
    "running_max": (running_max, tokens("log_input"), {"log_decay": -np.abs(normal(H))}, normal(B, H)),
    "selective_scan": (
        selective_scan,
        tokens("x", "dt", shape=(4,)) | tokens("B", "C", shape=(3,)),
        {"A": -np.abs(normal(4, 3))},
        normal(B, 3, 4),
    ),
    "short_convolution": (short_convolution, tokens("x", shape=(4,)), {"weight": normal(3, 4)}, normal(B, 2, 4)),
    "state_space_scan": (
        state_space_scan,
        tokens("x", shape=(4,)),
        dict.fromkeys("abc", PAIR),
        (normal(B, K, 4), normal(B, K, 4)),
    ),
    "token_shift": (token_shift, tokens("x"), {}, normal(B, H)),
    "ttt": (
        ttt,
        QKV | tokens("token_rate"),
        {
            "positions": PLACES,
            "place_rate": normal(4),
            "weights": (normal(H, K + 1, K),),
            "norm_weight": normal(H, K),
            "norm_bias": normal(H, K),
        },
        ((normal(B, H, K + 1, K),), (normal(B, H, K + 1, K),)),
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_padding_alone_leaves_the_state_as_it_was(name):
    """Of every primitive that has one, in every form, whatever is at padding; the other row goes on."""
    function, of_tokens, others, state = STATES[name]
    ids = jnp.asarray([[0] * T, [7] * T])
    forms = dispatch.offered("cpu").get(name.split(",")[0], ())

    def final(form):
        options = {} if form is None else {"implementation": form}
        poisoned = {name: jnp.asarray(x).at[0].set(jnp.nan) for name, x in of_tokens.items()}
        return function(**poisoned, **others, initial_state=state, segment_ids=ids, **options)[-1]

    for found in jax.jit(lambda: [final(form) for form in forms or (None,)])():
        for after, before in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(after[0], before[0], rtol=1e-6)
            assert np.isfinite(after[1]).all()
        assert any(np.any(x[1] != y[1]) for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True))
