"""Associative recall, by a plain dictionary."""

import numpy as np
import pytest

from data import task
from tests.data.generated_rows import check_rows, digest, scored


@pytest.mark.parametrize(
    ("length", "vocab", "key_tokens", "absent"), [(32, 20, 1, False), (33, 9, 2, True), (4, 6, 1, True)]
)
def test_the_answer_is_the_value_of_the_key(length, vocab, key_tokens, absent):
    recall = task.create("associative_recall", length=length, vocab_size=vocab, key_tokens=key_tokens, absent=absent)
    missing, rows = 0, []
    for i in range(200):
        row = recall.example("train", i)
        inputs = row["inputs"].tolist()
        known = {}
        for t in range(0, length - key_tokens - 1, key_tokens + 1):
            *key, value = inputs[t : t + key_tokens + 1]
            assert max(key) < (vocab - 2) // 2 <= value < vocab - 2
            assert known.setdefault(tuple(key), value) == value
        assert inputs[-key_tokens - 1] == vocab - 2
        asked = tuple(inputs[-key_tokens:])
        assert scored(row) == {length - 1: known.get(asked, vocab - 1)}
        missing += asked not in known
        rows.append(len(known))
    assert (missing > 0) == absent and np.mean(rows) > 1 - (length == 4) * 0.1


def test_rows():
    recall = task.create("associative_recall")
    check_rows(recall)
    assert digest(recall) == "ac8782cb63513042"
    assert digest(task.create("associative_recall", key_tokens=2, length=33, absent=True)) == "7d1d02aacd44feea"
    floors = recall.floors("valid")
    assert floors["chance"] == 1 / 9 and floors["most frequent of the row"] > floors["majority"]
    # A dictionary of the row, of which no key is looked up.
    right = []
    for row in recall.rows("valid"):
        known = list(dict(row["inputs"][:-2].reshape(-1, 2).tolist()).values())
        best = {value for value in known if known.count(value) == max(map(known.count, known))}
        right.append((row["targets"][-1] in best) / len(best))
    assert floors["value of most keys"] == pytest.approx(np.mean(right))


def test_bad_sizes():
    with pytest.raises(ValueError, match="length=33 must be a number of pairs of 2 tokens and 2 more"):
        task.create("associative_recall", length=33)
    with pytest.raises(ValueError, match="vocab_size=5 must be at least 6"):
        task.create("associative_recall", vocab_size=5)
