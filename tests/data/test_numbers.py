"""Integers as tokens."""

import numpy as np

from data import numbers


def test_digits():
    values = np.array([0, 7, 40, 999])
    found = numbers.digits(values, 3)
    assert found.dtype == np.int32
    assert ["".join(map(str, row)) for row in found] == [f"{v:03}" for v in values]
