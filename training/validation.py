"""Scores on a split, with exact weighting of whatever is scored: tokens, labelled positions, rows."""

import math
from collections.abc import Iterable

import jax

from data.task import Spec


def evaluate(eval_step, params, batches: Iterable, spec: Spec) -> dict[str, float]:
    """Scores a model on batches.

    Args:
      eval_step: `(params, batch) -> sums` of `training.step.class_sums` or `real_sums`.
      params: parameters.
      batches: of a split, in which everything counts once.
      spec: of the task.

    Returns:
      the metrics of `summary`.

    Raises:
      ValueError: if nothing is scored.
    """
    total, pending = {}, None
    for batch in batches:
        sums = eval_step(params, batch)
        _add(total, pending)  # a batch late, so that the device is never waited for
        pending = sums
    _add(total, pending)
    if not total.get("weight"):
        raise ValueError("there is nothing to score: every weight of the split is zero")
    return summary(spec, total)


def summary(spec: Spec, sums: dict[str, float]) -> dict[str, float]:
    """The metrics of summed scores.

    Returns:
      "loss", the mean over all that is scored, and "tokens", its amount; of classes "accuracy", "row_accuracy" where a row has
      several; of language models "bits_per_<unit>" and "perplexity"; of real targets "rmse", "mae" and (if there are two)
      "angular_error", in degrees.
    """
    weight = sums["weight"]
    loss = sums["nats"] / weight
    result = {"loss": loss}
    if spec.metric.startswith("bits_per_"):
        result |= {spec.metric: loss / math.log(2), "perplexity": math.exp(min(loss, 700.0))}
    if "correct" in sums:
        result["accuracy"] = sums["correct"] / weight
        if spec.objective == "token_labels" or spec.metric == "row_accuracy":
            result["row_accuracy"] = sums["rows_correct"] / sums["rows"]
    else:
        result |= {"rmse": math.sqrt(sums["squared"] / weight), "mae": sums["absolute"] / weight}
        if "angle" in sums:
            result["angular_error"] = sums["angle"] / weight
    return result | {"tokens": weight}


def per_word(result: dict[str, float], sizes: dict[str, int]) -> dict[str, float]:
    """Scores that do not depend on the tokeniser, from a split's sizes (`Task.text_sizes`): "bits_per_byte" and "word_perplexity"
    (exp(nats / words), by the data set's own number of words)."""
    if not sizes:
        return {}
    nats = result["loss"] * sizes["tokens"]
    found = {"bits_per_byte": nats / (math.log(2) * sizes["bytes"])}
    if sizes.get("words"):
        found["word_perplexity"] = math.exp(min(nats / sizes["words"], 700.0))
    return {name: value for name, value in found.items() if name not in result}


def _add(total, sums):
    if sums is not None:
        for key, value in jax.device_get(sums).items():
            total[key] = total.get(key, 0.0) + float(value)
