"""Copying: the data again after a delay that the length sets."""

import numpy as np
import pytest

from data import task
from tests.data.generated_rows import check_rows, digest, scored


@pytest.mark.parametrize(("length", "tokens", "vocab"), [(64, 8, 10), (2, 1, 4), (20, 10, 5), (31, 2, 64)])
def test_labels_are_the_inputs_after_the_delay(length, tokens, vocab):
    copying = task.create("copying", length=length, tokens=tokens, vocab_size=vocab)
    for i in range(30):
        row = copying.example("train", i)
        data = row["inputs"][:tokens]
        assert data.min() >= 1 and data.max() <= vocab - 2
        assert row["inputs"][tokens:].tolist() == [0] * (length - 2 * tokens) + [vocab - 1] * tokens
        assert scored(row) == {length - tokens + i: int(token) for i, token in enumerate(data)}


def test_rows():
    check_rows(task.create("copying"))
    assert digest(task.create("copying")) == "988196150b3fb213"


def test_floors():
    copying = task.create("copying", length=8, tokens=3, vocab_size=5)
    floors = copying.floors("test")
    right = []
    for row in copying.rows("test"):
        data = row["inputs"][:3].tolist()
        most = max(map(data.count, data))
        right.append(most / 3 if most > 1 else 1 / 3)
    assert floors == {"chance": 1 / 3, "most frequent of the row": pytest.approx(np.mean(right))}


def test_bad_sizes():
    for sizes in ({"length": 15}, {"tokens": 0}):
        with pytest.raises(ValueError, match=r"must be at least 2 \* tokens"):
            task.create("copying", **sizes)
    with pytest.raises(ValueError, match="vocab_size=3 must be at least 4"):
        task.create("copying", vocab_size=3)
