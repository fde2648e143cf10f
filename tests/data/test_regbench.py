"""RegBench: rows are strings of their automata, by walking them again."""

import numpy as np
import pytest

from data import task
from tests.data.generated_rows import check_rows, digest


def test_rows_are_strings_of_their_automata():
    bench = task.create("regbench", length=1000)
    states, alphabets, strings, ways_out = set(), set(), set(), []
    for index in range(60):
        rng = lambda index=index: np.random.default_rng([2, 0, index, 0])
        letters, targets = bench.automaton(rng())
        states.add(len(letters))
        alphabets.add(len({letter for some in letters for letter in some}))
        for state, (some, there) in enumerate(zip(letters, targets, strict=True)):
            assert 1 <= len(set(some)) == len(some) == len(set(there)) <= 3 and state not in there
        text, ways = bench.strings(rng())
        row = bench.row("test", index, 0, 0)
        np.testing.assert_array_equal(row["inputs"], text[:-1])
        np.testing.assert_array_equal(row["weights"], text[1:] < 18)
        np.testing.assert_array_equal(row["targets"], np.where(text[1:] < 18, text[1:], 0))
        words = [[]]
        for token, count in zip(text.tolist(), ways.tolist(), strict=True):
            if token == 18:
                words.append([])
            elif token < 18:
                words[-1].append((token, count))
        assert (np.flatnonzero(text == 19) == np.arange(np.sum(text < 19), 1001)).all()
        strings.add(len(words))
        for word in words:
            assert 1 <= len(word) <= 49
            state = 0
            for token, count in word:
                assert count == len(letters[state])
                ways_out.append(count)
                state = targets[state][letters[state].index(token)]
    assert min(states) == 4 and max(states) == 12 and strings <= set(range(10, 20)) and max(alphabets) > 10
    assert set(ways_out) == {1, 2, 3}


def test_rows():
    bench = task.create("regbench")
    check_rows(bench, rows=8)
    assert digest(bench) == "f85f04ee16b35628" and bench.spec.metric.name == "accuracy"


def test_floors_and_the_ceiling():
    """The 2-gram by brute force; nobody is better than who knows the automaton."""
    bench = task.create("regbench", length=60)
    bench.sizes = {"train": 100, "valid": 30, "test": 30}
    right = []
    for row in bench.rows("test"):
        text = [*row["inputs"].tolist(), int(row["targets"][-1])]
        for t in np.flatnonzero(row["weights"]) + 1:
            followers = [text[i] for i in range(1, t) if text[i - 1] == text[t - 1] and text[i] < 18]
            followers = followers or [token for token in text[1:t] if token < 18]
            right.append(bool(followers) and max(dict.fromkeys(followers), key=followers.count) == text[t])
    floors = bench.floors()
    assert floors["2-gram of the row"] == pytest.approx(np.mean(right))
    assert floors["chance"] < floors["2-gram of the row"] < bench.ceiling() < 1
