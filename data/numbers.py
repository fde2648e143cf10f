"""Integers as tokens."""

import numpy as np
from jaxtyping import Int, Int32

ENCODINGS = ("numbers", "digits")


def digits(values: Int[np.ndarray, "N"], width: int) -> Int32[np.ndarray, "N W"]:
    """The decimal digits of integers below 10^width, the most significant first."""
    return (values[:, None] // 10 ** np.arange(width)[::-1] % 10).astype(np.int32)


def class_row(inputs: Int[np.ndarray, "T"], label: int) -> dict[str, np.ndarray]:
    """The row of a task with objective "classification" whose positions are all filled."""
    return {
        "inputs": inputs.astype(np.int32),
        "targets": np.asarray(label, np.int32),
        "weights": np.ones((), np.float32),
        "segment_ids": np.ones(len(inputs), np.int32),
        "positions": np.arange(len(inputs), dtype=np.int32),
    }
