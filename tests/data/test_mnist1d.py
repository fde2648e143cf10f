"""MNIST-1D by the authors' package; where it is not installed, a stand-in of the same form is read."""

import random
import sys
import types

import numpy as np
import pytest

from data import task
from tests.data.classification_rows import check


@pytest.fixture
def fake(monkeypatch):
    """A module mnist1d.data that makes 100 series and, like the real one, seeds the global generators."""

    def make_dataset(arguments):
        assert arguments == "defaults"
        random.seed(42)
        np.random.seed(42)
        x, y = np.random.randn(100, 40), np.arange(100) % 10
        return {"x": x[:80], "y": y[:80], "x_test": x[80:], "y_test": y[80:]}

    module = types.ModuleType("mnist1d.data")
    module.get_dataset_args, module.make_dataset = lambda: "defaults", make_dataset
    monkeypatch.setitem(sys.modules, "mnist1d", types.ModuleType("mnist1d"))
    monkeypatch.setitem(sys.modules, "mnist1d.data", module)
    return make_dataset("defaults")


def test_rows_are_the_packages_series(fake):
    np.random.seed(5)
    random.seed(5)
    expected = np.random.RandomState(5).rand(), random.Random(5).random()
    series = task.create("mnist1d")
    assert (np.random.rand(), random.random()) == expected
    assert [series.num_examples(split) for split in series.splits] == [70, 10, 20]
    for split, start, key in (("train", 0, "x"), ("valid", 70, "x"), ("test", 0, "x_test")):
        row = series.row(split, 3, 0, 0)
        np.testing.assert_array_equal(row["inputs"][:, 0], fake[key][start + 3].astype(np.float32))
        assert row["targets"] == (start + 3) % 10
        check(series, split, 5)
    assert set(series.floors("valid")) == {"majority", "nearest class mean", "logistic regression"}


def test_the_real_series():
    pytest.importorskip("mnist1d")
    series = task.create("mnist1d")
    assert [series.num_examples(split) for split in series.splits] == [3500, 500, 1000]
    assert series.floors()["nearest class mean"] == pytest.approx(0.287, abs=0.01)
    assert series.spec.length == 40


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(ValueError, match="pip install mnist1d"):
        task.create("mnist1d")
