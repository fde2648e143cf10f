"""Scores a model on a whole text that it reads from end to end, as one row of any length, in pieces that hand on the carry."""

import functools

import jax
import numpy as np

from common.console import say
from common.errors import UserError, check_choice
from data import metrics
from data.metrics import describe
from data.rows import PLACES
from evaluation import report
from evaluation.loading import LoadedRun
from training import setup
from training.state import cast
from training.step import sums_and_statistics


def stream(run: LoadedRun, split: str = "test", piece: int = 0) -> dict[str, float]:
    """Scores every token of a split after all of the text before it, and prints the result beside the floors.

    The memory that it takes depends on the piece and not on the text; the result does not depend on the piece.

    Args:
      run: the run and its checkpoint, on one device (`loading.load(..., alone=True)`).
      split: "train", "valid" or "test".
      piece: tokens that are computed together; 0 is the length of training.

    Returns:
      the scores of `data.metrics.summary` and `text_scores`.

    Raises:
      UserError: if the task is no contiguous text, or a mixer cannot read one of any length.
    """
    config, task, built = run.config, run.config.task, run.built
    check_choice("--split", split, task.splits)
    setup.check_streams(config.model, task, "--stream")
    if any(metric.whole_rows for metric in task.spec.metrics):
        raise UserError("--stream has no rows, and a metric of this task is of whole rows")
    count = task.num_tokens(split)
    piece = min(piece or task.spec.length, max(count, 1))

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, carry, batch):
        model = functools.partial(built.apply, params)
        sums, _, carry = sums_and_statistics(model, batch, task.spec.metrics, config.train.loss_chunks, carry=carry)
        return sums, carry

    shown = ("inputs", "targets", "weights", *PLACES[:1]) if task.spec.segmented else ("inputs", "targets", "weights")
    total: dict[str, np.ndarray] = {}
    pending = None
    with run.computing():
        params = cast(run.params, built.metadata, config.train.compute_dtype)
        carry = built.merge(params).initial_carry(1, 0)
        for start in range(0, count, piece):
            row = task.stretch(split, start, piece)
            sums, carry = step(params, carry, {key: row[key][None] for key in shown})
            _add(total, pending)  # a piece late, so that the device is never waited for
            pending = sums
        _add(total, pending)
    result = metrics.summary(task.spec, total)
    result |= metrics.text_scores(result, task.text_sizes(split))
    say(f"{split}, one stream of {count:,} {task.spec.unit}s in pieces of {piece:,}: {describe(task.spec, result)}")
    if split != "train":
        report.floors(task, split, result)
    return result


def _add(total, sums):
    if sums is not None:
        for key, value in jax.device_get(sums).items():
            total[key] = total.get(key, 0.0) + np.asarray(value, np.float64)
