"""Combination sum: labels by enumeration."""

import itertools

import numpy as np
import pytest

from data import task
from data.tasks import combination_sum as module
from tests.data.generated_rows import digest
from tests.data.number_rows import check_class_rows


def enumerated(candidates, target, reuse):
    """The number of combinations, by trying all."""
    choices = [range(target // c + 1 if reuse else 2) for c in candidates]
    return sum(np.dot(counts, candidates) == target for counts in itertools.product(*choices))


def question(options, row):
    """(target, candidates, reuse) of a row, from its text."""
    width = options.get("encoding") == "digits"
    symbols = ["T", "|", "REUSE", "ONCE"] + [str(i) for i in range(10 if width else 1000)]
    text = ("" if width else " ").join(symbols[i] for i in row["inputs"])
    for mode in ("REUSE", "ONCE"):
        text = text.replace(mode, f" {mode}")
    numbers, mode = text.lstrip("T").split("|"), text.split()[-1]
    numbers[-1] = numbers[-1].replace(mode, "")
    return int(numbers[0]), [int(n) for part in numbers[1:] for n in part.split()], mode == "REUSE"


@pytest.mark.parametrize("encoding", ["numbers", "digits"])
@pytest.mark.parametrize("answer", ["count", "feasible"])
def test_rows(answer, encoding):
    sums = task.create("combination_sum", answer=answer, encoding=encoding)
    check_class_rows(sums)
    golden = {
        ("count", "numbers"): "45aea43c305f351a",
        ("feasible", "numbers"): "213add09dad53de6",
        ("count", "digits"): "eda7693e4edb4597",
        ("feasible", "digits"): "38d406259f84ffe0",
    }
    assert digest(sums) == golden[answer, encoding]


@pytest.mark.parametrize(
    "options",
    [
        {"length": 9, "limit": 20, "max_target": 30},
        {"length": 10, "limit": 20, "max_target": 30, "reuse": "never"},
        {"length": 8, "limit": 20, "max_target": 30, "reuse": "always", "answer": "feasible"},
        {"length": 19, "limit": 20, "max_target": 30, "encoding": "digits"},
        {"length": 22, "limit": 40, "max_target": 60, "encoding": "digits", "reuse": "never", "answer": "feasible"},
    ],
)
def test_labels_by_enumeration(options):
    sums = task.create("combination_sum", **options)
    modes = set()
    for i in range(60):
        row = sums.row("train", i, 0, 0)
        target, candidates, reuse = question(options, row)
        assert len(set(candidates)) == len(candidates) == sums.count
        assert 2 <= min(candidates) and max(candidates) < sums.limit
        assert sums.max_target // 2 <= target < sums.max_target
        parsed = sums.parse(row["inputs"])
        assert (parsed[0], parsed[1].tolist(), parsed[2]) == (target, candidates, reuse)
        ways = enumerated(candidates, target, reuse)
        assert row["targets"] == (ways % 10 if sums.answer == "count" else ways > 0)
        modes.add(reuse)
    assert modes == {"mixed": {True, False}, "always": {True}, "never": {False}}[sums.reuse]


def test_counts_that_a_row_seldom_has():
    count = lambda *args: module.count_modulo(np.array(args[0]), *args[1:])
    assert count([2, 3, 6, 7], 7, True, 10) == 2  # 7, 2 + 2 + 3
    assert count([2, 3, 6, 7], 9, False, 10) == 2  # 2 + 7, 3 + 6
    assert count([5], 4, True, 10) == count([5], 4, False, 10) == 0
    # Coins: a dollar in 292 ways.
    assert count([1, 5, 10, 25, 50], 100, True, 1000) == 292


def test_count_and_feasibility_agree():
    rng = np.random.default_rng(0)
    for _ in range(300):
        candidates = 2 + rng.choice(40, rng.integers(1, 8), replace=False)
        target, reuse = int(rng.integers(1, 60)), bool(rng.integers(2))
        ways = module.count_modulo(candidates, target, reuse, 2**40)
        assert module.feasible(candidates, target, reuse) == (ways > 0)


def test_count_classes_are_balanced(monkeypatch):
    monkeypatch.setattr(module, "FIT_ROWS", 1024)
    floors = task.create("combination_sum").floors("test")
    assert 0.1 <= floors["majority"] < 0.15 and floors["target"] < 0.15


def test_feasible_floors():
    sums = task.create("combination_sum", answer="feasible")
    floors = sums.floors("test")
    labels, divides = [], []
    for row in sums.rows("test"):
        target, candidates, _ = question({}, row)
        divides.append((target % np.gcd.reduce(candidates) == 0) == row["targets"])
        labels.append(row["targets"])
    share = np.mean(labels)
    assert floors["majority"] == pytest.approx(max(share, 1 - share)) and 0.45 < share < 0.55
    assert floors["common divisor"] == pytest.approx(np.mean(divides)) and floors["common divisor"] > 0.75
    assert 0.5 <= floors["target"] < 0.75 and floors["divisor of all but one"] > 0.99


@pytest.mark.parametrize("length", [30, 48])
def test_other_lengths(length):
    """Rows are as long as they are said to be: they have more candidates, or are refused."""
    longer = task.create("combination_sum", **task.find("combination_sum").at_length({}, length))
    assert longer.example("test", 0)["inputs"].shape == (length,)
    assert len(longer.parse(longer.example("test", 0)["inputs"])[1]) == length - 4
    with pytest.raises(ValueError, match="lower the length or raise the limit"):
        task.create("combination_sum", **task.find("combination_sum").at_length({}, 100))


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"length=23 must be 4 \+ 3 \* candidates .* use 22 or 25"):
        task.create("combination_sum", length=23, encoding="digits")
    with pytest.raises(ValueError, match="2 candidates or more; use 6 or 7"):
        task.create("combination_sum", length=5)
    with pytest.raises(ValueError, match="room for 96 candidates and limit=64 leaves 62"):
        task.create("combination_sum", length=100)
    with pytest.raises(ValueError, match="room for 32 candidates and limit=64 leaves 31 for answer='feasible'"):
        task.create("combination_sum", length=36, answer="feasible")
    with pytest.raises(ValueError, match=r"max_target must be from 4 to .*, got 3"):
        task.create("combination_sum", max_target=3)
    with pytest.raises(ValueError, match="reuse='sometimes' is unknown"):
        task.create("combination_sum", reuse="sometimes")
    monkeypatch.setattr(module, "MOST_DRAWS", 100)
    hopeless = task.create("combination_sum", answer="feasible", limit=100_000, max_target=4)
    with pytest.raises(ValueError, match="bring limit and max_target nearer"):
        for i in range(20):
            hopeless.row("train", i, 0, 0)


def test_paper_sizes():
    sums = task.create("combination_sum", **task.find("combination_sum").paper_size)
    assert sums.count == 65
    assert task.create("combination_sum", encoding="digits", **task.find("combination_sum").paper_size).count == 16
