"""Attention inside blocks against all scores at once under a mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import segments
from ops.block_attention import block_attention, block_ids, empty_block
from tests.tolerance import assert_close

SIZE, LENGTH, HEADS = 4, 15, 2
# Documents that begin inside blocks of the row's grid, padding in front, between and behind.
IDS = np.array([[1] * 6 + [2] * 9, [0] * 2 + [3] + [4] * 5 + [0] * 2 + [5] * 4 + [0]], np.int32)


def inputs():
    numbers = np.random.default_rng(0)
    return [np.float32(numbers.standard_normal((2, LENGTH, HEADS, size))) for size in (3, 3, 5)]


def poisoned(arrays):
    """NaN at padding."""
    return [np.where((IDS == 0)[..., None, None], np.float32(np.nan), a) for a in arrays]


def dense(q, k, v, ids, causal, activation):
    place = np.asarray(segments.positions(ids)) // SIZE
    same = lambda a: a[:, :, None] == a[:, None, :]
    visible = same(ids) & same(place) & (ids != 0)[:, None]
    if causal:
        visible &= np.tri(LENGTH, dtype=bool)
    s = np.einsum("bihk,bjhk->bhij", q.astype(np.float64), k) / 3**0.5
    if activation == "softmax":
        p = np.exp(s) * visible[:, None]
        p /= np.maximum(p.sum(-1, keepdims=True), 1e-30)
    else:
        p = np.maximum(s, 0) ** {"relu": 1, "relu2": 2}[activation] * visible[:, None]
    return np.einsum("bhij,bjhv->bihv", p, v)


@pytest.mark.parametrize("causal,activation", [(True, "softmax"), (False, "relu2")])
def test_dense(causal, activation):
    """Packed rows, whose padding may hold anything, and whole sequences longer and shorter than a block."""
    q, k, v = inputs()
    run = jax.jit(functools.partial(block_attention, size=SIZE, causal=causal, activation=activation))
    places = segments.positions(jnp.asarray(IDS))
    y, _ = run(*poisoned((q, k, v)), positions=places, segment_ids=jnp.asarray(IDS))
    assert_close(y, dense(q, k, v, IDS, causal, activation))
    one = np.ones_like(IDS)
    expected = dense(q, k, v, one, causal, activation)
    positions = segments.positions(jnp.asarray(one))
    for length in (LENGTH, SIZE):
        y, _ = run(*(a[:, :length] for a in (q, k, v)), positions=positions[:, :length])
        assert_close(y, expected[:, :length])


def test_pieces():
    """Pieces of any length, shorter and longer than a block, continue the block of the piece before."""
    ids = jnp.asarray(IDS)
    positions = segments.positions(ids)

    @jax.jit
    def run(q, k, v):
        state, found, start = empty_block(2, SIZE, (HEADS, 3), (HEADS, 5)), [], 0
        for length in (1, 2, 7, 5):
            piece = slice(start, start + length)
            arrays = (a[:, piece] for a in (q, k, v))
            where = {"positions": positions[:, piece], "segment_ids": ids[:, piece], "initial_state": state}
            y, state = block_attention(*arrays, size=SIZE, **where)
            found.append(y)
            start += length
        whole, _ = block_attention(q, k, v, size=SIZE, positions=positions, segment_ids=ids)
        return jnp.concatenate(found, 1), whole

    assert_close(*run(*poisoned(inputs())))


def test_ids():
    """Ids change at every multiple of the size in a segment and where the segment does; padding keeps 0."""
    ids = np.asarray(block_ids(jnp.asarray(IDS), segments.positions(jnp.asarray(IDS)), SIZE))
    runs = lambda row: np.diff(np.flatnonzero(np.diff(row, prepend=-1, append=-1))).tolist()
    assert runs(ids[0]) == [4, 2, 4, 4, 1]
    assert runs(ids[1]) == [2, 1, 4, 1, 2, 4, 1]
    assert ((ids == 0) == (IDS == 0)).all()


def test_gradients():
    """Finite where a query sees nothing, beside padding that is not, and where all scores are equal and large."""
    q, k, v = poisoned(inputs())
    ids = jnp.asarray(IDS)
    for activation in ("softmax", "laplace"):
        f = lambda q, k, v, activation=activation: jnp.sum(
            block_attention(
                q, k, v, size=SIZE, positions=segments.positions(ids), segment_ids=ids, activation=activation
            )[0]
        )
        for scale in (0.0, 1e4):
            for gradient in jax.jit(jax.grad(f, (0, 1, 2)))(scale * q, k, v):
                assert np.isfinite(gradient).all()
