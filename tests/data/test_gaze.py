"""Gaze: the pupil is where the angles say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import gaze_geometry, label_noise, task
from data.tasks import gaze as module
from tests.data.generated_rows import check_rows, digest


def test_rows():
    gaze = task.create("gaze")
    check_rows(gaze)
    assert (gaze.spec.metric.name, gaze.spec.objective, gaze.spec.targets) == ("angular_error", "regression", 2)
    assert gaze.spec.length == 384 and not gaze.spec.metric.higher_is_better
    assert digest(gaze) == "60a0f231817e179c"
    assert digest(task.create("gaze", label_noise="heavy-tailed")) == "eaeaa77638e28106"


def test_the_pupil_is_where_a_ball_turned_by_pitch_and_yaw_shows_it():
    """The darkest 3 x 3 patch near the middle lies within 2 pixels of -8 (cos pitch sin yaw, sin pitch), for nearly all."""
    gaze = task.create("gaze")
    distances = []
    for i in range(200):
        row = gaze.example("valid", i)
        image = row["inputs"].reshape(16, 24)
        patches = np.lib.stride_tricks.sliding_window_view(image, (3, 3)).mean((-1, -2))
        y, x = np.unravel_index(patches.argmin(), patches.shape)
        pitch, yaw = row["targets"]
        expected = [12 - 8 * np.cos(pitch) * np.sin(yaw), 8 - 8 * np.sin(pitch)]
        distances.append(np.hypot(x + 1.5 - expected[0], y + 1.5 - expected[1]))
    assert np.mean(np.array(distances) < 2) > 0.95


def test_directions_are_rotations_of_the_view():
    """Pitch about the x axis, then yaw about the y axis, of a look at the camera."""
    rng = np.random.default_rng(0)
    for pitch, yaw in rng.uniform(-1, 1, (10, 2)):
        about_x = np.array([[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]])
        about_y = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
        np.testing.assert_allclose(
            gaze_geometry.direction(np.array([pitch, yaw])), about_y @ about_x @ [0, 0, -1], atol=1e-12
        )


def test_angles_are_the_same_in_jax():
    gazes = np.random.default_rng(1).uniform(-1, 1, (2, 7, 2))
    expected = gaze_geometry.angle(*gazes)
    assert isinstance(expected, np.ndarray) and expected.shape == (7,)
    found = jax.jit(gaze_geometry.angle)(*jnp.float32(gazes))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_angular_error():
    zero = np.zeros((1, 2))
    assert module.angular_error(zero, np.array([[0.3, 0]])) == pytest.approx(np.degrees(0.3))
    assert module.angular_error(zero, np.array([[0, -0.3]])) == pytest.approx(np.degrees(0.3))
    assert module.angular_error(np.array([[0.4, 0.1]]), np.array([[0.4, 0.1]])) == pytest.approx(0, abs=1e-5)


def test_noise_is_on_training_labels_only():
    clean, noisy = (task.create("gaze", label_noise=noise) for noise in label_noise.NOISES)
    excess = []
    for split in clean.splits:
        for i in range(300):
            a, b = clean.row(split, i, 0, 0), noisy.row(split, i, 0, 0)
            np.testing.assert_array_equal(a["inputs"], b["inputs"])
            assert np.array_equal(a["targets"], b["targets"]) == (split != "train")
            excess.append(b["targets"] - a["targets"])
    assert np.mean(excess[:300]) == pytest.approx(0.05, abs=0.02)
    assert (np.abs([clean.row("valid", i, 0, 0)["targets"] for i in range(100)]) <= module.RANGE).all()


def test_floors(monkeypatch):
    monkeypatch.setattr(label_noise, "FIT_ROWS", 600)
    gaze = task.create("gaze")
    floors = gaze.floors("valid")
    # The mean over pitch and yaw of arccos(cos pitch cos yaw), by quadrature.
    pitch, yaw = np.meshgrid(np.linspace(-0.5, 0.5, 201), np.linspace(-0.7, 0.7, 201))
    expected = np.degrees(np.arccos(np.cos(pitch) * np.cos(yaw))).mean()
    assert floors["mean label"] == pytest.approx(expected, abs=0.8)
    assert floors["median label"] == pytest.approx(expected, abs=0.8)
    assert 5 < floors["linear regression"] < 15


def test_bad_noise():
    with pytest.raises(ValueError, match="label_noise='heavy' is unknown; did you mean 'heavy-tailed'"):
        task.create("gaze", label_noise="heavy")
