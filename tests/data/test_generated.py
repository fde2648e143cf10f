"""Streams of random numbers and floors that all generated tasks share."""

import numpy as np
import pytest

from data import generated, rows
from data.task import Spec


class Letters(generated.GeneratedTask):
    """Two random letters, then the first of them is asked for."""

    sizes = {"train": 50, "valid": 20, "test": 30}

    def __init__(self, letters=4):
        self.name = "letters"
        self.spec = Spec(letters, None, letters, "token_labels", 3)

    def draw(self, split, rng):
        inputs = np.append(rng.integers(1, self.spec.vocab_size, size=2), 0)
        return rows.token_row(inputs, inputs[[0, 0, 0]], np.array([False, False, True]))

    def floors(self, split="test"):
        return {"majority": generated.majority(self, split)}


def test_each_row_has_its_own_random_numbers():
    task = Letters(letters=10**6)
    train = [("train", i, e, seed) for i in (0, 1) for e in (0, 1) for seed in (0, 1, 2**32, 2**33)]
    evaluation = [(split, i, 0, 0) for split in ("valid", "test") for i in (0, 1)]
    assert len({task.row(*key)["inputs"].tobytes() for key in train + evaluation}) == len(train) + 4
    for split, i, _, _ in evaluation:
        np.testing.assert_array_equal(task.row(split, i, 0, 0)["inputs"], task.row(split, i, 3, 5)["inputs"])
    assert [task.num_examples(split) for split in task.splits] == [50, 20, 30]
    with pytest.raises(ValueError, match="did you mean 'train'"):
        task.num_examples("trian")
    with pytest.raises(ValueError, match="split='train'"):
        next(task.rows("train"))


def test_what_is_not_scored_has_label_0():
    row = Letters().example("test", 0)
    assert row["targets"].tolist()[:2] == [0, 0] and row["weights"].tolist() == [0, 0, 1]


def test_floors_by_plain_loops():
    task = Letters()
    for split in ("valid", "test"):
        rows = [task.example(split, i) for i in range(task.num_examples(split))]
        answers = [int(row["targets"][2]) for row in rows]
        assert generated.majority(task, split) == max(answers.count(a) for a in answers) / len(answers)
        # With two different letters the answer is one of two.
        expected = np.mean([1 if row["inputs"][0] == row["inputs"][1] else 0.5 for row in rows])
        assert generated.most_frequent_label(task, split) == pytest.approx(expected)


def test_fingerprint_depends_on_rows_and_sizes():
    first, longer, other = Letters(), Letters(), Letters(letters=5)
    longer.sizes = {"train": 51, "valid": 20, "test": 30}
    assert len({task.fingerprint() for task in (first, longer, other, Letters())}) == 3
