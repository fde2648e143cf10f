"""Nystromformer: its landmarks and its inverse."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.mixers.nystromformer import pseudo_inverse, runs
from tests.tolerance import assert_close


@pytest.mark.parametrize("count", [3, 4, 9])
def test_runs(count):
    """Documents of 7 and 2 tokens amid padding: runs partition them, in order, as evenly as can be."""
    ids = np.array([[0, 1, 1, 1, 1, 1, 1, 1, 0], [3, 3, 0, 0, 0, 0, 0, 0, 0]])
    positions = np.array([[0, 0, 1, 2, 3, 4, 5, 6, 0], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    average, exists = map(np.asarray, runs(jnp.asarray(ids), jnp.asarray(positions), count))
    for row in range(2):
        tokens = np.flatnonzero(ids[row])
        parts = [np.flatnonzero(column) for column in average[row].T if column.any()]
        assert np.concatenate(parts).tolist() == tokens.tolist()
        assert len(parts) == exists[row].sum() == min(count, len(tokens))
        assert np.ptp([len(part) for part in parts]) <= 1
        assert_close(average[row].sum(0), exists[row].astype(float))


def test_pseudo_inverse():
    """Enough steps give the inverse."""
    A = np.random.default_rng(0).uniform(size=(2, 5, 5)) + 2 * np.eye(5)
    A /= A.sum(-1, keepdims=True)
    assert_close(pseudo_inverse(jnp.asarray(A, jnp.float32), 10), np.linalg.inv(A))
