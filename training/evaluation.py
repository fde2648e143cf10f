"""Scores on a split, with exact token weighting."""

import math
from collections.abc import Iterable

import jax


def evaluate(eval_step, params, batches: Iterable) -> dict[str, float]:
    """Scores a model on batches.

    Args:
      eval_step: `(params, batch) -> {"nats", "weight", "correct"}`, sums over the batch.
      params: parameters.
      batches: of a split, in which every token counts once.

    Returns:
      loss (nats per token), bits_per_token, perplexity, accuracy and tokens (the number scored).

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
    return summary(**total)


def summary(nats: float, weight: float, correct: float) -> dict[str, float]:
    """The metrics of summed scores."""
    loss = nats / weight
    return {
        "loss": loss,
        "bits_per_token": loss / math.log(2),
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": correct / weight,
        "tokens": weight,
    }


def _add(total, sums):
    if sums is not None:
        for key, value in jax.device_get(sums).items():
            total[key] += float(value)
