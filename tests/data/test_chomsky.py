"""Formal languages: every answer by another way than the task's own."""

import itertools

import numpy as np
import pytest

from data import task
from data.tasks.chomsky import PROBLEMS
from tests.data.generated_rows import check_rows, digest

GOLDEN = {
    "parity_check": "6932b0def6c68f61",
    "even_pairs": "adc3ba2d359a7435",
    "cycle_navigation": "fa1b466177f75efd",
    "modular_arithmetic": "90afaf5ee6f9d02a",
    "modular_arithmetic_brackets": "7078a6df0ef69d64",
    "dyck": "0c30c9cf00fee324",
    "stack_manipulation": "4bbbfc7eaac26ddd",
    "reverse_string": "1a3e350e0528ee50",
    "bucket_sort": "2ea2cc68534c6ec5",
}
SYMBOLS = {"modular_arithmetic": "01234+-*", "modular_arithmetic_brackets": "01234+-*()"}


def parts(made, row):
    """The string and the answer; asserts that the row is nothing else."""
    (places,) = np.nonzero(row["weights"])
    begin, end = places[0], places[-1] + 1
    ask = made.spec.vocab_size - 2
    assert len(places) == end - begin and (row["inputs"][begin:end] == ask).all()
    assert (row["inputs"][end:] == ask + 1).all() and row["inputs"][:begin].max() < ask
    return row["inputs"][:begin].tolist(), row["targets"][begin:end].tolist()


def solve(problem, string):
    if problem in SYMBOLS:
        return [eval("".join(SYMBOLS[problem][token] for token in string)) % 5]  # Python's own precedence
    if problem == "parity_check":
        return [string.count(1) & 1]
    if problem == "even_pairs":
        return [sum(a != b for a, b in itertools.pairwise(string)) % 2]
    if problem == "cycle_navigation":
        return [(string.count(2) - string.count(0)) % 5]
    if problem == "dyck":
        text = "".join("([)]"[token] for token in string)
        while (shorter := text.replace("()", "").replace("[]", "")) != text:
            text = shorter
        assert set(text) <= set("([")
        return ["([".index(bracket) for bracket in reversed(text)] + [2]
    if problem == "stack_manipulation":
        size = next((i for i, token in enumerate(string) if token > 1), len(string))
        stack = "".join(map(str, string[:size]))
        for action in string[size:]:
            stack = stack[:-1] if action == 2 else stack + "01"[action - 3]
        return [*map(int, reversed(stack)), 2]
    return sorted(string) if problem == "bucket_sort" else list(reversed(string))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_answers(problem):
    made = task.create("chomsky", problem=problem, longest=20)
    sizes = set()
    for i in range(150):
        string, answer = parts(made, made.example("train", i))
        assert answer == solve(problem, string)
        sizes.add(len(string))
    assert sizes == set(range(1, 21, 2 if problem == "modular_arithmetic" else 1))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_rows(problem):
    long = task.create("chomsky", problem=problem, shortest=41, longest=60)
    check_rows(long, rows=8)
    assert digest(long) == GOLDEN[problem]
    assert {len(parts(long, row)[0]) for row in map(long.row, ["test"] * 99, range(99), [0] * 99, [0] * 99)} <= set(
        range(41, 61)
    )


def test_floors():
    """Even pairs are nothing but the ends."""
    even = task.create("chomsky", problem="even_pairs").floors()
    assert even["chance"] == 0.5 and even["ends and place"] > 0.99


def test_bad_settings():
    with pytest.raises(ValueError, match="problem='dick' is unknown; did you mean 'dyck'"):
        task.create("chomsky", problem="dick")
    with pytest.raises(ValueError, match="shortest=50 must be 1 to longest=40"):
        task.create("chomsky", shortest=50)
