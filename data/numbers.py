"""Integers as tokens."""

import numpy as np
from jaxtyping import Int, Int32

ENCODINGS = ("numbers", "digits")


def digits(values: Int[np.ndarray, "N"], width: int) -> Int32[np.ndarray, "N W"]:
    """The decimal digits of integers below 10^width, the most significant first."""
    return (values[:, None] // 10 ** np.arange(width)[::-1] % 10).astype(np.int32)
