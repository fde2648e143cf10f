"""Integers as tokens."""

import numpy as np

from data import numbers


def test_digits():
    values = np.array([0, 7, 40, 999])
    found = numbers.digits(values, 3)
    assert found.dtype == np.int32
    assert ["".join(map(str, row)) for row in found] == [f"{v:03}" for v in values]


def test_class_row():
    row = numbers.class_row(np.array([5, 6, 7]), 2)
    assert {key: (value.shape, value.dtype) for key, value in row.items()} == {
        "inputs": ((3,), np.int32),
        "targets": ((), np.int32),
        "weights": ((), np.float32),
        "segment_ids": ((3,), np.int32),
        "positions": ((3,), np.int32),
    }
    assert row["targets"] == 2 and row["weights"] == 1
    np.testing.assert_array_equal(row["segment_ids"], [1, 1, 1])
    np.testing.assert_array_equal(row["positions"], [0, 1, 2])
