import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import segments

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
