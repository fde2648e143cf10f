"""What holds for the rows of tasks that classify lists of numbers."""

import numpy as np


def check_class_rows(task, count=30):
    """Shapes, dtypes and ids as the spec says; rows follow from (seed, split, epoch, index) and are all different."""
    spec, seen = task.spec, set()
    for split in task.splits:
        for i in range(count):
            row = task.example(split, i)
            assert {key: (value.shape, value.dtype) for key, value in row.items()} == {
                "inputs": ((spec.length,), np.int32),
                "targets": ((), np.int32),
                "weights": ((), np.float32),
                "segment_ids": ((spec.length,), np.int32),
                "positions": ((spec.length,), np.int32),
            }
            assert row["inputs"].min() >= 0 and row["inputs"].max() < spec.vocab_size
            assert 0 <= row["targets"] < spec.targets
            seen.add(row["inputs"].tobytes())
        same = np.array_equal(task.row(split, 3, 0, 0)["inputs"], task.row(split, 3, 0, 1)["inputs"])
        assert same == (split != "train")
    assert len(seen) == 3 * count
    assert not np.array_equal(task.row("train", 3, 0, 0)["inputs"], task.row("train", 3, 1, 0)["inputs"])
    assert len(task.fingerprint()) == 64
