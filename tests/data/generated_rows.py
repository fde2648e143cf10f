"""What holds for the rows of every task that is drawn at random."""

import hashlib

import numpy as np

KEYS = ("inputs", "positions", "segment_ids", "targets", "weights")


def check_rows(task, rows=20, new_each_epoch=True):
    """Shapes, dtypes and ids as the spec says; rows that follow from (seed, split, index) and are all different."""
    spec, seen = task.spec, set()
    length = (spec.length,)
    tokens = spec.channels is None
    real = spec.objective.endswith("regression")
    per_row = spec.objective == "regression"
    shapes = {
        "inputs": length if tokens else (*length, spec.channels),
        "targets": (spec.targets,) if per_row else (*length, spec.targets) if real else length,
        "weights": () if per_row else length,
        "segment_ids": length,
        "positions": length,
    }
    dtypes = {
        "inputs": np.int32 if tokens else np.float32,
        "targets": np.float32 if real else np.int32,
        "weights": np.float32,
        "segment_ids": np.int32,
        "positions": np.int32,
    }
    for split in task.splits:
        for index in range(min(rows, task.num_examples(split))):
            row = task.example(split, index)
            assert {key: value.shape for key, value in row.items()} == shapes
            assert {key: value.dtype for key, value in row.items()} == dtypes
            np.testing.assert_array_equal(row["segment_ids"], np.ones(length))
            np.testing.assert_array_equal(row["positions"], np.arange(*length))
            assert set(np.unique(row["weights"])) <= {0, 1} and row["weights"].any()
            if tokens:
                assert row["inputs"].min() >= 0 and row["inputs"].max() < spec.vocab_size
            if not real:
                assert row["targets"].min() >= 0 and row["targets"].max() < spec.targets
                assert (row["targets"][row["weights"] == 0] == 0).all()
            seen.add(row["inputs"].tobytes())
            same = task.row(split, 3, 0, 0)
            other = task.row(split, 3, 0, 1)
            assert equal(same, other) == (split != "train")
    assert len(seen) == sum(min(rows, task.num_examples(split)) for split in task.splits)
    assert equal(task.row("train", 3, 0, 0), task.row("train", 3, 1, 0)) != new_each_epoch
    assert equal(type(task).row(task, "train", 3, 2, 5), task.row("train", 3, 2, 5))
    assert len(task.fingerprint()) == 64 and task.fingerprint() == task.fingerprint()


def equal(first, second):
    return all(np.array_equal(first[key], second[key]) for key in KEYS)


def digest(task):
    """The hash of some rows: it changes where resumed runs would see other data."""
    result = hashlib.sha256()
    for split, index, epoch, seed in (
        ("train", 0, 0, 0),
        ("train", 77, 3, 2**40 + 7),
        ("valid", 1, 0, 0),
        ("test", 2, 0, 0),
    ):
        row = task.row(split, index % task.num_examples(split), epoch, seed)
        for key in KEYS:
            result.update(key.encode() + row[key].astype("<f4").tobytes())
    return result.hexdigest()[:16]


def scored(row):
    """{position: label} of what is scored."""
    return {int(t): int(row["targets"][t]) for t in np.flatnonzero(row["weights"])}
