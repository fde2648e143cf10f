"""Formal languages: every answer by another way than the task's own."""

import itertools

import numpy as np
import pytest

from data import task
from data.tasks.chomsky import PROBLEMS, STRING_ACCURACY, string_sums
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
    "solve_equation": "b7e8ec07d933b6df",
    "duplicate_string": "7345f37ab3abbbab",
    "missing_duplicate_string": "fb5bbca00434c355",
    "odds_first": "0d8e407d9da9747f",
    "binary_addition": "aaf024bdc6853cbd",
    "binary_multiplication": "ec01a8d78935ee1e",
    "compute_sqrt": "cba62f17a0250f28",
}
SYMBOLS = {"modular_arithmetic": "01234+-*", "modular_arithmetic_brackets": "01234+-*()"}


def solve_equation(string):
    """The digits that make it true."""
    if len(string) < 3:
        return [0]
    text = "".join("01234+-*()x="[token] for token in string)
    left, right = text.split("=")
    (digit,) = (x for x in range(5) if eval(left.replace("x", str(x))) % 5 == int(right))
    return [digit]


def arithmetic(string, plus):
    """By the school's way, a digit at a time."""
    if len(string) < 3:
        # One number, as its own sum without zeros behind it; its product is 0.
        if not plus:
            return [0] * (len(string) - 1) + [2]
        last = max((i for i, bit in enumerate(string) if bit), default=0)
        return [*string[: last + 1], 2]
    middle = string.index(2)
    a, b = string[:middle], string[middle + 1 :]
    columns = [0] * (len(a) + len(b) + 1)
    if plus:
        for number in (a, b):
            for i, bit in enumerate(number):
                columns[i] += bit
    else:
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                columns[i + j] += x * y
    for i in range(len(columns) - 1):
        columns[i + 1] += columns[i] // 2
        columns[i] %= 2
    while len(columns) > 1 and not columns[-1]:
        columns.pop()
    return [*columns, 2]


def root(string):
    """Bit by bit from the highest: it is set where the square does not become too large."""
    number, found = sum(bit << i for i, bit in enumerate(reversed(string))), 0
    places = range(-(-len(string) // 2) - 1, -1, -1)
    for place in places:
        found += (found + (1 << place)) ** 2 <= number and 1 << place
    return [found >> place & 1 for place in places]


def hidden(string):
    """The bit at the same place of the other half."""
    half = len(string) // 2
    return [string[string.index(2) - half] if string.index(2) >= half else string[string.index(2) + half]]


SOLVERS = {
    "solve_equation": solve_equation,
    "duplicate_string": lambda string: string + string,
    "missing_duplicate_string": lambda string: [1] if len(string) == 1 else hidden(string),
    "odds_first": lambda string: (
        [b for i, b in enumerate(string) if i % 2] + [b for i, b in enumerate(string) if not i % 2]
    ),
    "binary_addition": lambda string: arithmetic(string, True),
    "binary_multiplication": lambda string: arithmetic(string, False),
    "compute_sqrt": root,
}


def parts(made, row):
    """The string and the answer; asserts that the row is nothing else."""
    (places,) = np.nonzero(row["weights"])
    begin, end = places[0], places[-1] + 1
    ask = made.spec.vocab_size - 2
    assert len(places) == end - begin and (row["inputs"][begin:end] == ask).all()
    assert (row["inputs"][end:] == ask + 1).all() and row["inputs"][:begin].max() < ask
    return row["inputs"][:begin].tolist(), row["targets"][begin:end].tolist()


def solve(problem, string):
    if problem in SOLVERS:
        return SOLVERS[problem](string)
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


def test_numbers_have_what_their_lengths_say():
    """Every length of a first number, zeros behind the highest bit, and both operators' longest answers."""
    for problem in ("binary_addition", "binary_multiplication"):
        made = task.create("chomsky", problem=problem, shortest=8, longest=8)
        rows = [parts(made, made.row("train", i, 0, 0)) for i in range(300)]
        assert {string.index(2) for string, _ in rows} == set(range(1, 7))
        assert all(1 in string[: string.index(2)] and 1 in string[string.index(2) + 1 :] for string, _ in rows)
        assert {string[-1] for string, _ in rows} == {0, 1}
        assert max(len(answer) for _, answer in rows) == 8


def test_bad_settings():
    with pytest.raises(ValueError, match="problem='dick' is unknown; did you mean 'dyck'"):
        task.create("chomsky", problem="dick")
    with pytest.raises(ValueError, match="shortest=50 must be 1 to longest=40"):
        task.create("chomsky", shortest=50)


def test_strings_count_alike():
    """A long answer that is half right, a short one that is right, and a row that asks nothing."""
    targets = np.array([[0, 1, 2, 1], [2, 0, 0, 0], [1, 1, 1, 1]])
    weights = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    said = np.array([[0, 1, 0, 0], [2, 1, 1, 1], [1, 1, 1, 1]])
    sums = string_sums(np.eye(3)[said], targets, weights)
    assert STRING_ACCURACY.value({name: float(value) for name, value in sums.items()}) == (1 / 2 + 1) / 2
