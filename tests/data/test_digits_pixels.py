"""Digits of scikit-learn as sequences; where it is not installed, a stand-in of the same form is read."""

import sys
import types

import numpy as np
import pytest

from data import task
from tests.data.classification_rows import check


@pytest.fixture
def fake(monkeypatch):
    """A module sklearn.datasets with 700 made-up digits."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 17, (700, 64)).astype(float), np.arange(700) % 10
    module = types.ModuleType("sklearn.datasets")
    module.load_digits = lambda return_X_y: (pixels, labels)
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)
    return pixels, labels


def test_every_digit_is_in_one_split(fake):
    digits = task.create("digits_pixels")
    sizes = [digits.num_examples(split) for split in digits.splits]
    assert sizes == [200, 250, 250]
    rows = [check(digits, split, i) for split, size in zip(digits.splits, sizes, strict=True) for i in range(size)]
    read = {(*(16 * row["inputs"][:, 0]).tolist(), int(row["targets"])) for row in rows}
    assert read == {(*image, label) for image, label in zip(fake[0].tolist(), fake[1].tolist(), strict=True)}


def test_floors_by_a_plain_loop(fake):
    digits = task.create("digits_pixels")
    rows = {s: [digits.row(s, i, 0, 0) for i in range(digits.num_examples(s))] for s in ("train", "test")}
    means = {c: np.mean([r["inputs"] for r in rows["train"] if r["targets"] == c], 0) for c in range(10)}
    right = [min(means, key=lambda c: ((r["inputs"] - means[c]) ** 2).sum()) == r["targets"] for r in rows["test"]]
    labels = [int(r["targets"]) for r in rows["train"]]
    most = max(range(10), key=labels.count)
    expected = {"majority": np.mean([r["targets"] == most for r in rows["test"]]), "nearest class mean": np.mean(right)}
    floors = digits.floors("test")
    assert {key: floors[key] for key in expected} == pytest.approx(expected) and 0 < floors["logistic regression"] <= 1


def test_the_real_digits():
    pytest.importorskip("sklearn")
    digits = task.create("digits_pixels")
    assert [digits.num_examples(split) for split in digits.splits] == [1297, 250, 250]
    assert digits.content().startswith("1e6e4c086cb8")
    assert digits.floors()["nearest class mean"] == pytest.approx(0.892)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        task.create("digits_pixels")
