"""Rows against arrays that are written out."""

import numpy as np
import pytest

from data import rows

PLACES = {"segment_ids": [1, 1, 1], "positions": [0, 1, 2]}


def check(row, **expected):
    """The arrays and types of a row."""
    kinds = {
        "inputs": np.int32,
        "targets": np.int32,
        "weights": np.float32,
        "segment_ids": np.int32,
        "positions": np.int32,
    }
    for key, (value, kind) in {key: (value, kinds[key]) for key, value in expected.items() if key != "real"}.items():
        np.testing.assert_array_equal(row[key], value)
        assert row[key].dtype == (np.float32 if key in expected.get("real", ()) else kind), key
    assert set(row) == set(kinds)


def test_token_row():
    row = rows.token_row(np.array([5, 6, 7]), np.array([1, 2, 3]), np.array([False, True, True]))
    check(row, inputs=[5, 6, 7], targets=[0, 2, 3], weights=[0, 1, 1], **PLACES)


def test_real_row():
    row = rows.real_row(np.array([[0.5], [1], [2]]), np.array([3.5, 4]), np.ones((), np.float32))
    check(row, inputs=[[0.5], [1], [2]], targets=[3.5, 4], weights=1, real=("inputs", "targets"), **PLACES)


def test_class_row():
    check(rows.class_row(np.array([5, 6, 7]), 2), inputs=[5, 6, 7], targets=2, weights=1, **PLACES)
    check(
        rows.class_row(np.array([[0.5], [1], [2]]), 2), inputs=[[0.5], [1], [2]], targets=2, real=("inputs",), **PLACES
    )


@pytest.mark.parametrize("size", [0, 2, 4])
def test_padding_has_segment_0(size):
    row = rows.class_row(np.arange(1, 1 + size), 1, 4)
    inside = [1] * size + [0] * (4 - size)
    check(row, inputs=np.arange(1, 5) * inside, segment_ids=inside, positions=np.arange(4) * inside)


def test_models_are_shown_places_only_where_there_are_segments():
    row = rows.class_row(np.array([5, 6, 7]), 2)
    assert set(rows.shown(row, True)) == set(row)
    assert set(rows.shown(row, False)) == {"inputs", "targets", "weights"}
