"""The adding problem: the two marked numbers and their sum."""

import numpy as np
import pytest

from data import task
from tests.data.generated_rows import check_rows, digest


@pytest.mark.parametrize("length", [2, 3, 128])
def test_the_target_is_the_sum_of_one_number_of_each_half(length):
    adding = task.create("adding", length=length)
    places = set()
    for i in range(200):
        row = adding.example("train", i)
        numbers, marks = row["inputs"].T
        assert 0 <= numbers.min() and numbers.max() < 1 and set(marks) <= {0, 1}
        first, second = np.flatnonzero(marks)
        assert first < length // 2 <= second
        assert row["targets"] == pytest.approx([numbers[first] + numbers[second]])
        places |= {first, second}
    assert len(places) > 0.8 * length


def test_rows():
    adding = task.create("adding")
    check_rows(adding)
    assert adding.spec.metric.name == "rmse" and adding.spec.objective == "regression"
    assert digest(adding) == "0a4674b69f879c83"


def test_floors():
    floors = task.create("adding", length=20).floors("test")
    assert floors["mean"] == pytest.approx((1 / 6) ** 0.5, abs=0.02)
    assert floors["last number"] == pytest.approx((1 / 12) ** 0.5, abs=0.01)


def test_bad_length():
    with pytest.raises(ValueError, match="length=1 must be at least 2"):
        task.create("adding", length=1)
