"""Rows of a data set: how the arrays of one are made, and which of them a model is shown.

A row has "inputs", "targets", "weights", "segment_ids" and "positions", as `data.task.Task.example` says.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

LARGEST = 1e150  # real number of a data set: the square of a larger one is infinite, and so is its deviation
# Where a token is. Models take their fast paths without them.
PLACES = ("segment_ids", "positions")


def token_row(
    inputs: Int[np.ndarray, "T"], labels: Int[np.ndarray, "T"], scored: Bool[np.ndarray, "T"]
) -> dict[str, np.ndarray]:
    """The row of a task of tokens with labels; what is not scored gets the label 0."""
    return {
        "inputs": inputs.astype(np.int32),
        "targets": np.where(scored, labels, 0).astype(np.int32),
        "weights": scored.astype(np.float32),
    } | one_segment(len(inputs))


def ending_row(ids: Int[np.ndarray, "N"], asked: int, length: int) -> dict[str, np.ndarray]:
    """The row of a text of at most `length` + 1 tokens, of which the last `asked` are scored; padding stands behind it."""
    size = len(ids) - 1
    row = {"inputs": np.zeros(length, np.int32), "targets": np.zeros(length, np.int32)}
    row["weights"] = np.zeros(length, np.float32)
    row["inputs"][:size] = ids[:-1]
    row["targets"][size - asked : size], row["weights"][size - asked : size] = ids[len(ids) - asked :], 1
    return row | one_segment(length, size)


def real_row(
    inputs: Float[np.ndarray, "T C"],
    targets: Float[np.ndarray, "K"] | Float[np.ndarray, "T K"],
    weights: Float32[np.ndarray, ""] | Float32[np.ndarray, "T"],
) -> dict[str, np.ndarray]:
    """The row of a task with objective "regression" (one weight) or "token_regression" (one for each position)."""
    return {
        "inputs": inputs.astype(np.float32),
        "targets": targets.astype(np.float32),
        "weights": weights,
    } | one_segment(len(inputs))


def class_row(
    inputs: Int[np.ndarray, "N"] | Float[np.ndarray, "N C"], label: int, length: int | None = None
) -> dict[str, np.ndarray]:
    """The row of a task with objective "classification": inputs of one class, padded with 0 to `length`, if it is given."""
    size = len(inputs)
    length = size if length is None else length
    kind = np.int32 if np.issubdtype(inputs.dtype, np.integer) else np.float32
    return {
        "inputs": np.pad(inputs.astype(kind), [(0, length - size)] + [(0, 0)] * (inputs.ndim - 1)),
        "targets": np.asarray(label, np.int32),
        "weights": np.ones((), np.float32),
    } | one_segment(length, size)


def one_segment(length: int, size: int | None = None) -> dict[str, np.ndarray]:
    """The places of a row whose first `size` positions, by default all, are one segment; the others are padding."""
    size = length if size is None else size
    result = {"segment_ids": np.zeros(length, np.int32), "positions": np.zeros(length, np.int32)}
    result["segment_ids"][:size] = 1
    result["positions"][:size] = np.arange(size)
    return result


def shown(row: Mapping[str, np.ndarray], segmented: bool) -> dict[str, np.ndarray]:
    """What a model is shown of a row, or of a batch of rows: the places only where its task's spec is `segmented`."""
    return {key: value for key, value in row.items() if segmented or key not in PLACES}
