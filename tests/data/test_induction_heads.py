"""Induction heads: one special token, what follows it, and the question."""

import numpy as np
import pytest

from data import task
from tests.data.generated_rows import check_rows, digest, scored


@pytest.mark.parametrize(("length", "vocab"), [(256, 16), (3, 3), (40, 5)])
def test_the_answer_follows_the_first_special_token(length, vocab):
    heads = task.create("induction_heads", length=length, vocab_size=vocab)
    places = set()
    for i in range(200):
        row = heads.example("train", i)
        inputs = row["inputs"].tolist()
        first = inputs.index(vocab - 1)
        assert [t for t, token in enumerate(inputs) if token == vocab - 1] == [first, length - 1]
        assert scored(row) == {length - 1: inputs[first + 1]} and inputs[first + 1] != vocab - 1
        places.add(first)
    assert min(places) < max(1, 0.1 * length) and max(places) >= 0.9 * length - 3 and len(places) > 0.4 * (length - 2)


def test_long_rows():
    row = task.create("induction_heads", length=65_536).example("test", 0)
    inputs = row["inputs"]
    assert scored(row) == {65_535: int(inputs[np.argmax(inputs == 15) + 1])}


def test_rows():
    heads = task.create("induction_heads")
    check_rows(heads)
    assert heads.num_examples("train") == 8 * 8192
    assert digest(heads) == "3ebf407eea0a01c2"


def test_floors():
    heads = task.create("induction_heads", length=16, vocab_size=4)
    answers = [int(row["targets"][-1]) for row in heads.rows("test")]
    assert heads.floors("test") == {"chance": 1 / 3, "majority": max(map(answers.count, range(3))) / 1000}


def test_bad_sizes():
    with pytest.raises(ValueError, match="length=2 must be at least 3"):
        task.create("induction_heads", length=2)
    with pytest.raises(ValueError, match="vocab_size=2 must be at least 3"):
        task.create("induction_heads", vocab_size=2)
