"""Shallow models, and that no small fitted model with hand-made features beats the floors of a task by more than two points."""

import math

import numpy as np
import pytest

from data import shallow, task
from data.tasks.chomsky import PROBLEMS
from data.tasks.listops import TOKENS

MARGIN = 0.02


def test_the_commonest_of_the_others():
    rng = np.random.default_rng(0)
    for size, kinds in ((1, 1), (2, 1), (2, 9), (30, 3), (30, 12), (30, 60)):
        answers = [str(i) for i in rng.integers(kinds, size=size)]
        others = [answers[:i] + answers[i + 1 :] for i in range(size)]
        best = [min(left, key=lambda one: (-left.count(one), one)) if left else None for left in others]
        assert shallow.commonest_of_others(answers) == best


def test_polynomials():
    x = np.array([[2.0, 3.0], [5.0, 7.0]])
    assert shallow.polynomial(x, 2).tolist() == [[1, 2, 3, 4, 6, 9], [1, 5, 7, 25, 35, 49]]
    x = np.random.default_rng(0).normal(size=(200, 3))
    x[:, 1] = 4
    train, test = shallow.standardised(x, x + 1)
    np.testing.assert_allclose([train.mean(0), train.std(0)], [[0, 0, 0], [1, 0, 1]], atol=1e-12)
    assert not test[:, 1].any()


def own_digits(text: str):
    """Root, the digits that are its own arguments, and the number of its other arguments, by taking inner operations away."""
    words = text.split()
    root, inner, digits, nested, depth = words[0], words[1:], [], 0, 0
    for word in inner:
        if word == "X":
            depth -= 1
        elif word.startswith("["):
            nested += depth == 0
            depth += 1
        elif depth == 0:
            digits.append(int(word))
    return root, digits, nested


def listops_features(made, row):
    root, digits, nested = own_digits(made.decode(row["inputs"]))
    kinds = [root == token for token in TOKENS]
    middle = sorted(digits)[(len(digits) - 1) // 2] if digits else -1
    known = [min(digits, default=10), max(digits, default=-1), sum(digits) % 10 if digits else -1, middle, len(digits)]
    return [*kinds, *known, nested]


def max_gap_features(made, row):
    values = row["inputs"]
    quantiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    return [*quantiles, values.std(), values.mean(), len(set(values.tolist())), np.abs(np.diff(values)).mean()]


def sum_features(made, row):
    target, candidates, reuse = made.parse(row["inputs"])
    multiples = [(np.sum(candidates % d == 0), target % d == 0) for d in (2, 3, 4, 5)]
    divides = target % math.gcd(*candidates.tolist()) == 0
    return [target, reuse, np.sum(candidates <= target), *np.sort(candidates)[:3], *np.ravel(multiples), divides]


def scores_of_trees(x, labels, held, expected):
    from sklearn.tree import DecisionTreeClassifier

    trees = [DecisionTreeClassifier(max_depth=depth, min_samples_leaf=10, random_state=0) for depth in (3, 6, 9)]
    return [np.mean(tree.fit(x, labels).predict(held) == expected) for tree in trees]


@pytest.mark.parametrize(
    "problem",
    [
        "compute_sqrt",
        *(pytest.param(name, marks=pytest.mark.thorough) for name in PROBLEMS if name != "compute_sqrt"),
    ],
)
def test_floors_of_formal_languages(problem):
    """Trees that see three tokens of both ends, the length, and the place in the answer from either side."""
    made = task.create("chomsky", problem=problem)

    def examples(split, count):
        found = []
        for i in range(count):
            row = made.row(split, i, 0, 0)
            (places,) = np.nonzero(row["weights"])
            string = row["inputs"][: places[0]].tolist()
            ends = [*(string + [-1] * 3)[:3], *([-1] * 3 + string)[-3:]]
            size = len(string)
            found += [([*ends, size, size % 2, j, size - j], row["targets"][p]) for j, p in enumerate(places)]
        return [np.array(part) for part in zip(*found)]

    scores = scores_of_trees(*examples("train", 3000), *examples("test", made.num_examples("test")))
    assert max(made.floors("test").values()) >= max(scores) - MARGIN, scores


@pytest.mark.parametrize(
    "name,options,features",
    [
        ("listops", {}, listops_features),
        ("max_gap", {}, max_gap_features),
        pytest.param("combination_sum", {}, sum_features, marks=pytest.mark.slow),
        ("combination_sum", {"answer": "feasible"}, sum_features),
    ],
)
def test_floors_are_floors(name, options, features):
    """Trees that were fitted on 3,000 rows, and their score on the test split."""
    made = task.create(name, **options)
    count = made.num_examples("test")
    rows = [[made.row(split, i, 0, 0) for i in range(n)] for split, n in (("train", 3000), ("test", count))]
    (x, held) = ([features(made, row) for row in part] for part in rows)
    labels, expected = (np.array([int(row["targets"]) for row in part]) for part in rows)
    scores = scores_of_trees(x, labels, held, expected)
    assert max(made.floors("test").values()) >= max(scores) - MARGIN, scores


def test_images():
    from sklearn.linear_model import LogisticRegression

    digits = task.create("digits_pixels")
    rows = [[digits.row(split, i, 0, 0) for i in range(digits.num_examples(split))] for split in ("train", "test")]
    (x, held) = (np.stack([row["inputs"][:, 0] for row in part]) for part in rows)
    labels, expected = (np.array([int(row["targets"]) for row in part]) for part in rows)
    score = np.mean(LogisticRegression(max_iter=100).fit(x, labels).predict(held) == expected)
    assert digits.floors("test")["logistic regression"] >= score - MARGIN


def test_the_gap_is_in_no_count():
    """Lists that are longer than there are numbers do not tell their gap by what is missing."""
    gap = task.create("max_gap", length=1024, limit=256)
    rows = [gap.row("train", i, 0, 0)["inputs"].tolist() for i in range(100)]
    assert {len(set(row)) for row in rows} == {48}
