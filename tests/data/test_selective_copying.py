"""Selective copying: the data in order, wherever it stands."""

import numpy as np
import pytest

from data import task
from tests.data.generated_rows import check_rows, digest, scored


@pytest.mark.parametrize(("length", "tokens", "vocab"), [(48, 4, 16), (2, 1, 4), (20, 10, 5)])
def test_labels_are_the_data_in_order(length, tokens, vocab):
    copying = task.create("selective_copying", length=length, tokens=tokens, vocab_size=vocab)
    for i in range(50):
        row = copying.example("train", i)
        body = row["inputs"][: length - tokens].tolist()
        data = [token for token in body if token != 0]
        assert len(data) == tokens and all(1 <= token <= vocab - 2 for token in data)
        assert (row["inputs"][length - tokens :] == vocab - 1).all()
        assert scored(row) == dict(zip(range(length - tokens, length), data, strict=True))


def test_places_are_even():
    copying = task.create("selective_copying", length=12, tokens=2)
    counts = sum(row["inputs"][:10] > 0 for row in copying.rows("test"))
    np.testing.assert_allclose(counts / 1000, 0.2, atol=0.06)


def test_rows():
    check_rows(task.create("selective_copying"))
    assert digest(task.create("selective_copying")) == "12ae49e1cfbe7a31"


def test_floors():
    copying = task.create("selective_copying", length=8, tokens=2, vocab_size=5)
    floors = copying.floors("valid")
    right = [1 if len(set(scored(row).values())) == 1 else 0.5 for row in copying.rows("valid")]
    assert floors == {"chance": 1 / 3, "most frequent of the row": pytest.approx(np.mean(right))}


def test_bad_sizes():
    for sizes in ({"length": 7}, {"tokens": 0}):
        with pytest.raises(ValueError, match=r"must be at least 2 \* tokens"):
            task.create("selective_copying", **sizes)
    with pytest.raises(ValueError, match="vocab_size=3 must be at least 4"):
        task.create("selective_copying", vocab_size=3)
