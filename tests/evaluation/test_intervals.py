"""Intervals beside closed forms."""

import numpy as np
import pytest

from data import metrics
from evaluation.intervals import interval, wilson


def test_proportions():
    """Wilson's interval, which is the share whose distance from what was found is 1.96 standard deviations of that share."""
    right = np.arange(50) < 43
    rows = {"weight": np.full(50, 2.0), "correct": 2.0 * right, "nats": np.ones(50)}
    low, high = interval(metrics.ACCURACY, rows)
    for share in (low, high):
        assert abs(0.86 - share) == pytest.approx(1.959964 * (share * (1 - share) / 50) ** 0.5)
    assert low < 0.86 < high
    assert wilson(1.0, 200)[1] == pytest.approx(1) and 0.97 < wilson(1.0, 200)[0] < 0.99 and wilson(0.0, 200)[0] == 0
    # Rows of several labels that are all right are as many as there are rows.
    rows = {"weight": np.arange(1.0, 51), "correct": np.arange(1.0, 51), "nats": np.ones(50)}
    assert interval(metrics.ACCURACY, rows) == wilson(1.0, 50)


@pytest.mark.parametrize("count", [400, 30_000])
def test_means(count):
    """The bootstrap of a mean is near the normal interval; rows without weight have no part in it."""
    nats = np.random.default_rng(1).exponential(size=2 * count)
    rows = {"nats": nats * (np.arange(2 * count) % 2), "weight": 1.0 * (np.arange(2 * count) % 2)}
    own = nats[1::2]
    half = 1.959964 * own.std() / count**0.5
    low, high = interval(metrics.LOSS, rows)
    assert low == pytest.approx(own.mean() - half, abs=0.2 * half)
    assert high == pytest.approx(own.mean() + half, abs=0.2 * half)


def test_one_row():
    assert interval(metrics.LOSS, {"nats": np.ones(3), "weight": np.array([0, 1.0, 0])}) is None
