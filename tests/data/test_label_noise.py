"""Noise on real labels, and the floors that fit them."""

import numpy as np
import pytest

from data import label_noise
from data.generated import GeneratedTask
from data.rows import real_row
from data.task import Spec


def test_clean_labels_are_the_truth_and_draw_nothing():
    rng = np.random.default_rng(0)
    targets = np.arange(3.0)
    assert label_noise.noisy(rng, targets, "clean", 1, 1) is targets
    assert rng.random() == np.random.default_rng(0).random()


def test_heavy_tailed_labels_follow_their_law():
    """Laplace(0.1) plus, on a fifth, an exponential of mean 2: mean 0.4, variance 2 * 0.01 + (0.2 * 8 - 0.16); median near 0."""
    noise = label_noise.noisy(np.random.default_rng(0), np.zeros(200_000), "heavy-tailed", 0.1, 2)
    assert noise.mean() == pytest.approx(0.4, abs=0.01)
    assert noise.var() == pytest.approx(0.02 + 1.44, rel=0.03)
    assert 0 < np.median(noise) < 0.05
    assert np.mean(noise < -0.1) == pytest.approx(0.8 * np.exp(-1) / 2, abs=0.005)


def test_unknown_noise():
    with pytest.raises(ValueError, match="label_noise='heavy_tailed' is unknown; did you mean 'heavy-tailed'"):
        label_noise.noisy(np.random.default_rng(0), np.zeros(1), "heavy_tailed", 1, 1)


class Line(GeneratedTask):
    """y = 2 x_1 - x_2 + 1."""

    sizes = {"train": 100, "valid": 50, "test": 50}
    name, spec = "line", Spec(None, 1, 1, "regression", 2)

    def draw(self, split, rng):
        x = rng.normal(size=(2, 1))
        return real_row(x, 2 * x[0] - x[1] + 1, np.ones((), np.float32))

    def floors(self, split="test"):
        return label_noise.floors(self, split, lambda a, b: float(np.abs(a - b).mean()))


def test_floors_are_the_errors_of_fitted_predictors():
    line = Line()
    floors = line.floors()
    truth = np.array([row["targets"][0] for row in line.rows("test")])
    train = np.array([line.row("train", i, 0, 0)["targets"][0] for i in range(label_noise.FIT_ROWS)])
    assert floors["mean label"] == pytest.approx(np.abs(truth - train.mean()).mean(), rel=1e-5)
    assert floors["median label"] == pytest.approx(np.abs(truth - np.median(train)).mean(), rel=1e-5)
    assert floors["linear regression"] < 1e-2
