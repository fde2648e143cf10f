"""Keypoints: the shapes are where the targets say."""

import numpy as np
import pytest
from scipy import ndimage

from data import label_noise, task
from tests.data.generated_rows import check_rows, digest


def test_rows():
    keypoints = task.create("keypoints")
    check_rows(keypoints)
    assert (keypoints.spec.metric.name, keypoints.spec.objective, keypoints.spec.targets) == ("rmse", "regression", 6)
    assert digest(keypoints) == "1bcce9e86c932168"
    assert digest(task.create("keypoints", label_noise="heavy-tailed")) == "82a7b9cd0b8ead7f"


def blobs(image):
    """Of each connected bright region: its centre (x, y) as a fraction of the image less one half, and how much of its
    bounding box it fills."""
    names, count = ndimage.label(image > 0.3)
    centers = np.array(ndimage.center_of_mass(np.ones_like(image), names, range(1, count + 1)))[:, ::-1]
    filled = [np.mean(names[box] == i + 1) for i, box in enumerate(ndimage.find_objects(names))]
    return (centers + 0.5) / len(image) - 0.5, np.array(filled)


def test_shapes_are_where_the_targets_say():
    keypoints = task.create("keypoints")
    for i in range(50):
        row = keypoints.example("test", i)
        centers, _ = blobs(row["inputs"].reshape(28, 28))
        expected = row["targets"].reshape(3, 2)
        distance = np.abs(expected[:, None] - centers).max(-1)
        assert len(centers) == 3 and sorted(distance.argmin(1)) == [0, 1, 2]
        assert distance.min(1).max() < 0.5 / 28


def test_targets_are_the_square_the_disc_and_the_cross():
    """A square fills all of its bounding box, a disc pi / 4, a cross half."""
    keypoints = task.create("keypoints", length=64**2)
    for i in range(10):
        row = keypoints.example("test", i)
        centers, filled = blobs(row["inputs"].reshape(64, 64))
        assert filled[np.argsort(-filled)] == pytest.approx([0.98, 0.8, 0.48], abs=0.1)
        np.testing.assert_allclose(centers[np.argsort(-filled)].ravel(), row["targets"], atol=0.5 / 64)


def test_shapes_are_inside_and_apart():
    keypoints = task.create("keypoints")
    centers = np.stack([keypoints.example("valid", i)["targets"] for i in range(100)]).reshape(-1, 3, 2) * 28
    assert np.abs(centers).max() <= 9.5
    for i in range(3):
        assert np.abs(centers[:, i] - centers[:, i - 1]).max(-1).min() >= 8.4999


def test_noise_is_on_training_labels_only():
    clean, noisy = (task.create("keypoints", label_noise=noise) for noise in label_noise.NOISES)
    for split in clean.splits:
        a, b = clean.row(split, 5, 0, 0), noisy.row(split, 5, 0, 0)
        np.testing.assert_array_equal(a["inputs"], b["inputs"])
        assert np.array_equal(a["targets"], b["targets"]) == (split != "train")


def test_floors(monkeypatch):
    monkeypatch.setattr(label_noise, "FIT_ROWS", 128)
    keypoints = task.create("keypoints", length=256)
    keypoints.sizes = {"train": 128, "valid": 100, "test": 100}
    floors = keypoints.floors("valid")
    targets, errors = [], []
    for row in keypoints.rows("valid"):
        image = row["inputs"].reshape(16, 16).astype(np.float64)
        y, x = (np.arange(16) @ image.sum(axis) / image.sum() for axis in (1, 0))
        errors.append((np.tile([x, y], 3) + 0.5) / 16 - 0.5 - row["targets"])
        targets.append(row["targets"])
    assert floors["centre of brightness"] == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-4)
    assert floors["mean label"] == pytest.approx(np.std(targets), rel=0.05)
    assert set(floors) == {"mean label", "median label", "linear regression", "centre of brightness"}


@pytest.mark.parametrize("length", [-4, 225, 785])
def test_bad_length(length):
    with pytest.raises(ValueError, match=f"length={length} must be the number of pixels of a square image"):
        task.create("keypoints", length=length)


def test_bad_noise():
    with pytest.raises(ValueError, match="label_noise='none' is unknown"):
        task.create("keypoints", label_noise="none")
