"""Scores on a split, with exact weighting of whatever is scored: tokens, labelled positions, rows."""

from collections.abc import Callable, Iterable

import jax
import numpy as np

from common.errors import UserError
from data.loader import Loader, prefetch
from data.metrics import summary
from data.task import Spec


class Abandoned(Exception):
    """An evaluation that was not brought to its end."""


def evaluate(eval_step, params, batches: Iterable, spec: Spec) -> dict[str, float]:
    """Scores a model on batches.

    Args:
      eval_step: `(params, batch) -> sums` of `training.step.make_eval_step`, made with the spec's metrics.
      params: parameters.
      batches: of a split, in which everything counts once.
      spec: of the task.

    Returns:
      the scores of `data.metrics.summary`.

    Raises:
      UserError: if nothing is scored.
    """
    total, pending = {}, None
    for batch in batches:
        sums = eval_step(params, batch)
        _add(total, pending)  # a batch late, so that the device is never waited for
        pending = sums
    _add(total, pending)
    if not total.get("weight"):
        raise UserError("there is nothing to score: every weight of the split is zero")
    return summary(spec, total)


def validate(
    eval_step, params, loader: Loader, count: int = 0, stop: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Scores `params` on the first `count` batches of a split (0: all), see `evaluate`; `Abandoned` is raised when `stop()`."""
    total = len(loader) if count == 0 else min(count, len(loader))
    stream = prefetch(loader)

    def batches():
        for _ in range(total):
            if stop():
                raise Abandoned
            yield next(stream)

    try:
        return evaluate(eval_step, params, batches(), loader.task.spec)
    finally:
        stream.close()


def _add(total, sums):
    if sums is not None:
        for key, value in jax.device_get(sums).items():
            total[key] = total.get(key, 0.0) + np.asarray(value, np.float64)
