"""Scores on a split, with exact token weighting."""

import math
from collections.abc import Iterable

import jax


def evaluate(eval_step, params, batches: Iterable, unit: str) -> dict[str, float]:
    """Scores a model on batches.

    Args:
      eval_step: `(params, batch) -> {"nats", "weight", "correct"}`, sums over the batch.
      params: parameters.
      batches: of a split, in which every token counts once.
      unit: what a token of weight 1 is ("byte").

    Returns:
      loss (nats per unit), bits_per_<unit>, perplexity, accuracy and tokens (the number of units scored).

    Raises:
      ValueError: if nothing is scored.
    """
    total, pending = {"nats": 0.0, "weight": 0.0, "correct": 0.0}, None
    for batch in batches:
        sums = eval_step(params, batch)
        _add(total, pending)  # a batch late, so that the device is never waited for
        pending = sums
    _add(total, pending)
    if total["weight"] == 0:
        raise ValueError("there is nothing to score: every weight of the split is zero")
    return summary(unit, **total)


def summary(unit: str, nats: float, weight: float, correct: float) -> dict[str, float]:
    """The metrics of summed scores."""
    loss = nats / weight
    return {
        "loss": loss,
        f"bits_per_{unit}": loss / math.log(2),
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": correct / weight,
        "tokens": weight,
    }


def _add(total, sums):
    if sums is not None:
        for key, value in jax.device_get({key: sums[key] for key in total}).items():
            total[key] += float(value)
