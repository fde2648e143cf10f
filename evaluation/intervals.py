"""Intervals of metrics over rows: how far a score would move if other rows of the same kind had been scored."""

import math
from collections.abc import Mapping

import numpy as np

from data.metrics import CLASSES, Metric

DRAWS = 400
MOST = 10_000  # rows beyond which neighbours are taken together
NORMAL = 1.959964  # of 95 %


def interval(metric: Metric, rows: Mapping[str, np.ndarray]) -> tuple[float, float] | None:
    """The 95 % interval of a metric.

    Where each row is right or wrong, and where all or none of what rows ask is right, Wilson's interval of a proportion of the
    rows. Else the percentiles of a bootstrap: rows are drawn with replacement, and the metric is computed of their sums.

    Args:
      metric: of which it is.
      rows: the sums of each row, [rows, ...] by name.

    Returns:
      the lower and the upper end; None for fewer than two rows of any weight.
    """
    scored = rows["weight"] > 0
    rows = {name: np.asarray(sums, np.float64)[scored] for name, sums in rows.items()}
    count = int(scored.sum())
    if count < 2:
        return None
    if metric.of == CLASSES and metric.higher_is_better:
        share = metric.value({name: sums.sum(0) for name, sums in rows.items()})
        each = np.array([metric.value({name: sums[i] for name, sums in rows.items()}) for i in range(min(count, MOST))])
        alike = (rows["weight"] == rows["weight"][0]).all() or share in (0, 1)
        if alike and np.isin(each, (0, 1)).all():
            return wilson(share, count)
    if count > MOST:
        starts = np.linspace(0, count, MOST, endpoint=False).astype(np.int64)
        rows = {name: np.add.reduceat(sums, starts) for name, sums in rows.items()}
        count = MOST
    rng, found = np.random.default_rng(0), []
    for _ in range(DRAWS):
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        found.append(metric.value({name: np.tensordot(times, sums, 1) for name, sums in rows.items()}))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (1927) that was found in so many rows."""
    z = NORMAL**2 / count
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z * z / 4) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)
