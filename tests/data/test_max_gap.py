"""Maximum gap: labels by sorting."""

import tracemalloc

import numpy as np
import pytest

from data import task
from data.tasks import max_gap as module
from tests.data.generated_rows import digest
from tests.data.number_rows import check_class_rows


def by_sorting(values):
    return int(np.diff(np.sort(values)).max())


def numbers_of(gap, row):
    """The list of a row, from its text."""
    if gap.spec.vocab_size != 11:
        return row["inputs"]
    words = "".join("0123456789 "[i] for i in row["inputs"]).split()
    assert {len(word) for word in words} == {len(str(gap.limit - 1))}
    return np.array(words, int)


@pytest.mark.parametrize("encoding", ["numbers", "digits"])
def test_rows(encoding):
    gap = task.create("max_gap", encoding=encoding)
    check_class_rows(gap)
    assert digest(gap) == {"numbers": "783c51ba242ee542", "digits": "3a726fc8162a45f1"}[encoding]
    assert gap.spec.metric.name == "accuracy"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoding": "digits"},
        {"length": 4, "limit": 64},
        {"length": 1024, "limit": 1000},
        {"length": 256, "limit": 1000, "encoding": "digits"},
    ],
)
def test_the_class_is_the_size_of_the_largest_gap(options):
    gap = task.create("max_gap", **options)
    smallest, step = gap.limit // 16, (gap.limit // 4 - gap.limit // 16) // 10
    for i in range(200):
        row = gap.example("train", i)
        values = numbers_of(gap, row)
        assert len(values) == gap.count and 0 <= values.min() and values.max() < gap.limit
        assert by_sorting(values) == smallest + step * row["targets"]


def test_sizes_do_not_depend_on_the_length():
    gaps = [
        {
            int(row["targets"]): by_sorting(row["inputs"])
            for row in map(task.create("max_gap", length=n).row, *rows(200))
        }
        for n in (64, 256)
    ]
    assert gaps[0] == gaps[1] and len(gaps[0]) == 10


def rows(count):
    return ["train"] * count, range(count), [0] * count, [0] * count


def test_lists_are_shuffled_and_classes_even():
    gap = task.create("max_gap")
    drawn = [gap.row("test", i, 0, 0) for i in range(gap.num_examples("test"))]
    counts = np.bincount([row["targets"] for row in drawn], minlength=10)
    assert counts.min() > 70 and counts.max() < 130
    # Position says nothing: each has the same mean, within five standard errors.
    values = np.stack([row["inputs"] for row in drawn])
    assert np.abs(values.mean(0) - values.mean()).max() < 5 * values.std() / 1000**0.5


def test_bucket_method_equals_sorting():
    rng = np.random.default_rng(0)
    for _ in range(500):
        values = rng.integers(0, rng.integers(1, 200), rng.integers(2, 40))
        assert module.maximum_gap(values) == by_sorting(values)


def test_floors(monkeypatch):
    monkeypatch.setattr(module, "FIT_ROWS", 1000)
    gap = task.create("max_gap", length=16)
    floors = gap.floors("valid")
    labels = [int(row["targets"]) for row in gap.rows("valid")]
    assert floors["majority"] == max(labels.count(c) for c in range(10)) / 1000
    assert 0.09 < floors["moments"] < 0.4


def test_errors():
    with pytest.raises(ValueError, match="length=65 must be a multiple of 4 for encoding='digits'"):
        task.create("max_gap", length=65, encoding="digits")
    with pytest.raises(ValueError, match="at least 4 numbers"):
        task.create("max_gap", length=3)
    with pytest.raises(ValueError, match="limit=63 must be at least 64"):
        task.create("max_gap", limit=63)
    with pytest.raises(ValueError, match="encoding='digit' is unknown; did you mean 'digits'"):
        task.create("max_gap", encoding="digit")


@pytest.mark.parametrize("limit", [64, 256, 5000])
@pytest.mark.parametrize("count", [4, 20, 64, 300])
def test_numbers_are_chosen_as_from_a_list_of_all(limit, count):
    """Beside a mask of all numbers below the limit, from which the same are drawn; with short walks, which leave many."""
    made = task.create("max_gap", limit=limit, length=count)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        gap = made.smallest + made.step * int(rng.integers(10))
        below = int(rng.integers(limit - gap))
        above = below + gap
        down, up = np.cumsum(rng.integers(1, made.smallest, (2, min(64, (count - 2) // 2))), 1)
        down, up = below - down, above + up
        walked = np.concatenate([[below, above], down[down >= 0], up[up < limit]])
        seen = {*walked.tolist(), *range(below, above)}
        free = [n for n in range(min(walked), max(walked)) if n not in seen]
        more = min(48, limit // 2, count) - len(walked)
        distinct = np.append(walked, rng.choice(free, min(max(more, 0), len(free)), replace=False)).astype(np.int64)
        weights = rng.gamma(0.5, size=len(distinct)) + 1e-12
        again = rng.choice(distinct, count - len(distinct), p=weights / weights.sum())
        expected = rng.permutation(np.append(distinct, again))
        np.testing.assert_array_equal(made.values(np.random.default_rng(seed)), expected)


def test_large_limits_take_no_memory():
    made = task.create("max_gap", encoding="digits", limit=2**31 - 1, length=11 * 64)
    tracemalloc.start()
    try:
        for index in range(20):
            values = made.values(np.random.default_rng(index))
            size = (module.maximum_gap(values) - made.smallest) / made.step
            assert size == int(size) and 0 <= size < 10 and len(set(values)) == 48
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
