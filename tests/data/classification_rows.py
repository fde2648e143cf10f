"""What the tests of tasks that classify whole rows share."""

import hashlib

import numpy as np


def digest(row):
    """The first 16 hexadecimal digits of the SHA-256 of a row's arrays, in order of their names."""
    return hashlib.sha256(b"".join(row[key].tobytes() for key in sorted(row))).hexdigest()[:16]


def check(task, split, index):
    """Asserts that a row has the shapes, types and ranges that the task's spec promises; returns it."""
    row, spec = task.example(split, index, seed=0), task.spec
    pair = (2,) if spec.objective == "pair_classification" else ()
    tokens = (*pair, spec.length)
    shapes = {
        "inputs": tokens if spec.channels is None else (*tokens, spec.channels),
        "targets": (),
        "weights": (),
        "segment_ids": tokens,
        "positions": tokens,
    }
    types = {key: np.dtype(np.int32) for key in shapes} | {"weights": np.dtype(np.float32)}
    if spec.channels is not None:
        types["inputs"] = np.dtype(np.float32)
    assert {key: value.shape for key, value in row.items()} == shapes
    assert {key: value.dtype for key, value in row.items()} == types
    assert 0 <= row["targets"] < spec.targets and row["weights"] == 1
    if spec.vocab_size is not None:
        assert row["inputs"].min() >= 0 and row["inputs"].max() < spec.vocab_size
    assert np.isfinite(row["inputs"]).all()
    # One segment, then padding, which only rows that say so may have.
    assert set(np.unique(row["segment_ids"])) <= ({0, 1} if spec.segmented else {1})
    assert (np.diff(row["segment_ids"]) <= 0).all()
    np.testing.assert_array_equal(row["positions"], np.arange(spec.length) * row["segment_ids"])
    if spec.segmented:
        assert not row["inputs"][row["segment_ids"] == 0].any()
    return row
